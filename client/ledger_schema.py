"""The ledger's tables, and how an older file becomes a current one."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import LedgerError
from common.secretfiles import check_private

_BUSY_TIMEOUT_S = 30.0

# Migration i brings a file from version i to i + 1. Never edit one that was shipped: add another.
_MIGRATIONS = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    -- A patient is a keyed hash. An atom is a set of patients who were in exactly the same cohorts,
    -- so a round over a million patients is one row, not a million.
    CREATE TABLE patient (tag BLOB PRIMARY KEY, atom INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE atom (id INTEGER PRIMARY KEY, patients INTEGER NOT NULL) STRICT;
    CREATE TABLE cohort (
        id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, patients INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE cohort_atom (
        cohort INTEGER NOT NULL REFERENCES cohort, atom INTEGER NOT NULL REFERENCES atom,
        PRIMARY KEY (cohort, atom)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX atom_cohort ON cohort_atom (atom, cohort);
    CREATE TABLE entry (
        id INTEGER PRIMARY KEY, cohort INTEGER NOT NULL REFERENCES cohort,
        request_digest TEXT NOT NULL, attempt INTEGER NOT NULL, nonce TEXT NOT NULL,
        facts TEXT NOT NULL, UNIQUE (request_digest, attempt)
    ) STRICT;
    CREATE TABLE release (
        entry INTEGER PRIMARY KEY REFERENCES entry, digest TEXT NOT NULL, sealed BLOB
    ) STRICT;
    -- Everything that ever happened to the ledger, hash-chained; the audit log repeats the heads.
    CREATE TABLE operation (
        seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, entry INTEGER, facts TEXT NOT NULL,
        time TEXT NOT NULL, log_seq INTEGER NOT NULL, log_head TEXT NOT NULL, head TEXT NOT NULL
    ) STRICT;
    CREATE INDEX entry_operation ON operation (entry, kind);
    CREATE TRIGGER entry_is_final BEFORE UPDATE ON entry
        BEGIN SELECT RAISE(ABORT, 'an entry never changes'); END;
    CREATE TRIGGER entry_stays BEFORE DELETE ON entry
        BEGIN SELECT RAISE(ABORT, 'an entry is never removed'); END;
    """,
)


def connect(path: Path) -> sqlite3.Connection:
    """Open or create the file, checked and at the current version, durable at every commit.

    Raises LedgerError when it is damaged, written by a newer program, or cannot be written.
    """
    with guarded(path):
        try:
            # Only ever to create it: closing any handle of an open database file would drop the
            # locks that this process holds on it (sqlite.org/howtocorrupt.html, section 2.2).
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            pass
        except OSError as error:
            raise LedgerError(
                f"{path}: the ledger cannot be opened for writing ({error.strerror}); nothing is "
                f"released without it"
            ) from None
        check_private(path)
        connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # FULL makes a commit wait for the disk: noise is drawn only after that.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise LedgerError(
                    f"{path}: the ledger is damaged ({found}); move it away, restore the newest "
                    f"copy, and do not release anything meanwhile"
                )
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, with the write lock taken at once: what was read cannot change."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn the database's errors into one line for the operator."""
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerError(
            f"{path}: the ledger cannot be used ({error}); nothing is released without it: free "
            f"space, repair the disk, or restore the newest copy"
        ) from error


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(_MIGRATIONS):
        raise LedgerError(
            f"{path}: expected version {len(_MIGRATIONS)} or older, found {version}: a newer "
            f"program wrote it; use that one"
        )
    for number in range(version, len(_MIGRATIONS)):
        with transaction(connection):
            # Another process may have been faster.
            if connection.execute("PRAGMA user_version").fetchone()[0] > number:
                continue
            for statement in _statements(_MIGRATIONS[number]):
                connection.execute(statement)
            # The version is part of the same transaction.
            connection.execute(f"PRAGMA user_version = {number + 1}")


def _statements(script: str) -> Iterator[str]:
    """One by one: ``executescript`` would commit the transaction first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
