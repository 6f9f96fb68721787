"""Studies from their submission to their end: offers, answers, attempts.

::

    submit ──▶ offered ──(all answered, or `begin`)──▶ running ──▶ finished
                  │                                    │  ▲  └───▶ failed ──┐
                  └──────────────▶ stopped ◀───────────┘  └─────── begin ───┘
                                      └──────────── begin ────────▶ running

Beginning again continues after the last finished round.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.auditlog import Fact
from common.enrolment import FINISHED_FILES, Answer, Offer, Offered, parse_message
from common.errors import DataError, RefusalError, RunError, StudyError
from common.identity import PublicIdentity
from common.privacy.units import Trust
from common.readers import open_table
from common.study import Study, parse_study
from server.desk import Desk, NotFoundError, UnavailableError
from server.federation import Federation
from server.registry import AnswerRow, Hospital, StudyRow, StudyState
from server.store import RunFolder

RESULT_FILES = (
    *FINISHED_FILES,
    "teacher.safetensors",
    "metrics.jsonl",
    "environment.json",
)

_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How an offer stands. ``missing``: why the study cannot begin; empty when it can."""

    invited: tuple[str, ...]
    approved: tuple[str, ...]
    refused: tuple[str, ...]
    pending: tuple[str, ...]
    missing: str


class Studies:
    """All studies of a coordinator."""

    def __init__(self, desk: Desk, federation: Federation) -> None:
        """``federation``: asked only to stop runs; ``server.driver`` starts them."""
        self._desk = desk
        self._registry = desk.registry
        self._federation = federation

    def submit(self, text: str, hospitals: Sequence[str] | None, *, actor: str) -> StudyRow:
        """Offer the study in TOML ``text`` to ``hospitals``, or to all that are enrolled.

        Raises StudyError for an unsound study, RunError for one that cannot run here.
        """
        study = _parsed(text)
        with self._desk.lock:
            invited = self._invited(hospitals)
            _check_size(study, len(invited))
            self._check_corpus(study)
            now, digest = self._desk.clock(), study.digest()
            offer = Offer.make(
                study=text,
                digest=digest,
                hospitals={one.name: one.identity for one in invited},
                submitted_at=now,
                identity=self._desk.identity,
            )
            row = StudyRow(
                id=f"{study.name}-{digest[:12]}",
                name=study.name,
                digest=digest,
                toml=text,
                state="offered",
                submitted_at=now,
                offer=offer.model_dump_json(),
                run_id=None,
                attempts=0,
                next_attempt_at=None,
                last_error="",
                progress=0,
            )
            if self._registry.study_of(digest) is None:
                facts: dict[str, Fact] = {
                    "study": row.id,
                    "study_digest": digest,
                    "offer": offer.fingerprint,
                    "hospitals": [one.name for one in invited],
                }
                self._desk.record("study_submitted", row.id, actor=actor, facts=facts)
            self._registry.add_study(row)
        return row

    def find(self, study_id: str) -> StudyRow:
        """The study with this id, or the only one of this name. Raises NotFoundError."""
        if (row := self._registry.study(study_id)) is not None:
            return row
        named = [one for one in self._registry.studies() if one.name == study_id]
        if len(named) == 1:
            return named[0]
        known = ", ".join(one.id for one in named or self._registry.studies()[:10]) or "none"
        raise NotFoundError(f"study {study_id!r}: expected one that was submitted: {known}")

    def offered_to(self, hospital: str) -> list[Offered]:
        """All offers to a hospital with its answers, the newest first."""
        found = []
        for row in self._registry.studies():
            offer = offer_of(row)
            if hospital in offer.hospitals:
                answer = next(
                    (one for one in self._registry.answers(row.id) if one.hospital == hospital),
                    None,
                )
                found.append(
                    Offered(
                        offer=offer,
                        state=row.state,
                        answer=parse_message(Answer, answer.json) if answer else None,
                    )
                )
        return found

    def answer(self, hospital: Hospital, answer: Answer) -> None:
        """Keep a hospital's word, in place of an earlier one.

        Raises NotFoundError, SignatureError, or RunError once the study has begun.
        """
        row = self._registry.study_of(answer.digest)
        offer = offer_of(row) if row else None
        if row is None or offer is None or hospital.name not in offer.hospitals:
            raise NotFoundError(f"answer: expected one to an offer made to {hospital.name}")
        answer.verify(PublicIdentity.from_text(hospital.identity), offer)
        if answer.hospital != hospital.name:
            raise RefusalError(
                f"answer: expected one of {hospital.name}, found one of {answer.hospital}",
                rule="answer.hospital",
            )
        text = answer.model_dump_json()
        with self._desk.lock:
            kept = {one.hospital: one.json for one in self._registry.answers(row.id)}
            if kept.get(hospital.name) == text:
                return
            facts: dict[str, Fact] = {
                "study": row.id,
                "study_digest": row.digest,
                "offer": offer.fingerprint,
                "name": hospital.name,
                "decision": answer.decision,
            }
            if self.find(row.id).state == "offered":
                self._desk.record("offer_answered", row.id, actor=hospital.name, facts=facts)
            taken = self._registry.put_answer(
                AnswerRow(
                    study=row.id,
                    hospital=hospital.name,
                    decision=answer.decision,
                    json=text,
                    at=self._desk.clock(),
                )
            )
        if not taken:
            raise RunError(f"study {row.id}: expected an answer before it began; it counts as made")

    def standing(self, row: StudyRow) -> Standing:
        """Who was invited, what they said, and what the study still lacks to begin."""
        offer = offer_of(row)
        active = {one.name for one in self._registry.hospitals() if one.revoked_at is None}
        decisions = {one.hospital: one.decision for one in self._registry.answers(row.id)}
        invited = tuple(sorted(offer.hospitals))
        approved = tuple(
            name for name in invited if name in active and decisions.get(name) == "approve"
        )
        return Standing(
            invited=invited,
            approved=approved,
            refused=tuple(name for name in invited if decisions.get(name) == "refuse"),
            pending=tuple(name for name in invited if name in active and name not in decisions),
            missing=_lacking(_parsed(row.toml), len(approved)),
        )

    def begin(self, study_id: str, *, actor: str) -> StudyRow:
        """Begin a study now, or again. Raises RunError when too few hospitals approved."""
        with self._desk.lock:
            row = self.find(study_id)
            if row.state not in ("offered", "failed", "stopped"):
                raise RunError(f"study {row.id}: expected one to begin, found it {row.state}")
            standing = self.standing(row)
            if standing.missing:
                raise RunError(f"study {row.id}: {standing.missing}")
            self.move(
                row,
                "running",
                actor=actor,
                hospitals=standing.approved,
                run_id=None,
                attempts=0,
                next_attempt_at=self._desk.clock(),
                last_error="",
            )
            return self.find(row.id)

    def stop(self, study_id: str, *, actor: str, reason: str = "") -> StudyRow:
        """End a study that is offered or running; `begin` continues it."""
        with self._desk.lock:
            row = self.find(study_id)
            if row.state not in ("offered", "running"):
                raise RunError(
                    f"study {row.id}: expected it offered or running, found it {row.state}"
                )
            self.move(row, "stopped", actor=actor, reason=reason, last_error=reason)
            self.halt(row)
            return self.find(row.id)

    def halt(self, row: StudyRow) -> None:
        """End the Flower run of a study that has ended; the driver repeats what cannot be told."""
        if row.run_id is None:
            return
        try:
            self._federation.stop_run(row.run_id)
        except UnavailableError:
            return
        self._registry.change_study(row.id, [self.find(row.id).state], run_id=None)

    def hospital_left(self, name: str) -> list[str]:
        """Stop the running studies that a revoked hospital leaves with too few; their ids."""
        stopped = []
        with self._desk.lock:
            for row in self._registry.studies():
                if row.state != "running" or name not in offer_of(row).hospitals:
                    continue
                study = _parsed(row.toml)
                left = len(self.standing(row).approved)
                if left < _fewest(study):
                    reason = f"{name} was revoked: {_lacking(study, left)}"
                    self.stop(row.id, actor="service", reason=reason)
                    stopped.append(row.id)
        return stopped

    def move(
        self,
        row: StudyRow,
        state: StudyState,
        *,
        actor: str,
        reason: str = "",
        hospitals: Sequence[str] = (),
        **values: Any,
    ) -> None:
        """Record a change of state and make it. Raises RunError when another came first."""
        facts: dict[str, Fact] = {
            "study": row.id,
            "study_digest": row.digest,
            "state": state,
            "reason": reason[:_LONGEST_REASON],
            "hospitals": list(hospitals),
        }
        self._desk.record("study_state", row.id, actor=actor, facts=facts)
        if not self._registry.change_study(row.id, [row.state], state=state, **values):
            raise RunError(f"study {row.id}: expected it {row.state}, found it changed; look again")

    def folder(self, row: StudyRow) -> RunFolder:
        """Its run folder, which may not exist yet."""
        return RunFolder(self._desk.folder.run_of(row.id))

    def result_file(self, row: StudyRow, name: str) -> Path:
        """A finished study's file ``name``. Raises NotFoundError."""
        path = self.folder(row).path / name
        if name not in RESULT_FILES or row.state != "finished" or not path.is_file():
            raise NotFoundError(
                f"study {row.id}: expected a file of a finished study "
                f"({', '.join(RESULT_FILES)}), found study {row.state}, file {name[:60]!r}"
            )
        return path

    def file_for(self, hospital: str, digest: str, name: str) -> Path:
        """The same for a hospital that approved the study. Raises RefusalError for others."""
        row = self._registry.study_of(digest)
        if row is None or hospital not in offer_of(row).hospitals:
            raise NotFoundError(f"study {digest[:16]}…: expected one offered to {hospital}")
        if hospital not in self.standing(row).approved:
            raise RefusalError(
                f"study {row.id}: its files are for hospitals that approved it", rule="files"
            )
        if name not in FINISHED_FILES:
            raise NotFoundError(f"file {name[:60]!r}: expected one of {', '.join(FINISHED_FILES)}")
        return self.result_file(row, name)

    def study(self, row: StudyRow) -> Study:
        """What was submitted."""
        return _parsed(row.toml)

    def result(self, row: StudyRow) -> dict[str, Any] | None:
        """The result of a finished study."""
        path = self.folder(row).path / "result.json"
        if row.state != "finished" or not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _invited(self, names: Sequence[str] | None) -> list[Hospital]:
        active = {one.name: one for one in self._registry.hospitals() if one.revoked_at is None}
        unknown = [name for name in names or () if name not in active]
        if unknown:
            raise RunError(
                f"hospitals: expected enrolled ones ({', '.join(active) or 'none are'}), "
                f"found {', '.join(unknown)}"
            )
        return [active[name] for name in (dict.fromkeys(names) if names else active)]

    def _check_corpus(self, study: Study) -> None:
        public = study.public
        if public.kind == "held_apart":
            raise StudyError(
                f"study {study.name}: public.kind = 'held_apart' is for simulations; put the "
                f"corpus into a file (kind = 'file') or draw it from the dictionary"
            )
        if public.source is not None:
            folder = self._desk.folder.path / self._desk.settings.public_folder
            try:
                open_table(public.source, folder)
            except DataError as error:
                raise RunError(
                    f"study {study.name}: expected its public corpus below {folder}: {error}"
                ) from None


def offer_of(row: StudyRow) -> Offer:
    """The signed offer of a study."""
    return parse_message(Offer, row.offer)


def _parsed(text: str) -> Study:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"study: not valid TOML: {error}") from None
    return parse_study(tree, origin="study")


def _check_size(study: Study, invited: int) -> None:
    needed = study.federation.minimum_hospitals
    if study.privacy.trust is Trust.DISTRIBUTED:
        needed = max(needed, study.federation.hospitals or 0)
    if invited < needed:
        raise RunError(
            f"study {study.name}: expected at least {needed} hospitals to invite, found {invited}; "
            f"enroll more, or lower the study's numbers"
        )


def _lacking(study: Study, approved: int) -> str:
    """Why ``approved`` hospitals cannot begin the study; empty when they can."""
    federation = study.federation
    exact = federation.hospitals if study.privacy.trust is Trust.DISTRIBUTED else None
    if exact is not None and approved != exact:
        return (
            f"expected exactly federation.hospitals = {exact} approvals (trust = 'distributed'), "
            f"found {approved}"
        )
    if approved < federation.minimum_hospitals:
        return f"expected at least {federation.minimum_hospitals} approvals, found {approved}"
    return ""


def _fewest(study: Study) -> int:
    """With how many hospitals a study that has begun can go on."""
    federation = study.federation
    if study.privacy.trust is Trust.DISTRIBUTED and federation.hospitals is not None:
        survivors = federation.hospitals - federation.tolerated_dropouts
        return max(survivors, federation.minimum_hospitals)
    return federation.minimum_hospitals
