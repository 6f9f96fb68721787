"""The ledger's journal: a hash chain of all its operations, repeated in the audit log."""

from __future__ import annotations

import hmac
import json
import secrets
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from client.ledger_check import operation_head
from client.ledger_schema import guarded, transaction
from common.auditlog import CLOCK_SLACK, AuditLog, Clock, Fact, canonical
from common.errors import LedgerError
from common.secretfiles import derive

_LOGGED = ("ledger_created", "reserved", "released", "committed")


class Journal:
    """Appends inside the ledger's transactions; publishes after them."""

    def __init__(
        self, connection: sqlite3.Connection, path: Path, *, log: AuditLog, clock: Clock
    ) -> None:
        """``connection``: the open ledger at ``path``."""
        self._db = connection
        self._path = path
        self._log = log
        self._clock = clock
        self.ledger = ""

    def append(
        self, kind: str, entry: int | None, facts: Mapping[str, Fact], now: datetime
    ) -> None:
        """Append to the hash chain, together with the audit log's head as last seen."""
        last = self._db.execute(
            "SELECT seq, head FROM operation ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        seq, previous = (last[0] + 1, last[1]) if last else (0, "")
        log_seq, log_head = self._log.head
        text, time = canonical(dict(facts)).decode(), now.isoformat(timespec="microseconds")
        head = operation_head(previous, seq, kind, entry, text, time, log_seq, log_head)
        self._db.execute(
            "INSERT INTO operation VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (seq, kind, entry, text, time, log_seq, log_head, head),
        )

    def publish(self) -> None:
        """Repeat in the audit log every operation it lacks, in order, whoever made it.

        The database comes first: a crash in between leaves it ahead, which under-counts nothing,
        and the next process to come by publishes the rest. A log that is ahead means a rollback.
        """
        with guarded(self._path), self._log.exclusive() as append:
            records_of_ours = [self._log.latest(kind) for kind in _LOGGED]
            published = max(
                (int(record.facts["ledger_seq"]) for record in records_of_ours if record),
                default=-1,
            )
            if published > self._db.execute("SELECT max(seq) FROM operation").fetchone()[0]:
                raise LedgerError(
                    f"{self._path}: the audit log is ahead of this file: it was rolled back or "
                    f"replaced while in use; restart with the newest copy"
                )
            rows = self._db.execute(
                "SELECT seq, kind, entry, facts, head FROM operation WHERE seq > ? ORDER BY seq",
                (published,),
            ).fetchall()
            records: list[tuple[str, Mapping[str, Fact]]] = []
            for seq, kind, entry, facts, head in rows:
                place = {"ledger": self.ledger, "ledger_seq": seq, "ledger_head": head}
                records.append((kind, {**json.loads(facts), **place, "entry": entry}))
            if records:
                append(records)

    def identify(self, secret: bytes) -> None:
        """The ledger's identity; a new file gets one, an old one must be of this secret and log."""
        check = hmac.digest(derive(secret, "ledger check"), b"ledger", "sha256").hex()
        with transaction(self._db):
            meta = dict(self._db.execute("SELECT name, value FROM meta"))
            if not meta:
                if self._log.latest("ledger_created") is not None:
                    raise LedgerError(
                        f"{self._path}: expected the ledger that the audit log speaks of, found an "
                        f"empty one; restore the newest copy"
                    )
                meta = {"ledger": secrets.token_hex(16), "log": self._log.log_id, "check": check}
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                self.append("ledger_created", None, {}, self.now())
        if meta.get("check") != check:
            raise LedgerError(
                f"{self._path}: was made with another secret: under this one its patients would "
                f"look like strangers with nothing spent; use the secret it was created with"
            )
        if meta.get("log") != self._log.log_id:
            raise LedgerError(
                f"{self._path}: expected the audit log it was started with, found another one; "
                f"restore the right log"
            )
        self.ledger = str(meta["ledger"])

    def now(self) -> datetime:
        """The time, never before the last operation. Raises LedgerError if it was set back."""
        now = self._clock().astimezone(UTC)
        row = self._db.execute("SELECT time FROM operation ORDER BY seq DESC LIMIT 1").fetchone()
        if row is None:
            return now
        last = datetime.fromisoformat(row[0])
        if now < last - CLOCK_SLACK:
            raise LedgerError(
                f"clock: expected a time after the ledger's last entry, {last:%Y-%m-%d %H:%M:%S} "
                f"UTC, found {now:%Y-%m-%d %H:%M:%S}: it was set back; correct it"
            )
        return max(now, last)
