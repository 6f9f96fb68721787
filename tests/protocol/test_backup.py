"""A backup made in the middle of a study is a whole coordinator again."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from common.auditlog import verify_log
from common.errors import RunError
from server.backup import back_up, restore
from server.store import Checkpoint, RunFolder
from server.tokens import find_token
from tests.unit.coordinator import FakeClock, FakeFederation, World, world_at


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with world_at(tmp_path / "desk", FakeClock()) as world:
        yield world


@pytest.fixture
def running(world: World, tree: dict[str, Any]) -> RunFolder:
    """A study of two hospitals with one finished round."""
    both = world.join("north"), world.join("south")
    row = world.service.studies.submit(tomli_w.dumps(tree), None, actor="local")
    world.agree(*both)
    world.service.driver.tick()
    world.service.driver.tick()
    run = world.service.studies.folder(row)
    a_round(run, 1)
    return run


def a_round(run: RunFolder, number: int) -> None:
    run.log({"stage": "finetune", "round": number, "hospitals": 2, "epsilon": 1.0 * number})
    weights = torch.full((1000,), float(number))
    run.checkpoint(Checkpoint("finetune", number, {"w": weights}, {"round": number}))


def test_a_restored_coordinator_goes_on_where_the_copy_was_made(
    world: World, running: RunFolder, tmp_path: Path
) -> None:
    desk, copy, again = world.service.desk, tmp_path / "copy.tar.gz", tmp_path / "again"
    old_token = desk.folder.admin_token.read_text().strip()
    made = back_up(desk.folder.path, copy, world.clock())
    assert made.has_database
    assert copy.stat().st_mode & 0o077 == 0
    restore(copy, again, world.clock())
    shutil.copy2(desk.folder.path / "key", again / "key")
    for path in again.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    flower = FakeFederation(next_id=5)  # its memory is not in the copy
    with world_at(again, world.clock, flower) as restored:
        service = restored.service
        assert service.desk.identity.public == desk.identity.public
        assert service.desk.authority.fingerprint == desk.authority.fingerprint
        verify_log(service.desk.folder.audit_log, desk.identity.public)
        # What is not in the copy is made anew: nodes at Flower, the server's certificate, a token.
        assert service.admission.maintain()
        for _ in range(2):
            service.driver.tick()
        assert len(flower.keys) == 2
        (row,) = service.desk.registry.studies()
        assert (row.state, flower.started) == ("running", [row.id])
        last = service.studies.folder(row).last_checkpoint()
        assert last is not None
        assert (last.round, last.tensors["w"][0].item()) == (1, 1.0)
        token = again.joinpath("admin.token").read_text().strip()
        found = find_token(service.desk.registry, token)
        assert found is not None
        assert found.role == "admin"
        assert find_token(service.desk.registry, old_token) is None


def test_the_copy_holds_nothing_that_opens_it(
    world: World, running: RunFolder, tmp_path: Path
) -> None:
    folder = world.service.desk.folder
    copy = tmp_path / "copy.tar.gz"
    back_up(folder.path, copy, world.clock())
    with tarfile.open(copy) as archive:
        names = archive.getnames()
        content = b"".join(
            reader.read() for one in archive if (reader := archive.extractfile(one)) is not None
        )
    assert {"identity", "pki/ca.key", "store.db", "manifest.json"} <= set(names)
    for secret in (
        (folder.path / "key").read_bytes(),
        folder.admin_token.read_bytes().strip(),
        b"PRIVATE KEY",
    ):
        assert secret not in content
    assert not {"key", "admin.token", "pki/server.key"} & set(names)


def test_a_run_is_copied_whole_while_rounds_finish(
    world: World, running: RunFolder, tmp_path: Path
) -> None:
    done = threading.Event()

    def work() -> None:
        number = 1
        while not done.is_set():
            number += 1
            a_round(running, number)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for attempt in range(5):
            copy = tmp_path / f"{attempt}.tar.gz"
            try:
                back_up(world.service.desk.folder.path, copy, world.clock())
            except RunError as error:
                assert "try again" in str(error)
                assert not copy.exists()
                continue
            restore(copy, tmp_path / f"again-{attempt}", world.clock())
            run = RunFolder(tmp_path / f"again-{attempt}" / "runs" / running.path.name)
            last = run.last_checkpoint()
            assert last is not None
            assert last.tensors["w"][0].item() == last.round
            assert len(run.metrics()) == last.round
    finally:
        done.set()
        worker.join()


def rewritten(copy: Path, change: dict[str, bytes], *, without: str = "") -> Path:
    target = copy.with_name("changed.tar.gz")
    with tarfile.open(copy) as old, tarfile.open(target, "w:gz") as new:
        for entry in old:
            reader = old.extractfile(entry)
            assert reader is not None
            data = change.pop(entry.name, reader.read())
            if entry.name != without:
                entry.size = len(data)
                new.addfile(entry, io.BytesIO(data))
        for name, data in change.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
    return target


def test_a_changed_copy_is_refused(world: World, running: RunFolder, tmp_path: Path) -> None:
    copy = tmp_path / "copy.tar.gz"
    back_up(world.service.desk.folder.path, copy, world.clock())
    manifest = json.loads(tarfile.open(copy).extractfile("manifest.json").read())  # type: ignore[union-attr]  # noqa: SIM115
    outside = manifest["files"] | {"../evil": "00"}
    import hashlib

    outside["../evil"] = hashlib.sha256(b"x").hexdigest()
    climbing = json.dumps(manifest | {"files": outside}).encode()
    for number, (change, without, words) in enumerate(
        [
            ({"identity": b"another"}, "", "not what was backed up"),
            ({"extra": b"x"}, "", "not in the manifest"),
            ({}, "audit.log", "is missing"),
            ({"manifest.json": climbing, "../evil": b"x"}, "", "leads out"),
            ({"manifest.json": b'{"version": 9, "files": {}}'}, "", "expected version 1"),
        ]
    ):
        changed = rewritten(copy, dict(change), without=without)
        with pytest.raises(RunError, match=words):
            restore(changed, tmp_path / f"again-{number}", world.clock())
    assert not (tmp_path / "evil").exists()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(copy.read_bytes()[:-200])
    with pytest.raises(RunError, match="cannot be restored"):
        restore(cut, tmp_path / "again-cut", world.clock())
    with pytest.raises(RunError, match="expected an empty folder"):
        restore(copy, world.service.desk.folder.path, world.clock())
    with pytest.raises(RunError, match="expected a new file"):
        back_up(world.service.desk.folder.path, copy, world.clock())
