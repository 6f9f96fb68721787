"""Checkpoints of the audit log: the defence against a cut end.

A hospital could drop the newest lines of its own log without breaking the chain. So it signs the
head from time to time, the coordinator countersigns it and keeps a copy, and verification demands
that the log still contains every countersigned head.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.auditlog import AuditLog, canonical, verify_log
from common.errors import AuditError
from common.identity import Identity, PublicIdentity

_PURPOSE = "audit checkpoint"
_COUNTER_PURPOSE = "audit checkpoint countersignature"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A log's head: record ``seq`` has hash ``head``. Signatures are base64."""

    log_id: str
    seq: int
    head: str
    hospital: str
    signature: str
    coordinator: str = ""
    countersignature: str = ""

    def text(self) -> str:
        """One line of JSON, for a message or a file."""
        return canonical(asdict(self)).decode()

    @classmethod
    def from_text(cls, text: str) -> Checkpoint:
        """Parse ``text``; raises AuditError for anything else."""
        try:
            fields = json.loads(text)
            if type(fields["seq"]) is not int or not all(
                isinstance(value, str) for name, value in fields.items() if name != "seq"
            ):
                raise TypeError
            return cls(**fields)
        except (ValueError, KeyError, TypeError):
            raise AuditError(
                "checkpoint: expected the JSON line of `consilium hospital log checkpoint`"
            ) from None

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file of ``text``."""
        try:
            return cls.from_text(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise AuditError(f"{path}: no checkpoint can be read ({error})") from None

    def signed_bytes(self) -> bytes:
        """What the hospital signs."""
        return canonical([self.log_id, self.seq, self.head, self.hospital])


def make_checkpoint(log: AuditLog, hospital: Identity) -> Checkpoint:
    """The log's present head, signed by the hospital."""
    with log.exclusive():
        seq, head = log.head
    unsigned = Checkpoint(
        log_id=log.log_id, seq=seq, head=head, hospital=hospital.public.fingerprint, signature=""
    )
    signature = hospital.sign(unsigned.signed_bytes(), purpose=_PURPOSE)
    return replace(unsigned, signature=base64.b64encode(signature).decode())


def countersign(
    checkpoint: Checkpoint,
    *,
    coordinator: Identity,
    hospital: PublicIdentity,
    previous: Checkpoint | None,
) -> Checkpoint:
    """The coordinator's signature on a checkpoint that extends the ``previous`` one.

    Raises SignatureError for a checkpoint that is not the hospital's, AuditError for one that goes
    back or belongs to another log: the hospital's log was cut or replaced.
    """
    _check_hospital(checkpoint, hospital)
    if previous is not None and (
        checkpoint.log_id != previous.log_id
        or checkpoint.seq < previous.seq
        or (checkpoint.seq == previous.seq and checkpoint.head != previous.head)
    ):
        raise AuditError(
            f"checkpoint: expected one at or after record {previous.seq} of log "
            f"{previous.log_id[:16]}…, found record {checkpoint.seq} of "
            f"{checkpoint.log_id[:16]}…: the hospital's log was cut, changed or replaced"
        )
    message = canonical([checkpoint.signed_bytes().decode(), checkpoint.signature])
    signature = coordinator.sign(message, purpose=_COUNTER_PURPOSE)
    return replace(
        checkpoint,
        coordinator=coordinator.public.fingerprint,
        countersignature=base64.b64encode(signature).decode(),
    )


def verify_checkpoint(
    checkpoint: Checkpoint, *, hospital: PublicIdentity, coordinator: PublicIdentity
) -> None:
    """Raise SignatureError unless both have signed."""
    _check_hospital(checkpoint, hospital)
    message = canonical([checkpoint.signed_bytes().decode(), checkpoint.signature])
    coordinator.verify(message, _decoded(checkpoint.countersignature), purpose=_COUNTER_PURPOSE)


def verify_log_against(
    path: Path, checkpoint: Checkpoint, *, hospital: PublicIdentity, coordinator: PublicIdentity
) -> list[str]:
    """``verify_log``, and the log still contains the countersigned head.

    Raises AuditError when the log was cut before it, or replaced by another.
    """
    verify_checkpoint(checkpoint, hospital=hospital, coordinator=coordinator)
    heads = verify_log(path, hospital)
    if heads[0] != checkpoint.log_id:
        raise AuditError(
            f"{path}: expected log {checkpoint.log_id[:16]}…, found {heads[0][:16]}…: "
            f"the whole log was replaced"
        )
    if checkpoint.seq >= len(heads) or heads[checkpoint.seq] != checkpoint.head:
        raise AuditError(
            f"{path}: line {min(checkpoint.seq, len(heads)) + 1}: expected the record that the "
            f"coordinator countersigned, found {len(heads)} lines without it: the end was cut off"
        )
    return heads


def _check_hospital(checkpoint: Checkpoint, hospital: PublicIdentity) -> None:
    hospital.verify(checkpoint.signed_bytes(), _decoded(checkpoint.signature), purpose=_PURPOSE)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""
