"""Killed at every step, raced by another process: the ledger never under-counts."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import ModuleType

import pytest

from common.auditlog import verify_log
from common.errors import LedgerError, RefusalError
from common.identity import Identity
from common.privacy.units import PrivacyUnit, Relation


def _driver() -> ModuleType:
    path = Path(__file__).with_name("ledger_driver.py")
    spec = importlib.util.spec_from_file_location("ledger_driver", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ledger_driver"] = module
    spec.loader.exec_module(module)
    return module


driver = _driver()
fork = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Identity.generate().save(tmp_path / "identity", key=driver.KEY)
    return tmp_path


def run_to_death(target: Callable[..., None], *arguments: object) -> int | None:
    """Forking keeps the libraries loaded: dozens of deaths in a few seconds."""
    worker = fork.Process(target=target, args=arguments)
    worker.start()
    worker.join(30)
    return worker.exitcode


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def check_invariants(folder: Path) -> None:
    """Every draw of noise was charged; one request never left in two versions."""
    sent: dict[tuple[int, int], set[str]] = {}
    for number, attempt, content in lines(folder / "released"):
        sent.setdefault((int(number), int(attempt)), set()).add(content)
    drawn = {(int(number), int(attempt)) for number, attempt in lines(folder / "drawn")}
    with driver.opened(folder) as ledger:
        assert drawn <= {(entry.round, entry.attempt) for entry in ledger.entries()}
        assert sent.keys() <= drawn
        assert all(len(contents) == 1 for contents in sent.values())
        # A request is sent under one attempt only: the one whose bytes were stored.
        assert len({number for number, _ in sent}) == len(sent)
        for (number, attempt), contents in sent.items():
            stored = ledger.resume(f"round {number}")
            assert stored is not None
            assert stored.reservation.attempt == attempt
            assert {stored.content.hex()} == contents
    hospital = Identity.load(folder / "identity", key=driver.KEY).public
    verify_log(folder / "audit.log", hospital)


@pytest.mark.parametrize("step", driver.STEPS)
def test_killed_at_a_step_it_never_undercounts(folder: Path, step: str) -> None:
    for death in range(12):
        assert run_to_death(driver.main, folder, step, death % 3) == -signal.SIGKILL
        check_invariants(folder)
    # The unfinished round is finished: with its stored bytes, or paid again.
    with driver.opened(folder) as ledger:
        entries = ledger.entries()
        committed = {entry.round for entry in entries if entry.state == "committed"}
        for number in {entry.round for entry in entries} - committed:
            stored = ledger.resume(f"round {number}")
            count = len(ledger.entries())
            driver.one_round(ledger, folder, number)
            assert len(ledger.entries()) == count + (stored is None)
    check_invariants(folder)


def test_killed_at_random_moments_it_never_undercounts(folder: Path) -> None:
    moments = random.Random(7)  # noqa: S311 - a test's schedule
    for _ in range(40):
        worker = fork.Process(target=driver.main, args=(folder, "never", 0))
        worker.start()
        time.sleep(moments.uniform(0.0, 0.03))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        check_invariants(folder)


def _spend_all(folder: Path, name: str, limit: float, together: Barrier) -> None:
    ledger = driver.opened(folder)
    cohort = ledger.cohort(["a", "b"] if name == "x" else ["b", "c"])
    limits = driver.Limits(
        epsilon_lifetime=limit, epsilon_per_year=limit, delta=1e-5, relation=Relation.ADD_REMOVE
    )
    together.wait(30)
    for number in range(1000):
        time.sleep(0.005)  # so that neither spends everything in its first slice of time
        try:
            ledger.reserve(
                study=name,
                study_digest="0" * 64,
                stage="finetune",
                round_number=number,
                attempt=0,
                request_digest=f"{name} {number}",
                unit=PrivacyUnit.PATIENT,
                relation=Relation.ADD_REMOVE,
                records_per_patient=1,
                cohort=cohort,
                events=[driver.EVENT],
                limits=limits,
            )
        except RefusalError:
            return
    raise AssertionError("the budget never ended")


def test_two_processes_cannot_overspend_together(folder: Path) -> None:
    driver.opened(folder).close()
    together = fork.Barrier(2)
    workers = [fork.Process(target=_spend_all, args=(folder, name, 2.0, together)) for name in "xy"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    ledger = driver.opened(folder)
    entries = ledger.entries()
    ledger.close()
    # Patient b was in both cohorts: together the two spent no more than one could.
    spent = driver.GaussianEvent(noise_multiplier=driver.EVENT.noise_multiplier, steps=len(entries))
    one_more = driver.GaussianEvent(
        noise_multiplier=driver.EVENT.noise_multiplier, steps=len(entries) + 1
    )
    assert epsilon_of(spent) <= 2.0 < epsilon_of(one_more)
    assert {entry.study for entry in entries} == {"x", "y"}
    check_invariants(folder)


def epsilon_of(event: object) -> float:
    from common.privacy.accounting import epsilon

    return epsilon([event], delta=1e-5, relation=Relation.ADD_REMOVE)  # type: ignore[list-item]


def test_yesterdays_backup_is_refused(folder: Path) -> None:
    ledger = driver.opened(folder)
    driver.one_round(ledger, folder, 0)
    ledger.close()
    backup = folder / "backup.db"
    shutil.copy(folder / "ledger.db", backup)
    ledger = driver.opened(folder)
    driver.one_round(ledger, folder, 1)
    ledger.close()
    newest = (folder / "ledger.db").read_bytes()
    shutil.copy(backup, folder / "ledger.db")
    with pytest.raises(LedgerError, match="was rolled back: the audit log knows operation 4"):
        driver.opened(folder)
    # Refusing changed nothing; the newest copy is accepted.
    (folder / "ledger.db").write_bytes(newest)
    with driver.opened(folder) as ledger:
        assert len(ledger.entries()) == 2


def test_a_log_rolled_back_alone_is_refused(
    folder: Path,
) -> None:
    ledger = driver.opened(folder)
    driver.one_round(ledger, folder, 0)
    shutil.copy(folder / "ledger.db", folder / "copy.db")
    shutil.copy(folder / "audit.log", folder / "copy.log")
    driver.one_round(ledger, folder, 1)
    ledger.close()
    shutil.copy(folder / "copy.log", folder / "audit.log")
    with pytest.raises(LedgerError, match="the audit log was cut or replaced"):
        driver.opened(folder)


def test_a_deleted_ledger_is_not_started_anew(folder: Path) -> None:
    ledger = driver.opened(folder)
    driver.one_round(ledger, folder, 0)
    ledger.close()
    (folder / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="found no file; restore"):
        driver.opened(folder)
    (folder / "ledger.db").touch(mode=0o600)
    with pytest.raises(LedgerError, match="found an empty one"):
        driver.opened(folder)
    (folder / "ledger.db").unlink()
    (folder / "audit.log").unlink()
    driver.opened(folder).close()  # a hospital that starts anew on purpose removes both


def test_a_replaced_log_is_refused(folder: Path) -> None:
    ledger = driver.opened(folder)
    driver.one_round(ledger, folder, 0)
    ledger.close()
    (folder / "audit.log").unlink()
    with pytest.raises(LedgerError, match="found another one; restore the right log"):
        driver.opened(folder)
