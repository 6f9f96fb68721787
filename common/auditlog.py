"""The audit log: what happened, in order, in a form that cannot be quietly changed.

One JSON object a line, in canonical form: sequence number, time, kind, facts, the SHA-256 of the
line before, and an Ed25519 signature over all of it. Any edit, deletion or reordering breaks the
chain; a cut end is found by comparing with a checkpoint that the coordinator countersigned
(``common.checkpoint``) or with the ledger, which remembers the log's head.

A record is acknowledged only once it is on disk, newline included. A last line without newline
was therefore never acknowledged: opening the log for writing removes it and says so in a record.

The log holds hashes, counts and names of studies, never patient data: each kind admits only the
facts listed in ``FACTS``, and texts are short. The coordinator keeps one of its own.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from common.errors import AuditError, SignatureError
from common.identity import Identity, PublicIdentity

Clock = Callable[[], datetime]
Fact = str | int | float | bool | None | Sequence[str]

PURPOSE = "audit record"
START = hashlib.sha256(b"consilium-audit-log-v1").hexdigest()
# Clocks are nudged by seconds in normal operation; more than this is somebody's hand.
CLOCK_SLACK = timedelta(seconds=5)

_LEDGER = frozenset({"ledger", "ledger_seq", "ledger_head", "entry"})
_ROUND = frozenset({"study", "study_digest", "stage", "round", "attempt", "request_digest"})
_ANSWER = frozenset({"study", "study_digest", "offer", "answer", "coordinator", "peers"})
FACTS: Mapping[str, frozenset[str]] = {
    "opened": frozenset({"hospital", "nonce"}),
    "study_seen": _ROUND | {"coordinator"},
    "refused": _ROUND | {"rule", "reason"},
    "ledger_created": _LEDGER,
    "reserved": _LEDGER | _ROUND | {"unit", "relation", "cohort", "events_digest"},
    "released": _LEDGER | {"request_digest", "release_digest", "release_bytes"},
    "committed": _LEDGER | {"request_digest", "release_digest"},
    "policy_changed": frozenset({"policy_digest", "previous_digest"}),
    "consent_applied": frozenset({"withdrawn", "list_digest", "patients", "study", "round"}),
    "key_used": frozenset({"purpose", "fingerprint"}),
    "study_approved": _ANSWER,
    "study_refused": _ANSWER | {"reason"},
    "checkpoint": frozenset({"checkpoint_seq", "checkpoint_head", "coordinator"}),
    "tail_repaired": frozenset({"removed_bytes", "removed_digest"}),
} | {
    # The coordinator's. ``actor``: the name of the token, the hospital, or the service itself.
    "code_issued": frozenset({"name", "expires_at", "actor"}),
    "hospital_joined": frozenset({"name", "identity", "key_digest", "actor"}),
    "certificate_issued": frozenset({"name", "serial", "not_after", "key_digest", "actor"}),
    "certificates_superseded": frozenset({"name", "serials", "actor"}),
    "hospital_revoked": frozenset({"name", "actor"}),
    "server_certificate": frozenset({"serial", "actor"}),
    "study_submitted": frozenset({"study", "study_digest", "offer", "hospitals", "actor"}),
    "offer_answered": frozenset({"study", "study_digest", "offer", "name", "decision", "actor"}),
    "study_state": frozenset({"study", "study_digest", "state", "reason", "hospitals", "actor"}),
    "token_created": frozenset({"name", "role", "actor"}),
    "token_revoked": frozenset({"name", "actor"}),
}
_LONGEST_TEXT = 400


@dataclass(frozen=True, kw_only=True)
class Record:
    """One verified line. ``head`` is the SHA-256 of the line itself."""

    seq: int
    time: datetime
    kind: str
    facts: Mapping[str, Any]
    head: str


def canonical(value: object) -> bytes:
    """The one JSON text of ``value``: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def utc_now() -> datetime:
    """The clock of every real hospital."""
    return datetime.now(UTC)


class AuditLog:
    """An open log. Several processes may append to one file: a file lock orders them."""

    def __init__(self, path: Path, identity: Identity, clock: Clock = utc_now) -> None:
        """Open or create ``path``, check its chain and last signature, repair a torn end.

        Raises AuditError when the log is damaged or cannot be written.
        """
        self.path = path
        self._identity = identity
        self._clock = clock
        self._size = 0
        self._last: Record | None = None
        self._latest: dict[str, Record] = {}
        self._latest_on: dict[tuple[str, str], Record] = {}
        self.log_id = ""
        self.refresh()

    @property
    def head(self) -> tuple[int, str]:
        """Sequence number and hash of the last record this process has seen."""
        if self._last is None:
            raise RuntimeError("an opened log has a first record")
        return self._last.seq, self._last.head

    def latest(self, kind: str) -> Record | None:
        """The newest record of ``kind`` this process has seen."""
        return self._latest.get(kind)

    def latest_on(self, study_digest: str, kinds: Sequence[str]) -> Record | None:
        """The newest record of one of ``kinds`` on a study that this process has seen."""
        found = [self._latest_on.get((kind, study_digest)) for kind in kinds]
        return max((one for one in found if one), key=lambda one: one.seq, default=None)

    def refresh(self) -> None:
        """See what other processes have appended since."""
        with self.exclusive():
            pass

    def append(self, kind: str, facts: Mapping[str, Fact]) -> Record:
        """Add one record; it is on disk when this returns. Raises AuditError otherwise."""
        with self.exclusive() as tail:
            return tail([(kind, facts)])[-1]

    @contextmanager
    def exclusive(
        self,
    ) -> Iterator[Callable[[Sequence[tuple[str, Mapping[str, Fact]]]], list[Record]]]:
        """Hold the log's lock with an up-to-date view; the value given appends records."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise AuditError(
                f"{self.path}: the audit log cannot be opened ({error.strerror}); "
                f"nothing is released without it"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._catch_up(descriptor)
            yield lambda records: self._write(descriptor, records)
        finally:
            os.close(descriptor)

    def records(self) -> Iterator[Record]:
        """Every record, chain-checked, without the signatures (the last one's covers them)."""
        content = self.path.read_bytes()
        # Another process may be in the middle of its line.
        for record, _ in _parse(self.path, content[: content.rfind(b"\n") + 1], None, None):
            yield record

    def _catch_up(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size < self._size:
            raise AuditError(
                f"{self.path}: expected at least {self._size} bytes, found {size}: the log was "
                f"cut while in use; restore it and run `consilium hospital log verify`"
            )
        if size > self._size:
            fresh = os.pread(descriptor, size - self._size, self._size)
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._absorb(whole)
            if torn := fresh[len(whole) :]:
                self._repair(descriptor, torn)
        if self._last is None:
            facts = {"hospital": self._identity.public.fingerprint, "nonce": os.urandom(16).hex()}
            self._write(descriptor, [("opened", facts)])
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def _absorb(self, lines: bytes) -> None:
        signed: tuple[bytes, bytes] | None = None
        for record, signature in _parse(self.path, lines, self._last, None):
            signed = signature
            self._last = record
            self._remember(record)
        if signed is not None and self._last is not None:
            _check_signature(self.path, self._last.seq, signed, self._identity.public)
        self._size += len(lines)

    def _repair(self, descriptor: int, torn: bytes) -> None:
        """Remove a line that was never acknowledged, and record that."""
        os.ftruncate(descriptor, self._size)
        os.fsync(descriptor)
        digest = hashlib.sha256(torn).hexdigest()
        facts: Mapping[str, Fact] = {"removed_bytes": len(torn), "removed_digest": digest}
        if self._last is None:
            return  # The very first line was torn: the log starts anew.
        self._write(descriptor, [("tail_repaired", facts)])

    def _write(
        self, descriptor: int, records: Sequence[tuple[str, Mapping[str, Fact]]]
    ) -> list[Record]:
        lines, written, last = b"", [], self._last
        for kind, facts in records:
            line, last = self._line(kind, facts, last)
            lines += line
            written.append(last)
        try:
            view = memoryview(lines)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        except OSError as error:
            # Not acknowledged, so it may go; if even that fails, the next opening repairs it.
            with suppress(OSError):
                os.ftruncate(descriptor, self._size)
            raise AuditError(
                f"{self.path}: the audit log cannot be written ({error.strerror}); nothing is "
                f"released without it: free space or repair the disk"
            ) from None
        self._size += len(lines)
        self._last = last
        for record in written:
            self._remember(record)
        return written

    def _remember(self, record: Record) -> None:
        self._latest[record.kind] = record
        self._latest_on[record.kind, str(record.facts.get("study_digest", ""))] = record
        self.log_id = self.log_id or record.head

    def _line(
        self, kind: str, facts: Mapping[str, Fact], last: Record | None
    ) -> tuple[bytes, Record]:
        _check_facts(kind, facts)
        now = self._clock().astimezone(UTC)
        if last is not None and now < last.time:
            if now < last.time - CLOCK_SLACK:
                raise AuditError(
                    f"clock: expected a time after the last record's, {_stamp(last.time)}, found "
                    f"{_stamp(now)}: it was set back; correct it"
                )
            now = last.time
        body: dict[str, Any] = {
            "seq": last.seq + 1 if last else 0,
            "time": _stamp(now),
            "kind": kind,
            "facts": dict(facts),
            "prev": last.head if last else START,
        }
        signature = self._identity.sign(canonical(body), purpose=PURPOSE)
        body["sig"] = base64.b64encode(signature).decode()
        line = canonical(body) + b"\n"
        record = Record(
            seq=body["seq"],
            time=datetime.fromisoformat(body["time"]),
            kind=kind,
            facts=body["facts"],
            head=hashlib.sha256(line).hexdigest(),
        )
        return line, record


def read_records(path: Path) -> Iterator[Record]:
    """Every record of a log, chain-checked but not authenticated; needs no key."""
    for record, _ in _parse(path, _content(path), None, None):
        yield record


def verify_log(path: Path, hospital: PublicIdentity) -> list[str]:
    """Check every line and signature; the heads of all records, in order.

    Raises AuditError naming the first line that was edited, moved, removed or left unfinished.
    """
    heads = [record.head for record, _ in _parse(path, _content(path), None, hospital)]
    if not heads:
        raise AuditError(f"{path}: expected at least one record, found none: the log was emptied")
    return heads


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(
    path: Path, content: bytes, last: Record | None, hospital: PublicIdentity | None
) -> Iterator[tuple[Record, tuple[bytes, bytes]]]:
    """Each record with (signed bytes, signature); the signature is checked if ``hospital``."""
    for line in content.splitlines(keepends=True):
        number = last.seq + 2 if last else 1

        def broken(why: str, number: int = number) -> AuditError:
            return AuditError(
                f"{path}: line {number}: {why}; restore the log from a copy and find out who "
                f"changed it"
            )

        if not line.endswith(b"\n"):
            raise AuditError(
                f"{path}: line {number}: expected a newline at its end: a write was interrupted; "
                f"starting the hospital's program repairs this and records it"
            )
        try:
            body = json.loads(line)
            if canonical(body) + b"\n" != line:
                raise broken("expected canonical JSON, found another spelling: it was edited")
            signature = base64.b64decode(body.pop("sig"), validate=True)
            time = datetime.fromisoformat(body["time"])
            seq, kind, facts, previous = body["seq"], body["kind"], body["facts"], body["prev"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise broken("expected a record, found something else: it was edited") from None
        if seq != number - 1 or previous != (last.head if last else START):
            raise broken(
                f"expected record {number - 1} following the line before, found record {seq}: "
                f"lines were changed, removed or reordered"
            )
        signed = (canonical(body), signature)
        if hospital is not None:
            _check_signature(path, seq, signed, hospital)
        if last is not None and time < last.time:
            raise broken("expected a time not before the line before")
        last = Record(
            seq=seq, time=time, kind=kind, facts=facts, head=hashlib.sha256(line).hexdigest()
        )
        yield last, signed


def _check_signature(
    path: Path, seq: int, signed: tuple[bytes, bytes], hospital: PublicIdentity
) -> None:
    try:
        hospital.verify(signed[0], signed[1], purpose=PURPOSE)
    except SignatureError:
        raise AuditError(
            f"{path}: line {seq + 1}: expected a signature by this hospital's key "
            f"{hospital.fingerprint[:16]}…, found another; the line was changed or forged"
        ) from None


def _check_facts(kind: str, facts: Mapping[str, Fact]) -> None:
    """What may be written is fixed here, so that no caller lets a patient's value slip in."""
    if kind not in FACTS or not facts.keys() <= FACTS[kind]:
        raise ValueError(f"audit record {kind!r} may not hold {sorted(facts)}")
    for name, fact in facts.items():
        texts = [fact] if isinstance(fact, str) else fact
        if isinstance(texts, Sequence) and any(len(text) > _LONGEST_TEXT for text in texts):
            raise ValueError(f"audit fact {name!r} is longer than {_LONGEST_TEXT} characters")


def _stamp(time: datetime) -> str:
    return time.isoformat(timespec="microseconds")
