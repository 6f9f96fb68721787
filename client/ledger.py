"""The hospital's budget ledger: what every patient's privacy was spent on, and by whom.

A release goes through four durable states::

    reserve ──▶ (noise is drawn) ──▶ record_release ──▶ commit
      │ the budget is checked and charged in one transaction, synced to disk, and logged

The rules, in order of importance:

* A reservation is spent from the moment its transaction commits, whatever happens next. There is
  no refund: a reservation that fails inside its transaction leaves nothing to refund, and any
  other may have been used.
* The same request is answered with the same stored bytes, which reveals nothing new. A reservation
  whose release was never stored is lost; trying again is a new attempt, paid again.
* Two processes cannot overspend together: the check and the charge hold the database's write lock.
* Every operation is hash-chained, and its head is repeated in the audit log. A file that lags
  behind the log was rolled back, and is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from client.ledger_check import check_against_log, check_operations
from client.ledger_cohorts import Cohort, groups, intern_cohort, patient_tag
from client.ledger_journal import Journal
from client.ledger_records import (
    Entry,
    Reservation,
    StoredRelease,
    event_json,
    parse_charge,
    parse_entry,
)
from client.ledger_schema import connect, guarded, transaction
from client.spend import Charge, Limits, charged_events, refuse_overspending
from common.auditlog import AuditLog, Clock, Fact, canonical, utc_now
from common.errors import LedgerError
from common.privacy.accounting import GaussianEvent
from common.privacy.units import PrivacyUnit, Relation
from common.secretfiles import derive, seal, unseal

_LARGEST_RELEASE_BYTES = 900_000_000  # SQLite's own limit on one value is 10⁹


class Ledger:
    """An open ledger; use it from one thread. Several processes may open the same file.

    Close it before forking: a database connection does not survive that.
    """

    def __init__(
        self,
        path: Path,
        *,
        secret: bytes,
        log: AuditLog,
        clock: Clock = utc_now,
        on_step: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open or create the ledger at ``path`` and check it against the audit ``log``.

        ``secret``: the hospital's 32 bytes from which patients' hashes and the releases' key are
        derived. ``on_step`` is told the name of each step, so that tests can stop at any of them.

        Raises LedgerError when the file is damaged, missing, rolled back, or of another secret.
        """
        self.path = path
        self._on_step = on_step
        self._tag_key = derive(secret, "patient tags")
        self._release_key = derive(secret, "stored releases")
        self._histories: dict[int, tuple[int, list[frozenset[int]]]] = {}
        self._charges: dict[int, list[Charge]] = {}
        self._last_entry = 0
        if not path.exists() and log.latest("ledger_created") is not None:
            raise LedgerError(
                f"{path}: expected the ledger that the audit log speaks of, found no file; restore "
                f"the newest copy: starting anew would forget what patients have spent"
            )
        self._db = connect(path)
        try:
            self._journal = Journal(self._db, path, log=log, clock=clock)
            with guarded(path):
                self._journal.identify(secret)
                check_operations(self._db, path)
                check_against_log(self._db, path, self._journal.ledger, log)
            self._journal.publish()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def __enter__(self) -> Ledger:
        """Close at the end of a ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the file."""
        self.close()

    def cohort(self, patient_ids: Iterable[str]) -> Cohort:
        """The cohort of these patients, repeated ids counted once. Raises DataError if empty."""
        with self._writing():
            return intern_cohort(self._db, self._tag_key, patient_ids)

    def tag(self, patient_id: str) -> str:
        """The keyed hash under which the logs may mention a patient."""
        key = derive(self._tag_key, "patient names in logs")
        return hmac.digest(key, patient_tag(self._tag_key, patient_id), "sha256")[:16].hex()

    def reserve(
        self,
        *,
        study: str,
        study_digest: str,
        stage: str,
        round_number: int,
        attempt: int,
        request_digest: str,
        unit: PrivacyUnit,
        relation: Relation,
        records_per_patient: int,
        cohort: Cohort,
        events: Sequence[GaussianEvent],
        limits: Limits,
        adaptive: bool = False,
    ) -> Reservation:
        """Charge ``events`` to every patient of ``cohort``; durable and logged on return.

        ``request_digest`` names everything the release depends on; ``attempt`` tells apart tries
        whose release was lost (see ``next_attempt``). ``records_per_patient`` is the enforced
        maximum, which decides what a record-level release costs a patient. ``adaptive``: the
        events were chosen after earlier releases on these patients were seen.

        Raises RefusalError when a patient would exceed ``limits``, LedgerError when the request
        was already answered or the ledger cannot be written. Then nothing may be released.
        """
        if not events:
            raise LedgerError("reserve: expected at least one event; a release is never free")
        charged = charged_events(events, unit=unit, records_per_patient=records_per_patient)
        with self._writing():
            self._refuse_answered(request_digest, attempt)
            now = self._journal.now()
            charge = Charge(events=charged, relation=relation, adaptive=adaptive, time=now)
            for history in self._cohort_histories(cohort):
                charges = [one for each in history for one in self._charges.get(each, ())]
                refuse_overspending([*charges, charge], limits=limits, now=now)
            self._on_step("checked")
            facts: dict[str, Fact] = {
                "study": study,
                "study_digest": study_digest,
                "stage": stage,
                "round": round_number,
                "attempt": attempt,
                "request_digest": request_digest,
                "unit": unit.value,
                "relation": relation.value,
                "cohort": cohort.digest,
            }
            detail: dict[str, object] = {
                **facts,
                "adaptive": adaptive,
                "declared": [event_json(event) for event in events],
                "charged": [event_json(event) for event in charged],
                "time": now.isoformat(),
            }
            nonce = secrets.token_hex(16)
            text = canonical(detail).decode()
            entry = self._db.execute(
                "INSERT INTO entry (cohort, request_digest, attempt, nonce, facts) "
                "VALUES (?, ?, ?, ?, ?) RETURNING id",
                (cohort.id, request_digest, attempt, nonce, text),
            ).fetchone()[0]
            digest = hashlib.sha256(text.encode()).hexdigest()
            self._journal.append("reserved", entry, {**facts, "events_digest": digest}, now)
            self._on_step("reserved, not yet durable")
        self._on_step("reserved, not yet logged")
        self._journal.publish()
        self._on_step("reserved")
        return Reservation(
            entry=entry,
            request_digest=request_digest,
            attempt=attempt,
            cohort=cohort,
            nonce=nonce,
        )

    def record_release(self, reservation: Reservation, content: bytes) -> None:
        """Store the release, encrypted, before it leaves. Durable and logged on return.

        Raises LedgerError for a reservation that is not this ledger's or already has a release.
        """
        if len(content) > _LARGEST_RELEASE_BYTES:
            raise LedgerError(
                f"release: expected at most {_LARGEST_RELEASE_BYTES} bytes, found {len(content)}"
            )
        digest = hashlib.sha256(content).hexdigest()
        with self._writing():
            self._check_reservation(reservation)
            if self._release_row(reservation.entry) is not None:
                raise LedgerError(
                    f"entry {reservation.entry}: its release is already stored; resume it instead"
                )
            sealed = seal(self._release_key, content, self._context(reservation.entry))
            self._db.execute(
                "INSERT INTO release VALUES (?, ?, ?)", (reservation.entry, digest, sealed)
            )
            facts: dict[str, Fact] = {
                "request_digest": reservation.request_digest,
                "release_digest": digest,
                "release_bytes": len(content),
            }
            self._journal.append("released", reservation.entry, facts, self._journal.now())
            self._on_step("released, not yet durable")
        self._on_step("released, not yet logged")
        self._journal.publish()
        self._on_step("released")

    def commit(self, reservation: Reservation) -> None:
        """Note that the release was handed over. Committing again changes nothing.

        Raises LedgerError when nothing was released under this reservation.
        """
        with self._writing():
            self._check_reservation(reservation)
            stored = self._release_row(reservation.entry)
            if stored is None:
                raise LedgerError(
                    f"entry {reservation.entry}: expected a stored release before its commit"
                )
            if self._is_committed(reservation.entry):
                return
            facts = {"request_digest": reservation.request_digest, "release_digest": stored[0]}
            self._journal.append("committed", reservation.entry, facts, self._journal.now())
            self._on_step("committed, not yet durable")
        self._on_step("committed, not yet logged")
        self._journal.publish()
        self._on_step("committed")

    def resume(self, request_digest: str) -> StoredRelease | None:
        """The release this very request was answered with, or None if there is none stored.

        Raises LedgerError when the stored bytes were pruned or damaged.
        """
        with guarded(self.path):
            row = self._db.execute(
                "SELECT e.id, e.attempt, e.nonce, c.id, c.digest, c.patients, r.digest, r.sealed "
                "FROM entry e JOIN release r ON r.entry = e.id JOIN cohort c ON c.id = e.cohort "
                "WHERE e.request_digest = ? ORDER BY e.id LIMIT 1",
                (request_digest,),
            ).fetchone()
            if row is None:
                return None
            entry, attempt, nonce, cohort, cohort_digest, patients, digest, sealed = row
            if sealed is None:
                raise LedgerError(
                    f"entry {entry}: this request was answered, and its stored release was pruned; "
                    f"make a new request"
                )
            content = unseal(self._release_key, sealed, self._context(entry))
            if hashlib.sha256(content).hexdigest() != digest:
                raise LedgerError(f"entry {entry}: the stored release is damaged; restore a copy")
            return StoredRelease(
                reservation=Reservation(
                    entry=entry,
                    request_digest=request_digest,
                    attempt=attempt,
                    cohort=Cohort(id=cohort, digest=cohort_digest, patients=patients),
                    nonce=nonce,
                ),
                content=content,
                is_committed=self._is_committed(entry),
            )

    def next_attempt(self, request_digest: str) -> int:
        """The number a new attempt at this request must carry: 0 for the first."""
        with guarded(self.path):
            found = self._db.execute(
                "SELECT coalesce(max(attempt) + 1, 0) FROM entry WHERE request_digest = ?",
                (request_digest,),
            ).fetchone()
        return int(found[0])

    def prune(self, before: datetime) -> int:
        """Forget the stored bytes of releases committed before a time; the charges stay.

        Returns how many were forgotten. Such a request can no longer be resumed.
        """
        with self._writing():
            return self._db.execute(
                "UPDATE release SET sealed = NULL WHERE sealed IS NOT NULL AND entry IN "
                "(SELECT entry FROM operation WHERE kind = 'committed' AND time < ?)",
                (before.astimezone(UTC).isoformat(timespec="microseconds"),),
            ).rowcount

    def entries(self) -> list[Entry]:
        """Every charge, oldest first."""
        with guarded(self.path):
            rows = self._db.execute(
                "SELECT id, cohort, facts, (SELECT kind FROM operation WHERE entry = entry.id "
                "ORDER BY seq DESC LIMIT 1) FROM entry ORDER BY id"
            ).fetchall()
        return [parse_entry(*row) for row in rows]

    def cohorts(self) -> list[Cohort]:
        """Every cohort that was ever charged or asked about."""
        with guarded(self.path):
            rows = self._db.execute("SELECT id, digest, patients FROM cohort ORDER BY id")
            return [Cohort(id=row[0], digest=row[1], patients=row[2]) for row in rows]

    def patient_groups(self, cohort: Cohort | None = None) -> dict[frozenset[int], int]:
        """How many patients have each history (ids of cohorts they were in)."""
        with guarded(self.path):
            return groups(self._db, cohort.id if cohort else None)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A write transaction over an up-to-date view."""
        with guarded(self.path), transaction(self._db):
            self._refresh()
            yield

    def _refresh(self) -> None:
        """Take in what other processes charged since; entries never change afterwards."""
        for entry, cohort, facts in self._db.execute(
            "SELECT id, cohort, facts FROM entry WHERE id > ? ORDER BY id", (self._last_entry,)
        ):
            self._charges.setdefault(cohort, []).append(parse_charge(json.loads(facts)))
            self._last_entry = entry

    def _cohort_histories(self, cohort: Cohort) -> list[frozenset[int]]:
        """The distinct histories in a cohort; one contained in another costs less, and is left out.

        Cached until a new cohort splits the patients further.
        """
        newest = self._db.execute("SELECT max(id) FROM cohort").fetchone()[0]
        known = self._histories.get(cohort.id)
        if known is None or known[0] != newest:
            row = self._db.execute(
                "SELECT patients FROM cohort WHERE id = ? AND digest = ?",
                (cohort.id, cohort.digest),
            ).fetchone()
            if row is None:
                raise LedgerError("cohort: expected one of this ledger's; call `cohort` again")
            known = (newest, list(groups(self._db, cohort.id)))
            self._histories[cohort.id] = known
        charged = {frozenset(each for each in one if each in self._charges) for one in known[1]}
        largest: list[frozenset[int]] = []
        for one in sorted(charged, key=len, reverse=True):
            if not any(one < other for other in largest[:256]):
                largest.append(one)
        return largest

    def _refuse_answered(self, request_digest: str, attempt: int) -> None:
        rows = self._db.execute(
            "SELECT e.id, e.attempt, r.entry FROM entry e LEFT JOIN release r ON r.entry = e.id "
            "WHERE e.request_digest = ?",
            (request_digest,),
        ).fetchall()
        for entry, tried, released in rows:
            if released is not None:
                raise LedgerError(
                    f"entry {entry}: this request was already answered; resume it: the same bytes "
                    f"cost nothing"
                )
            if tried == attempt:
                raise LedgerError(
                    f"entry {entry}: attempt {attempt} of this request was reserved before, and "
                    f"counts as spent; a new try is attempt {max(row[1] for row in rows) + 1}"
                )

    def _check_reservation(self, reservation: Reservation) -> None:
        row = self._db.execute(
            "SELECT nonce FROM entry WHERE id = ? AND request_digest = ?",
            (reservation.entry, reservation.request_digest),
        ).fetchone()
        if row is None or not hmac.compare_digest(row[0], reservation.nonce):
            raise LedgerError(
                f"entry {reservation.entry}: expected a reservation made by this ledger"
            )

    def _release_row(self, entry: int) -> tuple[str] | None:
        row: tuple[str] | None = self._db.execute(
            "SELECT digest FROM release WHERE entry = ?", (entry,)
        ).fetchone()
        return row

    def _is_committed(self, entry: int) -> bool:
        return (
            self._db.execute(
                "SELECT 1 FROM operation WHERE entry = ? AND kind = 'committed'", (entry,)
            ).fetchone()
            is not None
        )

    def _context(self, entry: int) -> bytes:
        return f"{self._journal.ledger} {entry}".encode()
