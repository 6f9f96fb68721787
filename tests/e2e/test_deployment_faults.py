"""What may die, hang or be cut off at a hospital that trains; the study ends all the same.

Each test offers a study of its own to one running federation. Where every round has all hospitals,
the result is compared with an undisturbed simulation; the ledgers never hold fewer releases than
the coordinator has seen.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.federation import COORDINATOR_IP, ROOT, wait_for
from tests.e2e.heart_federation import (
    ENTRIES,
    NAMES,
    OF_STUDY,
    HeartFederation,
    as_deployed,
    count,
    covered,
    heart,
    heart_federation,
    needs_federation,
    settled,
    whole,
)

pytestmark = needs_federation

FAKETIME = Path(f"/usr/lib/{os.uname().machine}-linux-gnu/faketime/libfaketime.so.1")


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeartFederation]:
    with heart_federation(tmp_path_factory.mktemp("faults")) as running:
        yield running


def unresolved(fed: HeartFederation, name: str, digest: str) -> int:
    """How many of them were reserved, and never released as far as the hospital knows."""
    missing = "LEFT JOIN release ON release.entry = entry.id"
    return count(fed, name, f"{ENTRIES} {missing} WHERE digest IS NULL AND {OF_STUDY}", digest)


def test_a_supernode_is_killed_while_it_trains(fed: HeartFederation, tmp_path: Path) -> None:
    study = whole(105)
    study_id = fed.submit(study)
    fed.wait_rounds(study_id, 1)
    fed.made.hospitals["hungarian"].kill("client.supernode")
    settled(fed, study_id, study, tmp_path)


def test_a_task_is_killed_between_reserving_and_releasing(fed: HeartFederation) -> None:
    """What was reserved stays spent; the hospital sits out what no longer fits, the study ends."""
    study = heart(106, finetune__local_steps=150)
    study_id, digest = fed.submit(study), as_deployed(study).digest()
    host = fed.made.hospitals["cleveland"]
    runner = host.pid_of("client.runner")
    wait_for(lambda: unresolved(fed, "cleveland", digest), 120, "a reservation")
    for child in Path(f"/proc/{runner}/task/{runner}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert unresolved(fed, "cleveland", digest) == 1
    fed.wait_finished(study_id)
    rounds = fed.hospitals_by_round(study_id)
    assert min(rounds) == len(NAMES) - 1
    covered(fed, study_id, study)


def test_a_hospital_is_cut_off_for_a_while_and_comes_back(fed: HeartFederation) -> None:
    study = heart(107, rounds=30)
    study_id = fed.submit(study)
    fed.wait_rounds(study_id, 1)
    host = fed.made.hospitals["va"]
    host.cut(off=True)  # half-open: no end of the connection is told
    fed.wait_rounds(study_id, 3, seconds=150)
    host.cut(off=False)
    fed.wait_finished(study_id, 300)
    rounds = fed.hospitals_by_round(study_id)
    assert min(rounds) == len(NAMES) - 1
    assert rounds[-1] == len(NAMES)
    covered(fed, study_id, study)


def test_a_slow_line_with_gaps_is_only_slow(fed: HeartFederation, tmp_path: Path) -> None:
    host = fed.made.hospitals["switzerland"]
    line = subprocess.Popen(
        [
            *(*fed.made.coordinator.inside, sys.executable, "-m", "tests.e2e.slowline"),
            *(COORDINATOR_IP, "9444", "8443"),
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert line.stdout is not None
    assert line.stdout.readline() == b"ready\n"
    link = host.folder / "link" / "link.json"
    before = link.read_text()
    try:
        host.stop()
        link.write_text(before.replace(f"{COORDINATOR_IP}:8443", f"{COORDINATOR_IP}:9444"))
        fed.made.start_hospital("switzerland")
        wait_for(lambda: fed.made.status()["online"] == len(NAMES), 90, "all online, one slowly")
        study = whole(108)
        study_id = fed.submit(study)
        settled(fed, study_id, study, tmp_path)
    finally:
        host.stop()
        link.write_text(before)
        fed.made.start_hospital("switzerland")
        line.terminate()
        line.communicate(timeout=20)


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs libfaketime (Debian: faketime)")
def test_a_hospital_whose_clock_is_two_hours_off_sits_out(fed: HeartFederation) -> None:
    host = fed.made.hospitals["va"]
    host.stop()
    records = (host.folder / "audit.log").read_bytes()
    fed.made.start_hospital("va", LD_PRELOAD=str(FAKETIME), FAKETIME="+2h")

    def is_off() -> bool:
        told = host.command("hospital", "status", "--folder", str(host.folder), fails=True)
        return "clock off" in told

    wait_for(is_off, 90, "the daemon notices its clock")
    study_id = fed.submit(heart(111), approve=[name for name in NAMES if name != "va"])
    fed.made.ask("begin", study_id)
    fed.wait_finished(study_id)
    assert set(fed.hospitals_by_round(study_id)) == {len(NAMES) - 1}
    host.stop()
    # Nothing was signed under a time that a corrected clock would contradict.
    assert (host.folder / "audit.log").read_bytes() == records
    fed.made.start_hospital("va")
    wait_for(lambda: fed.made.status()["online"] == len(NAMES), 120, "va is back")


def test_a_revoked_hospital_is_out_and_the_others_go_on(fed: HeartFederation) -> None:
    """Last: it cannot come back."""
    study_id = fed.submit(heart(109, rounds=6))
    fed.wait_rounds(study_id, 1)
    fed.made.ask("revoke", "switzerland")
    fed.wait_finished(study_id, 300)
    assert fed.hospitals_by_round(study_id)[-1] == len(NAMES) - 1
    host = fed.made.hospitals["switzerland"]
    told = host.command("hospital", "check", "--folder", str(host.folder), fails=True)
    assert "revoked" in told
