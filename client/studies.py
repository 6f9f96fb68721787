"""Studies on offer: fetched, verified, decided on by this hospital's operator, answered.

An answer is on disk and in the audit log before it is sent, and is sent again until the
coordinator has it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from client.approvals import (
    DECISIONS,
    StudyFolder,
    answer_digest,
    keys_of,
    pinned_fingerprints,
    standing_answer,
    study_folder,
    study_folders,
)
from common.auditlog import AuditLog, Fact
from common.enrolment import Answer, Offer, Offered
from common.errors import ConsiliumError, MessageError, SignatureError, StudyError, nearest
from common.files import sync_folder
from common.identity import Identity, PublicIdentity
from common.secretfiles import replace_file
from common.study import Study, load_study, parse_study

Decision = Literal["approve", "refuse"]


class StudyDesk(Protocol):
    """The coordinator, as far as studies go."""

    def studies(self) -> Sequence[Offered]:
        """All that this hospital was offered."""
        ...

    def answer(self, answer: Answer) -> None:
        """Hand in an answer; the same one again changes nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Member:
    """This hospital as its coordinator knows it. ``coordinator`` signs its offers."""

    name: str
    coordinator: PublicIdentity
    identity: Identity


@dataclass
class SyncReport:
    """What a visit brought: digests of new offers and of answers handed in, and why offers failed.

    ``unusable``: digest → reason. Such an offer changes nothing here.
    """

    new: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)


def sync_studies(folder: Path, desk: StudyDesk, member: Member, log: AuditLog) -> SyncReport:
    """Take in what is offered, and hand in what was decided and is not there yet."""
    report = SyncReport()
    for offered in desk.studies():
        digest = offered.offer.digest
        try:
            place = study_folder(folder, digest)
            if _take_in(place, offered, member, log):
                report.new.append(digest)
            answer = standing_answer(place, member.identity.public, log)
        except ConsiliumError as error:
            report.unusable[digest] = str(error)
            continue
        if answer is not None and answer != offered.answer:
            desk.answer(answer)
            report.answered.append(digest)
    return report


def decide(
    folder: Path,
    digest: str,
    decision: Decision,
    member: Member,
    log: AuditLog,
    *,
    now: datetime,
    reason: str = "",
    new_keys: Collection[str] = (),
) -> Answer:
    """Sign, keep and log a decision; it counts from now on. Sending it is ``sync_studies``' part.

    ``new_keys``: hospitals whose changed key the operator has compared with them.
    Raises SignatureError when the offer is not the coordinator's, or a hospital's key is not the
    one pinned earlier.
    """
    place = study_folder(folder, digest)
    offered = place.offered()
    if offered is None:
        raise MessageError(f"{place.path}: holds no offer of the coordinator's; nothing to answer")
    offer = offered.offer
    check_offer(offer, member)
    if decision == "approve":
        _check_keys(offer, pinned_fingerprints(log), new_keys)
    answer = Answer.make(
        offer,
        hospital=member.name,
        decision=decision,
        answered_at=now,
        identity=member.identity,
        reason=reason,
    )
    replace_file(place.answer, answer.model_dump_json(indent=1).encode())
    facts: dict[str, Fact] = {
        "study": study_of(offer).name,
        "study_digest": digest,
        "offer": offer.fingerprint,
        "answer": answer_digest(answer),
        "coordinator": member.coordinator.fingerprint,
        "peers": [f"{name} {key.fingerprint}" for name, key in keys_of(offer.hospitals).items()],
    }
    if decision == "refuse":
        facts["reason"] = reason[:400]
    log.append(DECISIONS[decision], facts)
    return answer


def check_offer(offer: Offer, member: Member) -> Study:
    """The offered study. Raises unless the coordinator signed it, this version reads the study
    as the coordinator did, and it names this hospital with its own key.
    """
    offer.verify(member.coordinator)
    study = study_of(offer)
    if study.digest() != offer.digest:
        raise MessageError(
            f"offer of {study.name}: expected a study of digest {offer.digest[:12]}…, found "
            f"{study.digest()[:12]}…: coordinator and hospital run different versions; update both"
        )
    known = offer.hospitals.get(member.name)
    if known != member.identity.public.text():
        raise SignatureError(
            f"offer of {study.name}: expected it to name {member.name} with our key "
            f"{member.identity.public.fingerprint[:16]}…, found another or none; "
            f"ask the coordinator whom it enrolled under this name"
        )
    keys_of(offer.hospitals)
    return study


def study_of(offer: Offer) -> Study:
    """The study in an offer; raises StudyError."""
    try:
        tree = tomllib.loads(offer.study)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"offer {offer.digest[:12]}…: not valid TOML: {error}") from None
    return parse_study(tree, origin=f"offer {offer.digest[:12]}…")


def find_study(folder: Path, word: str) -> StudyFolder:
    """The study that an operator means by its name or the start of its digest."""
    known = {place.digest: load_study(place.study).name for place in study_folders(folder)}
    found = [
        digest
        for digest, name in known.items()
        if name == word or (len(word) >= 4 and digest.startswith(word))
    ]
    if len(found) != 1:
        choices = found or [*known, *known.values()]
        hint = nearest(word, choices) if choices else "none was offered yet"
        many = "several studies" if found else "no study"
        raise StudyError(f"{word!r}: found {many} of this name; give a digest: {hint}")
    return study_folder(folder, found[0])


def _take_in(place: StudyFolder, offered: Offered, member: Member, log: AuditLog) -> bool:
    """Verify and keep an offer; whether it is new."""
    offer = offered.offer
    check_offer(offer, member)
    before = place.offered()
    if before is not None and before.offer.fingerprint != offer.fingerprint:
        answer = standing_answer(place, member.identity.public, log)
        if answer is not None and answer.decision == "approve":
            raise SignatureError(
                f"offer {offer.digest[:12]}…: expected the offer that was approved here, found "
                f"another of the same study (other hospitals?); if that is meant, refuse the study "
                f"first, then look at the new offer"
            )
        place.answer.unlink(missing_ok=True)
    elif before == offered:
        return False
    if before is None:
        place.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for made in (place.path, place.path.parent, place.path.parent.parent):
            sync_folder(made)
    replace_file(place.study, offer.study.encode())
    replace_file(place.offer, offered.model_dump_json(indent=1).encode())
    return before is None or before.offer.fingerprint != offer.fingerprint


def _check_keys(offer: Offer, pinned: Mapping[str, str], new_keys: Collection[str]) -> None:
    for name, key in keys_of(offer.hospitals).items():
        known = pinned.get(name, key.fingerprint)
        if known != key.fingerprint and name not in new_keys:
            raise SignatureError(
                f"{name}: expected the key pinned earlier, {known}, found {key.fingerprint}; "
                f"compare it with {name} by telephone, then approve with `--new-key {name}`, "
                f"or refuse"
            )
