"""The audit log: every way of tampering with it is found, and a crash never damages it."""

from __future__ import annotations

import base64
import json
import multiprocessing
import resource
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.auditlog import PURPOSE, AuditLog, canonical, verify_log
from common.checkpoint import (
    Checkpoint,
    countersign,
    make_checkpoint,
    verify_checkpoint,
    verify_log_against,
)
from common.errors import AuditError, SignatureError
from common.identity import Identity

HOSPITAL = Identity.generate()
COORDINATOR = Identity.generate()


def filled(path: Path, count: int = 5) -> AuditLog:
    log = AuditLog(path, HOSPITAL)
    for number in range(count):
        log.append("study_seen", {"study": f"study {number}", "round": number})
    return log


def forged(path: Path, line: int, **changes: object) -> None:
    """Rewrite one line and everything after it, as someone without the key would have to."""
    lines = path.read_bytes().splitlines(keepends=True)
    body = json.loads(lines[line])
    body.update(changes)
    lines[line] = canonical(body) + b"\n"
    path.write_bytes(b"".join(lines))


def test_an_untouched_log_verifies_and_continues(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    filled(path)
    again = AuditLog(path, HOSPITAL)
    again.append("refused", {"rule": "budget", "reason": "spent"})
    assert len(verify_log(path, HOSPITAL.public)) == 7
    assert [record.kind for record in again.records()][-1] == "refused"
    assert again.latest("refused") is not None
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("line", range(6))
def test_an_edit_is_found_at_its_line(tmp_path: Path, line: int) -> None:
    path = tmp_path / "audit.log"
    filled(path)
    forged(path, line, facts={"study": "another"})
    with pytest.raises(AuditError, match=f"line {line + 1}: expected a signature"):
        verify_log(path, HOSPITAL.public)


def test_an_edit_resigned_by_another_key_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    filled(path)
    lines = path.read_bytes().splitlines()
    body = json.loads(lines[-1])
    body.pop("sig")
    body["facts"] = {"study": "another"}
    signature = Identity.generate().sign(canonical(body), purpose=PURPOSE)
    forged(path, 5, **body, sig=base64.b64encode(signature).decode())
    with pytest.raises(AuditError, match="line 6: expected a signature by this hospital's key"):
        verify_log(path, HOSPITAL.public)
    with pytest.raises(AuditError, match="line 6"):
        AuditLog(path, HOSPITAL)


@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_byte_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "audit.log"
    filled(path, 2)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    with pytest.raises(AuditError):
        verify_log(path, HOSPITAL.public)


@pytest.mark.parametrize("removed", range(5))
def test_a_deletion_is_found(tmp_path: Path, removed: int) -> None:
    path = tmp_path / "audit.log"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[removed]
    path.write_bytes(b"".join(lines))
    with pytest.raises(AuditError, match=f"line {removed + 1}: .*removed or reordered"):
        verify_log(path, HOSPITAL.public)
    with pytest.raises(AuditError):
        AuditLog(path, HOSPITAL)


def test_reordering_and_duplication_are_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    with pytest.raises(AuditError, match="line 3"):
        verify_log(path, HOSPITAL.public)
    path.write_bytes(b"".join([*lines, lines[-1]]))
    with pytest.raises(AuditError, match="line 7"):
        verify_log(path, HOSPITAL.public)


def test_an_emptied_log_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_bytes(b"")
    with pytest.raises(AuditError, match="emptied"):
        verify_log(path, HOSPITAL.public)


def test_a_cut_end_is_found_with_a_countersigned_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = filled(path)
    unsigned = make_checkpoint(log, HOSPITAL)
    checkpoint = countersign(
        unsigned, coordinator=COORDINATOR, hospital=HOSPITAL.public, previous=None
    )
    checkpoint = Checkpoint.from_text(checkpoint.text())
    log.append("refused", {"rule": "x"})
    keys = {"hospital": HOSPITAL.public, "coordinator": COORDINATOR.public}
    assert len(verify_log_against(path, checkpoint, **keys)) == 7
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))
    verify_log(path, HOSPITAL.public)  # the chain alone cannot see this
    with pytest.raises(AuditError, match="the end was cut off"):
        verify_log_against(path, checkpoint, **keys)
    path.unlink()
    filled(path, 10)
    with pytest.raises(AuditError, match="the whole log was replaced"):
        verify_log_against(path, checkpoint, **keys)


def test_a_coordinator_countersigns_only_what_extends_the_last(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.log", 1)
    first = make_checkpoint(log, HOSPITAL)
    log.append("refused", {"rule": "x"})
    second = make_checkpoint(log, HOSPITAL)
    keys = {"coordinator": COORDINATOR, "hospital": HOSPITAL.public}
    done = countersign(second, previous=first, **keys)
    with pytest.raises(AuditError, match="was cut, changed or replaced"):
        countersign(first, previous=done, **keys)
    with pytest.raises(SignatureError):
        verify_checkpoint(second, hospital=HOSPITAL.public, coordinator=COORDINATOR.public)
    stranger = Identity.generate()
    with pytest.raises(SignatureError):
        countersign(second, coordinator=COORDINATOR, hospital=stranger.public, previous=None)
    with pytest.raises(AuditError, match="expected the JSON line"):
        Checkpoint.from_text("{}")


@pytest.mark.parametrize("kept", [1, 50, -1])
def test_a_torn_last_line_is_reported_then_repaired_with_a_record(
    tmp_path: Path, kept: int
) -> None:
    path = tmp_path / "audit.log"
    log = filled(path)
    before = path.read_bytes()
    log.append("refused", {"rule": "x"})
    torn = path.read_bytes()[len(before) :][:kept]
    path.write_bytes(before + torn)
    with pytest.raises(AuditError, match="line 7: expected a newline"):
        verify_log(path, HOSPITAL.public)
    assert path.read_bytes() == before + torn  # verifying changes nothing
    repaired = AuditLog(path, HOSPITAL)
    record = repaired.latest("tail_repaired")
    assert record is not None
    assert record.facts["removed_bytes"] == len(torn)
    assert len(verify_log(path, HOSPITAL.public)) == 7


def test_a_torn_first_line_starts_the_log_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    path.write_bytes(b'{"facts":')
    AuditLog(path, HOSPITAL)
    assert len(verify_log(path, HOSPITAL.public)) == 1


def test_a_clock_set_back_is_refused_and_a_nudge_is_not(tmp_path: Path) -> None:
    now = [datetime(2026, 5, 1, tzinfo=UTC)]
    log = AuditLog(tmp_path / "audit.log", HOSPITAL, clock=lambda: now[0])
    now[0] -= timedelta(seconds=2)
    log.append("refused", {"rule": "x"})
    now[0] -= timedelta(hours=1)
    with pytest.raises(AuditError, match=r"clock: .* set back"):
        log.append("refused", {"rule": "x"})
    verify_log(tmp_path / "audit.log", HOSPITAL.public)


def test_only_listed_facts_of_listed_kinds_are_written(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.log", 0)
    for kind, facts in (
        ("released", {"patient_id": "p1"}),
        ("unheard", {}),
        ("refused", {"reason": "x" * 401}),
        ("consent_applied", {"patients": ["x" * 401]}),
    ):
        with pytest.raises(ValueError, match="audit"):
            log.append(kind, facts)  # type: ignore[arg-type]
    assert len(verify_log(log.path, HOSPITAL.public)) == 1


def _append_many(path: Path, count: int) -> None:
    log = AuditLog(path, HOSPITAL)
    for number in range(count):
        log.append("study_seen", {"round": number})


def test_processes_may_share_a_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, 25)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(verify_log(path, HOSPITAL.public)) == 76


def _append_on_a_full_disk(path: Path, found: multiprocessing.Queue[str]) -> None:
    log = AuditLog(path, HOSPITAL)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = path.stat().st_size + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        log.append("refused", {"rule": "x"})
    except AuditError as error:
        found.put(str(error))


def test_a_full_disk_is_said_and_leaves_the_log_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    context = multiprocessing.get_context("fork")
    found: multiprocessing.Queue[str] = context.Queue()
    worker = context.Process(target=_append_on_a_full_disk, args=(path, found))
    worker.start()
    assert "cannot be written" in found.get(timeout=20)
    worker.join()
    assert len(verify_log(path, HOSPITAL.public)) == 1


def test_a_log_cut_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    log = filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(AuditError, match="was cut while in use"):
        log.append("refused", {"rule": "x"})


def test_two_histories_of_one_log_cannot_be_spliced(tmp_path: Path) -> None:
    """Every line is genuine and rightly numbered; only the chain tells that they do not belong."""
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    filled(first, 1)
    second.write_bytes(first.read_bytes())
    second.chmod(0o600)
    for path in (first, second):
        log = AuditLog(path, HOSPITAL)
        log.append("refused", {"rule": path.name})
        log.append("refused", {"rule": path.name})
    ours = first.read_bytes().splitlines(keepends=True)
    theirs = second.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join([*ours[:2], theirs[2], ours[3]]))
    with pytest.raises(AuditError, match=r"line 4: .*changed, removed or reordered"):
        verify_log(first, HOSPITAL.public)
