"""What may die or fill up at the coordinator while hospitals train; the study ends all the same.

Each test offers a study of its own to one running federation. Where every round has all hospitals,
the result is compared with an undisturbed simulation; the ledgers never hold fewer releases than
the coordinator has seen.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.federation import wait_for
from tests.e2e.heart_federation import (
    HeartFederation,
    heart_federation,
    needs_federation,
    settled,
    whole,
)

pytestmark = needs_federation


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeartFederation]:
    with heart_federation(tmp_path_factory.mktemp("outages")) as running:
        yield running


@contextmanager
def kept_down(fed: HeartFederation, part: str, seconds: float) -> Iterator[None]:
    """Kill a coordinator's process whenever it comes back, for so long."""
    until = time.monotonic() + seconds
    fed.made.coordinator.kill(part)

    def keep() -> None:
        while time.monotonic() < until:
            for pid, line in fed.made.coordinator.processes().items():
                if part in line:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize(("outage_s", "seed"), [(12, 101), (90, 102)])
def test_the_superlink_is_killed_and_stays_away(
    fed: HeartFederation, tmp_path: Path, outage_s: int, seed: int
) -> None:
    study = whole(seed)
    study_id = fed.submit(study)
    fed.wait_rounds(study_id, 1)
    with kept_down(fed, "flower-superlink", outage_s):
        pass
    settled(fed, study_id, study, tmp_path)


def test_the_conducting_process_is_killed(fed: HeartFederation, tmp_path: Path) -> None:
    study = whole(103)
    study_id = fed.submit(study)
    fed.wait_rounds(study_id, 1)
    runner = fed.made.coordinator.pid_of("server.runner")
    conducting = wait_for(
        lambda: Path(f"/proc/{runner}/task/{runner}/children").read_text().split(), 30, "a run"
    )
    os.kill(int(conducting[0]), signal.SIGKILL)
    settled(fed, study_id, study, tmp_path)


def test_the_coordinator_is_killed_and_goes_on_by_itself(
    fed: HeartFederation, tmp_path: Path
) -> None:
    study = whole(104)
    study_id = fed.submit(study)
    fed.wait_rounds(study_id, 1)
    fed.made.coordinator.crash()
    fed.made.start_coordinator()
    settled(fed, study_id, study, tmp_path)


def test_the_coordinators_disk_fills_up_and_is_freed(fed: HeartFederation, tmp_path: Path) -> None:
    study = whole(110)
    study_id = fed.submit(study)
    fed.wait_rounds(study_id, 1)
    filler = fed.made.coordinator.folder.parent / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))
    runner = fed.made.coordinator.folder / "logs" / "runner.log"
    rounds, before = len(fed.run(study_id).metrics()), runner.stat().st_size
    time.sleep(20)
    assert len(fed.run(study_id).metrics()) <= rounds + 1
    filler.unlink()
    settled(fed, study_id, study, tmp_path)
    assert "Traceback" not in runner.read_text()[before:]
