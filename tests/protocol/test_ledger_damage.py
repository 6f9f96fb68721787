"""A damaged, foreign, full or read-only ledger is refused in one clear line."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.ledger_records import Reservation
from client.spend import Limits
from common.auditlog import AuditLog
from common.errors import LedgerError, SecretError
from common.identity import Identity
from common.privacy.accounting import GaussianEvent
from common.privacy.units import PrivacyUnit, Relation

SECRET = bytes(range(32))
HOSPITAL = Identity.generate()
LIMITS = Limits(
    epsilon_lifetime=5.0, epsilon_per_year=5.0, delta=1e-5, relation=Relation.ADD_REMOVE
)


def reserve(ledger: Ledger, number: int, patients: int = 50) -> Reservation:
    return ledger.reserve(
        study="s",
        study_digest="0" * 64,
        stage="finetune",
        round_number=number,
        attempt=0,
        request_digest=f"r{number}",
        unit=PrivacyUnit.PATIENT,
        relation=Relation.ADD_REMOVE,
        records_per_patient=1,
        cohort=ledger.cohort(f"p{i}" for i in range(patients)),
        events=[GaussianEvent(noise_multiplier=30.0)],
        limits=LIMITS,
    )


def opened(folder: Path, secret: bytes = SECRET) -> Ledger:
    return Ledger(folder / "ledger.db", secret=secret, log=AuditLog(folder / "log", HOSPITAL))


@pytest.fixture
def used(tmp_path: Path) -> Iterator[Path]:
    ledger = opened(tmp_path)
    for number in range(3):
        reservation = reserve(ledger, number)
        ledger.record_release(reservation, b"release" * 300)
        ledger.commit(reservation)
    ledger.close()
    yield tmp_path


def test_overwritten_bytes_are_refused(used: Path) -> None:
    content = bytearray((used / "ledger.db").read_bytes())
    for start in range(0, len(content), 4096):
        damaged = bytearray(content)
        damaged[start + 100 : start + 600] = b"\xa5" * 500
        (used / "ledger.db").write_bytes(bytes(damaged))
        for suffix in ("-wal", "-shm"):
            (used / f"ledger.db{suffix}").unlink(missing_ok=True)
        try:
            ledger = opened(used)
        except LedgerError:
            continue
        # A page that holds no live byte may be overwritten without harm.
        assert len(ledger.entries()) == 3
        assert [ledger.resume(f"r{n}") is not None for n in range(3)] == [True] * 3
        ledger.close()


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 300, b"SQLite format 3\0" + b"x" * 5000]
)
def test_another_file_is_refused(used: Path, content: bytes) -> None:
    (used / "ledger.db").write_bytes(content)
    with pytest.raises(LedgerError, match="nothing is released without it"):
        opened(used)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE operation SET time = '2020-01-01T00:00:00.000000+00:00' WHERE seq = 2",
        "DELETE FROM operation WHERE seq = 9",
        "DROP TRIGGER entry_is_final; UPDATE entry SET facts = replace(facts, '30.0', '99.0')",
        "DROP TRIGGER entry_is_final; UPDATE entry SET cohort = 1, id = id + 10",
        "DROP TRIGGER entry_stays; PRAGMA foreign_keys = OFF; DELETE FROM entry WHERE id = 3",
        "DELETE FROM patient WHERE tag = (SELECT min(tag) FROM patient)",
        "UPDATE atom SET patients = 1",
        "UPDATE cohort SET digest = 'x'",
    ],
)
def test_changes_from_outside_are_refused(used: Path, change: str) -> None:
    with sqlite3.connect(used / "ledger.db") as connection:
        connection.executescript(change)
    connection.close()
    with pytest.raises(LedgerError, match=r"changed from outside|rolled back"):
        opened(used)


def test_entries_cannot_be_changed_or_removed_by_mistake(used: Path) -> None:
    connection = sqlite3.connect(used / "ledger.db")
    for change in ("DELETE FROM entry", "UPDATE entry SET facts = '{}'"):
        with pytest.raises(sqlite3.IntegrityError, match="never"):
            connection.execute(change)
    connection.close()


def test_a_wrong_secret_is_refused(used: Path) -> None:
    with pytest.raises(LedgerError, match="made with another secret"):
        opened(used, secret=bytes(32))


def test_a_newer_file_is_refused(used: Path) -> None:
    with sqlite3.connect(used / "ledger.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LedgerError, match="a newer program wrote it"):
        opened(used)


def test_loose_permissions_are_refused(used: Path) -> None:
    (used / "ledger.db").chmod(0o644)
    with pytest.raises(SecretError, match="expected mode 600, found 644"):
        opened(used)


def test_a_full_disk_releases_nothing_and_loses_nothing(used: Path) -> None:
    ledger = opened(used)
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    reservation = None
    with pytest.raises(LedgerError, match="full"):
        for number in range(3, 500):
            reservation = reserve(ledger, number)
            ledger.record_release(reservation, b"x" * 5000)
    count = len(ledger.entries())
    ledger.close()
    with opened(used) as again:
        assert len(again.entries()) == count >= 3
        assert again.resume("r2") is not None


def test_a_read_only_disk_is_said(used: Path) -> None:
    ledger = opened(used)
    ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="readonly database"):
        reserve(ledger, 3)
    assert len(ledger.entries()) == 3
    ledger.close()


def test_a_folder_that_cannot_hold_a_ledger_is_said(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", HOSPITAL)
    with pytest.raises(LedgerError, match="cannot be opened for writing"):
        Ledger(tmp_path / "missing" / "ledger.db", secret=SECRET, log=log)


def test_a_clock_set_back_is_refused(tmp_path: Path) -> None:
    now = [datetime(2026, 5, 1, tzinfo=UTC)]
    log = AuditLog(tmp_path / "log", HOSPITAL, clock=lambda: now[0])
    ledger = Ledger(tmp_path / "ledger.db", secret=SECRET, log=log, clock=lambda: now[0])
    reserve(ledger, 0)
    now[0] -= timedelta(days=1)
    with pytest.raises(LedgerError, match=r"clock: .* set back"):
        reserve(ledger, 1)
    assert len(ledger.entries()) == 1
    ledger.close()


def test_an_audit_log_that_fails_stops_the_release(used: Path) -> None:
    ledger = opened(used)
    (used / "log").chmod(0o600)
    (used / "log").rename(used / "gone")
    (used / "log").mkdir()
    with pytest.raises(Exception, match="audit log cannot be opened"):
        reserve(ledger, 3)
    # The charge stands although nobody got the reservation.
    assert len(ledger.entries()) == 4
    ledger.close()


def test_stored_releases_are_encrypted(used: Path) -> None:
    content = (used / "ledger.db").read_bytes()
    assert b"release" * 3 not in content
