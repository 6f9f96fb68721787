"""Is this the ledger it was? The chain of its operations, and the audit log's memory of them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

from client.ledger_cohorts import is_consistent
from common.auditlog import AuditLog, canonical
from common.errors import LedgerError


def operation_head(
    previous: str,
    seq: int,
    kind: str,
    entry: int | None,
    facts: str,
    time: str,
    log_seq: int,
    log_head: str,
) -> str:
    """The hash that chains one operation to the one before."""
    link = canonical([previous, seq, kind, entry, facts, time, log_seq, log_head])
    return hashlib.sha256(link).hexdigest()


def check_operations(connection: sqlite3.Connection, path: Path) -> None:
    """Raise LedgerError unless every operation follows from the one before and every entry and
    cohort is as it was when charged.
    """
    previous, expected, reserved = "", 0, 0
    rows = connection.execute(
        "SELECT seq, kind, entry, o.facts, time, log_seq, log_head, head, e.facts, c.digest "
        "FROM operation o LEFT JOIN entry e ON e.id = o.entry AND o.kind = 'reserved' "
        "LEFT JOIN cohort c ON c.id = e.cohort ORDER BY seq"
    )
    for seq, kind, entry, facts, time, log_seq, log_head, head, detail, cohort in rows:
        chained = operation_head(previous, seq, kind, entry, facts, time, log_seq, log_head)
        if seq != expected or chained != head:
            raise _damaged(path, f"operation {expected} is not the one that was written")
        if kind == "reserved":
            reserved += 1
            digest = hashlib.sha256((detail or "").encode()).hexdigest()
            charged = json.loads(facts)
            if (charged["events_digest"], charged["cohort"]) != (digest, cohort):
                raise _damaged(path, f"entry {entry} is not the one that was charged")
        previous, expected = head, expected + 1
    if connection.execute("SELECT count(*) FROM entry").fetchone()[0] != reserved:
        raise _damaged(path, "there are entries that were never charged")
    if not is_consistent(connection):
        raise _damaged(path, "patients are missing from a cohort that was charged")


def check_against_log(
    connection: sqlite3.Connection, path: Path, ledger: str, log: AuditLog
) -> None:
    """Raise LedgerError when ledger and audit log do not tell the same story.

    The log repeats the head of every operation, so an older or different file is found; the ledger
    remembers the log's head at every operation, so a shortened log is found too.
    """
    # Other processes may be at work: what the ledger remembers of the log is read before the log,
    # and the log before the ledger's own heads, so that each is at most ahead where it may be.
    remembered = connection.execute("SELECT log_seq, log_head FROM operation").fetchall()
    records = list(log.records())
    heads = dict(connection.execute("SELECT seq, head FROM operation"))
    log_heads: list[str] = []
    for record in records:
        log_heads.append(record.head)
        if "ledger_seq" not in record.facts:
            continue
        seq = record.facts["ledger_seq"]
        if record.facts["ledger"] != ledger or (
            seq in heads and heads[seq] != record.facts["ledger_head"]
        ):
            raise LedgerError(
                f"{path}: expected the ledger of audit record {record.seq}, found another one; "
                f"restore the ledger that belongs to this log"
            )
        if seq not in heads:
            raise LedgerError(
                f"{path}: was rolled back: the audit log knows operation {seq}, this file ends at "
                f"{max(heads, default=-1)}; it is an old copy, and what patients spent since would "
                f"be forgotten: restore the newest one"
            )
    for log_seq, log_head in remembered:
        if log_seq >= len(log_heads) or log_heads[log_seq] != log_head:
            raise LedgerError(
                f"{path}: the audit log was cut or replaced: the ledger remembers its record "
                f"{log_seq}, the log has {len(log_heads)} records without it; restore the log"
            )


def _damaged(path: Path, why: str) -> LedgerError:
    return LedgerError(
        f"{path}: the ledger was changed from outside: {why}; move it away, restore the newest "
        f"copy, and find out who changed it"
    )
