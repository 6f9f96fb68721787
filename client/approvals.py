"""What this hospital's operator decided on a study, verified each time it counts.

::

    FOLDER/studies/DIGEST/
      study.toml     the study, as offered
      offer.json     the coordinator's signed offer, and how the study stands
      answer.json    this hospital's signed answer

A decision counts when the answer carries this hospital's signature over this very offer, and the
audit log knows it as the newest one on the study. So nobody approves by editing a file, nor by
putting an older answer back; and whoever takes part was named in the offer that was signed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.auditlog import AuditLog, canonical
from common.enrolment import Answer, Offered, parse_message
from common.errors import ConsiliumError, RefusalError
from common.identity import Identity, PublicIdentity
from common.strict import Strict
from common.study import Study, load_study

STUDIES = "studies"
DECISIONS = {"approve": "study_approved", "refuse": "study_refused"}
RULE = "study.approval"

_DIGEST = re.compile(r"[0-9a-f]{64}")

Message = TypeVar("Message", bound=Strict)


@dataclass(frozen=True)
class StudyFolder:
    """Where a study's files are."""

    path: Path

    @property
    def digest(self) -> str:
        """Of the study."""
        return self.path.name

    @property
    def study(self) -> Path:
        """The study file."""
        return self.path / "study.toml"

    @property
    def offer(self) -> Path:
        """The offer, and how it stands with the coordinator."""
        return self.path / "offer.json"

    @property
    def answer(self) -> Path:
        """This hospital's answer."""
        return self.path / "answer.json"

    def offered(self) -> Offered | None:
        """The offer; None where the study was laid out by hand."""
        return _read(Offered, self.offer)

    def answered(self) -> Answer | None:
        """The answer as it lies there, unverified; None before there is one."""
        return _read(Answer, self.answer)


def study_folder(folder: Path, digest: str) -> StudyFolder:
    """The folder of the study of this digest; raises RefusalError for what is no digest."""
    if not _DIGEST.fullmatch(digest):
        raise RefusalError(f"{RULE}: expected a study's digest, found {digest[:80]!r}", rule=RULE)
    return StudyFolder(folder / STUDIES / digest)


def study_folders(folder: Path) -> Iterator[StudyFolder]:
    """All studies this hospital was offered."""
    for path in sorted((folder / STUDIES).glob("*/study.toml")):
        if _DIGEST.fullmatch(path.parent.name):
            yield StudyFolder(path.parent)


def laid_out_study(folder: Path, digest: str) -> Study:
    """The study of this digest, as it lies there. Raises RefusalError when there is none."""
    place = study_folder(folder, digest)
    if not place.study.is_file():
        raise RefusalError(
            f"{RULE}: this hospital holds no study {digest[:12]}…; "
            f"see `consilium hospital studies`",
            rule=RULE,
        )
    study = load_study(place.study)
    if study.digest() != digest:
        raise RefusalError(
            f"{RULE}: expected study {digest[:12]}…, found {study.digest()[:12]}… in "
            f"{place.study}: the file was changed, or another version read it; "
            f"have it offered again",
            rule=RULE,
        )
    return study


def approved_study(
    folder: Path, digest: str, identity: Identity, log: AuditLog
) -> tuple[Study, dict[str, PublicIdentity]]:
    """The study, and the keys of all who were asked, as this hospital approved them.

    Raises RefusalError (rule ``study.approval``) unless the operator's approval stands.
    """
    place = study_folder(folder, digest)
    study = laid_out_study(folder, digest)
    answer = standing_answer(place, identity.public, log)
    if answer is None or answer.decision != "approve":
        how = "was refused" if answer else "was not approved"
        raise RefusalError(
            f"{RULE}: study {study.name} ({digest[:12]}…) {how}; "
            f"`consilium hospital approve {study.name}` would let it in",
            rule=RULE,
        )
    offered = place.offered()
    if offered is None:
        raise RuntimeError("an answer was verified against its offer")
    return study, keys_of(offered.offer.hospitals)


def standing_answer(place: StudyFolder, public: PublicIdentity, log: AuditLog) -> Answer | None:
    """The decision in force on a study; None before there is one.

    Raises RefusalError when the answer is not this hospital's to this offer, or not its newest.
    """
    try:
        answer, offered = place.answered(), place.offered()
        if answer is None or offered is None:
            return None
        answer.verify(public, offered.offer)
    except ConsiliumError as error:
        raise RefusalError(f"{RULE}: {place.path}: {error}", rule=RULE) from None
    log.refresh()  # a daemon's log stays open while operators decide
    newest = log.latest_on(place.digest, list(DECISIONS.values()))
    if (
        newest is None
        or newest.kind != DECISIONS[answer.decision]
        or newest.facts["answer"] != answer_digest(answer)
        or offered.offer.digest != place.digest
    ):
        raise RefusalError(
            f"{RULE}: {place.answer}: expected the decision that the audit log knows as the last "
            f"one, found another; decide again with `consilium hospital approve` or `refuse`",
            rule=RULE,
        )
    return answer


def decision_of(place: StudyFolder, public: PublicIdentity, log: AuditLog) -> str:
    """``approved``, ``refused``, ``open``, or ``unsound`` when the answer's files do not hold."""
    try:
        answer = standing_answer(place, public, log)
    except ConsiliumError:
        return "unsound"
    return {"approve": "approved", "refuse": "refused"}[answer.decision] if answer else "open"


def pinned_fingerprints(log: AuditLog) -> dict[str, str]:
    """The fingerprint of every hospital's key, as the newest approval that named it has it.

    From the audit log, so that a refusal, or a deleted study, does not make a key forgotten.
    """
    pinned: dict[str, str] = {}
    for record in log.records():
        if record.kind == DECISIONS["approve"]:
            pinned |= dict(one.split(" ") for one in record.facts["peers"])
    return pinned


def keys_of(hospitals: Mapping[str, str]) -> dict[str, PublicIdentity]:
    """The parsed keys of an offer."""
    return {name: PublicIdentity.from_text(text) for name, text in hospitals.items()}


def answer_digest(answer: Answer) -> str:
    """What the audit log remembers of an answer: SHA-256 over all of it."""
    return hashlib.sha256(canonical(answer.model_dump(mode="json"))).hexdigest()


def _read(kind: type[Message], path: Path) -> Message | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RefusalError(f"{path}: cannot be read ({error.strerror})", rule=RULE) from None
    return parse_message(kind, content)
