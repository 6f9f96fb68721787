"""Which patients share a history: cohorts as sets of atoms.

The ledger must know every patient's total although each release covers a whole cohort and cohorts
of different studies overlap. It keeps the coarsest partition of patients into *atoms* such that
every cohort is a union of atoms. A new cohort splits the atoms it cuts through; patients of one
atom have the same history, and their spend is computed once.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import DataError

_TAG_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """A set of patients known to the ledger. ``digest`` is keyed: it tells nothing to others."""

    id: int
    digest: str
    patients: int


def patient_tag(key: bytes, patient_id: str) -> bytes:
    """The keyed hash that stands for a patient: HMAC-SHA256, 128 bits."""
    return hmac.digest(key, normal_id(patient_id).encode(), "sha256")[:_TAG_BYTES]


def normal_id(patient_id: str) -> str:
    """One spelling per patient: no spaces around, one encoding per letter.

    Raises DataError for an empty id: it would merge patients.
    """
    name = unicodedata.normalize("NFC", patient_id).strip()
    if not name:
        raise DataError("patient id: expected a name or number, found an empty one")
    return name


def intern_cohort(connection: sqlite3.Connection, key: bytes, patient_ids: Iterable[str]) -> Cohort:
    """The cohort of these patients (repeated ids count once), added if it is new.

    Call inside a transaction. Raises DataError for an empty cohort.
    """
    tags = sorted({patient_tag(key, patient) for patient in patient_ids})
    if not tags:
        raise DataError("cohort: expected at least one patient, found none")
    digest = hashlib.sha256(b"".join(tags)).hexdigest()
    known = connection.execute("SELECT id FROM cohort WHERE digest = ?", (digest,)).fetchone()
    if known is None:
        known = (_add(connection, digest, tags),)
    return Cohort(id=known[0], digest=digest, patients=len(tags))


def groups(connection: sqlite3.Connection, cohort: int | None) -> dict[frozenset[int], int]:
    """How many patients have each history (a set of cohorts); of one cohort, or of all."""
    where = "WHERE a.id IN (SELECT atom FROM cohort_atom WHERE cohort = ?)" if cohort else ""
    rows = connection.execute(
        f"SELECT a.patients, group_concat(c.cohort) FROM atom a "  # noqa: S608 - constant text
        f"JOIN cohort_atom c ON c.atom = a.id {where} GROUP BY a.id",
        (cohort,) if cohort else (),
    )
    found: dict[frozenset[int], int] = {}
    for patients, cohorts in rows:
        history = frozenset(map(int, cohorts.split(",")))
        found[history] = found.get(history, 0) + patients
    return found


def is_consistent(connection: sqlite3.Connection) -> bool:
    """Whether every patient is in one atom and every cohort has as many patients as it had."""
    patients, atoms = connection.execute(
        "SELECT (SELECT count(*) FROM patient), (SELECT coalesce(sum(patients), 0) FROM atom)"
    ).fetchone()
    wrong = connection.execute(
        "SELECT count(*) FROM cohort WHERE patients != (SELECT coalesce(sum(a.patients), 0) "
        "FROM cohort_atom c JOIN atom a ON a.id = c.atom WHERE c.cohort = cohort.id)"
    ).fetchone()[0]
    return bool(patients == atoms and not wrong)


def _add(connection: sqlite3.Connection, digest: str, tags: list[bytes]) -> int:
    run = connection.execute
    cohort = run(
        "INSERT INTO cohort (digest, patients) VALUES (?, ?) RETURNING id", (digest, len(tags))
    ).fetchone()[0]
    run("CREATE TEMP TABLE incoming (tag BLOB PRIMARY KEY) WITHOUT ROWID")
    run("CREATE TEMP TABLE split (old INTEGER PRIMARY KEY, new INTEGER)")
    try:
        connection.executemany("INSERT INTO incoming VALUES (?)", ((tag,) for tag in tags))
        # Atom 0 is nobody's: it holds the new patients for a moment.
        run("INSERT OR IGNORE INTO patient SELECT tag, 0 FROM incoming")
        touched = run(
            "SELECT p.atom, count(*) FROM incoming JOIN patient p USING (tag) GROUP BY p.atom"
        ).fetchall()
        for old, count in touched:
            size = run("SELECT patients FROM atom WHERE id = ?", (old,)).fetchone()
            if size is not None and size[0] == count:
                run("INSERT INTO cohort_atom VALUES (?, ?)", (cohort, old))
                continue
            new = run("INSERT INTO atom (patients) VALUES (?) RETURNING id", (count,)).fetchone()[0]
            run("UPDATE atom SET patients = patients - ? WHERE id = ?", (count, old))
            run("INSERT INTO cohort_atom SELECT cohort, ? FROM cohort_atom WHERE atom = ?",
                (new, old))  # fmt: skip
            run("INSERT INTO cohort_atom VALUES (?, ?)", (cohort, new))
            run("INSERT INTO split VALUES (?, ?)", (old, new))
        run(
            "UPDATE patient SET atom = s.new FROM split s "
            "WHERE s.old = patient.atom AND patient.tag IN (SELECT tag FROM incoming)"
        )
    finally:
        run("DROP TABLE incoming")
        run("DROP TABLE split")
    return int(cohort)
