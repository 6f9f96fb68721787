"""Consent withdrawn: patients who are left out of every round from now on.

What was released before cannot be called back; the ledger keeps their charges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from client.ledger import Ledger
from client.ledger_cohorts import normal_id
from common.auditlog import AuditLog
from common.errors import PolicyError
from common.secretfiles import check_private, replace_file


@dataclass(frozen=True)
class Withdrawals:
    """Everyone who withdrew. Patient ids: never printed."""

    patients: frozenset[str] = field(repr=False)

    def without(self, patient_ids: Iterable[str]) -> list[str]:
        """``patient_ids`` less those who withdrew, in their order."""
        return [each for each in patient_ids if normal_id(each) not in self.patients]


def read_withdrawals(path: Path) -> Withdrawals:
    """The ids in ``path``, one a line; lines starting with # are comments.

    Raises PolicyError when the file is missing: an unknown list is not an empty one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(
            f"{path}: the list of withdrawals cannot be read ({error}); nothing is released "
            f"without it, an empty file says that nobody withdrew"
        ) from None
    check_private(path)
    return Withdrawals(
        frozenset(normal_id(line) for line in lines if line.strip() and not line.startswith("#"))
    )


def withdraw(path: Path, patient_ids: Iterable[str], *, ledger: Ledger, log: AuditLog) -> int:
    """Add patients to the list and say so in the log, by their keyed hashes; how many were new."""
    known = read_withdrawals(path).patients
    new = sorted({normal_id(each) for each in patient_ids} - known)
    if any(each.startswith("#") or "\n" in each for each in new):
        raise PolicyError("patient id: expected one line that does not start with #")
    if new:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            content += b"\n"
        replace_file(path, content + "".join(f"{each}\n" for each in new).encode())
        tags = [ledger.tag(each) for each in new]
        log.append(
            "consent_applied",
            {"withdrawn": len(known) + len(new), "patients": tags, "list_digest": ""},
        )
    return len(new)


def apply_consent(
    path: Path,
    patient_ids: Iterable[str],
    *,
    ledger: Ledger,
    log: AuditLog,
    study: str,
    round_number: int,
) -> list[str]:
    """The patients of a round who did not withdraw; call it before every round.

    The log gets the length of the list and the hash of its keyed hashes.
    """
    withdrawals = read_withdrawals(path)
    tags = sorted(ledger.tag(each) for each in withdrawals.patients)
    log.append(
        "consent_applied",
        {
            "study": study,
            "round": round_number,
            "withdrawn": len(tags),
            "list_digest": hashlib.sha256("\n".join(tags).encode()).hexdigest(),
        },
    )
    return withdrawals.without(patient_ids)
