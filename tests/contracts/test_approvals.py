"""What an operator decides, and that nobody else can: offers, answers, pinned keys."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from client.approvals import approved_study, laid_out_study, study_folder, study_folders
from client.safe import Safe, create_safe, open_safe
from client.studies import Member, decide, find_study, sync_studies
from common.auditlog import verify_log
from common.enrolment import Answer, Offer, Offered
from common.errors import ConsiliumError, MessageError, RefusalError, SignatureError, StudyError
from common.identity import Identity
from common.study import Study, parse_study
from tests.offers import COORDINATOR, NOON, offer_of


class Desk:
    """The coordinator's desk, in memory."""

    def __init__(self, *offered: Offered) -> None:
        self.offered = list(offered)
        self.answers: list[Answer] = []
        self.is_deaf = False

    def studies(self) -> list[Offered]:
        return self.offered

    def answer(self, answer: Answer) -> None:
        if self.is_deaf:
            raise MessageError("lost")
        self.answers.append(answer)
        self.offered = [
            one.model_copy(update={"answer": answer}) if one.offer.digest == answer.digest else one
            for one in self.offered
        ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_safe(tmp_path / "north", {})
    return tmp_path / "north"


@pytest.fixture
def safe(folder: Path) -> Iterator[Safe]:
    with open_safe(folder, {}) as opened:
        yield opened


@pytest.fixture
def member(safe: Safe) -> Member:
    return Member(name="north", coordinator=COORDINATOR.public, identity=safe.identity)


SOUTH, WEST = Identity.generate(), Identity.generate()


def keys(member: Member, **others: Identity) -> dict[str, str]:
    known = {"north": member.identity, "south": SOUTH, "west": WEST} | others
    return {name: identity.public.text() for name, identity in known.items()}


def offered(study: Study, member: Member, **others: Identity) -> Offered:
    return Offered(offer=offer_of(study, keys(member, **others)), state="offered")


def agree(folder: Path, study: Study, member: Member, safe: Safe, **options: Any) -> Answer:
    now = datetime.now(UTC)
    return decide(folder, study.digest(), "approve", member, safe.log, now=now, **options)


def refuse(folder: Path, study: Study, member: Member, safe: Safe, reason: str = "") -> Answer:
    now = datetime.now(UTC)
    digest = study.digest()
    return decide(folder, digest, "refuse", member, safe.log, now=now, reason=reason)


def is_approved(folder: Path, study: Study, safe: Safe) -> bool:
    try:
        found, pinned = approved_study(folder, study.digest(), safe.identity, safe.log)
    except RefusalError as refusal:
        assert refusal.rule == "study.approval"
        return False
    assert found == study
    assert set(pinned) == {"north", "south", "west"}
    return True


def test_from_offer_to_approval_to_withdrawal(
    folder: Path, small: Study, safe: Safe, member: Member
) -> None:
    desk = Desk(offered(small, member))
    report = sync_studies(folder, desk, member, safe.log)
    assert (report.new, report.answered, report.unusable) == ([small.digest()], [], {})
    assert not is_approved(folder, small, safe)
    assert sync_studies(folder, desk, member, safe.log).new == []
    agree(folder, small, member, safe)
    assert is_approved(folder, small, safe)
    desk.is_deaf = True
    with pytest.raises(MessageError):
        sync_studies(folder, desk, member, safe.log)
    desk.is_deaf = False
    assert sync_studies(folder, desk, member, safe.log).answered == [small.digest()]
    assert sync_studies(folder, desk, member, safe.log).answered == []
    (answer,) = desk.answers
    answer.verify(safe.identity.public, desk.offered[0].offer)
    assert answer.decision == "approve"
    refuse(folder, small, member, safe, "staff on leave")
    assert not is_approved(folder, small, safe)
    assert sync_studies(folder, desk, member, safe.log).answered == [small.digest()]
    assert desk.answers[-1].reason == "staff on leave"
    facts = [one.facts for one in safe.log.records() if one.kind.startswith("study_")]
    assert [one["study_digest"] for one in facts] == [small.digest()] * 2
    assert f"south {SOUTH.public.fingerprint}" in facts[0]["peers"]
    verify_log(safe.folder.audit_log, safe.identity.public)
    # The decision outlives the process.
    agree(folder, small, member, safe)
    with open_safe(folder, {}) as again:
        assert is_approved(folder, small, again)


def test_a_log_that_stays_open_knows_what_another_process_decided(
    folder: Path, small: Study, safe: Safe, member: Member
) -> None:
    desk = Desk(offered(small, member))
    sync_studies(folder, desk, member, safe.log)
    with open_safe(folder, {}) as other:
        agree(folder, small, member, other)
    report = sync_studies(folder, desk, member, safe.log)
    assert (report.answered, report.unusable) == ([small.digest()], {})


def test_a_study_is_found_by_name_or_start_of_digest(
    folder: Path, small: Study, safe: Safe, member: Member
) -> None:
    other = small.revised(name="other")
    twin = small.revised(name="other", seed=9)
    sync_studies(
        folder, Desk(*(offered(one, member) for one in (small, other, twin))), member, safe.log
    )
    assert len(list(study_folders(folder))) == 3
    assert find_study(folder, "small").digest == small.digest()
    assert find_study(folder, twin.digest()[:8]).digest == twin.digest()
    with pytest.raises(StudyError, match="several studies"):
        find_study(folder, "other")
    with pytest.raises(StudyError, match="did you mean 'small'"):
        find_study(folder, "smal")


# Lies


def _stranger(offer: Offer, _: Member) -> Offer:
    facts = offer.model_dump(exclude={"signature"})
    return Offer.make(**facts, identity=Identity.generate())


def _changed(offer: Offer, _: Member) -> Offer:
    changed = offer.study.replace("epsilon = 4.0", "epsilon = 40.0")
    assert changed != offer.study
    return offer.model_copy(update={"study": changed})


def _resigned(offer: Offer, _: Member, **changes: Any) -> Offer:
    facts = offer.model_dump(exclude={"signature"}) | changes
    return Offer.make(**facts, identity=COORDINATOR)


def _other_digest(offer: Offer, member: Member) -> Offer:
    return _resigned(offer, member, digest="0" * 64)


def _without_us(offer: Offer, member: Member) -> Offer:
    others = {name: key for name, key in offer.hospitals.items() if name != "north"}
    return _resigned(offer, member, hospitals=others)


def _our_name_anothers_key(offer: Offer, member: Member) -> Offer:
    return _resigned(offer, member, hospitals=offer.hospitals | {"north": SOUTH.public.text()})


def _no_key(offer: Offer, member: Member) -> Offer:
    return _resigned(offer, member, hospitals=offer.hospitals | {"south": "nothing"})


def _unreadable(offer: Offer, member: Member) -> Offer:
    return _resigned(offer, member, study=offer.study + "\nfuture = 1\n")


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (_stranger, "offer: the signature is not by"),
        (_changed, "offer: the signature is not by"),
        (_other_digest, "run different versions"),
        (_without_us, "expected it to name north"),
        (_our_name_anothers_key, "expected it to name north with our key"),
        (_no_key, "public key: expected"),
        (_unreadable, "unknown key|not valid TOML"),
    ],
)
def test_an_offer_that_does_not_hold_changes_nothing(
    folder: Path, small: Study, safe: Safe, member: Member, lie: Any, words: str
) -> None:
    good = offered(small, member)
    bad = good.model_copy(update={"offer": lie(good.offer, member)})
    other = offered(small.revised(name="honest"), member)
    report = sync_studies(folder, Desk(bad, other), member, safe.log)
    assert report.new == [other.offer.digest]  # one bad offer stops no other
    ((_, reason),) = report.unusable.items()
    assert re.search(words, reason)
    assert [one.digest for one in study_folders(folder)] == [other.offer.digest]


def test_an_approved_offer_is_not_replaced_behind_the_operators_back(
    folder: Path, small: Study, safe: Safe, member: Member
) -> None:
    sync_studies(folder, Desk(offered(small, member)), member, safe.log)
    agree(folder, small, member, safe)
    newer = offered(small, member, west=Identity.generate())
    report = sync_studies(folder, Desk(newer), member, safe.log)
    assert "expected the offer that was approved here" in report.unusable[small.digest()]
    assert is_approved(folder, small, safe)
    # Asked to, the hospital looks at the new one; the swapped key is still found out.
    refuse(folder, small, member, safe)
    assert sync_studies(folder, Desk(newer), member, safe.log).new == [small.digest()]
    assert not is_approved(folder, small, safe)
    with pytest.raises(SignatureError, match="expected the key pinned earlier"):
        agree(folder, small, member, safe)


def test_a_swapped_peer_is_refused_with_both_fingerprints(
    folder: Path, small: Study, safe: Safe, member: Member
) -> None:
    second, third = small.revised(name="second"), small.revised(name="third")
    fresh = Identity.generate()
    desk = Desk(
        offered(small, member),
        offered(second, member, west=fresh),
        offered(third, member, west=fresh),
    )
    sync_studies(folder, desk, member, safe.log)
    agree(folder, small, member, safe)
    with pytest.raises(SignatureError) as refusal:
        agree(folder, second, member, safe)
    assert WEST.public.fingerprint in str(refusal.value)
    assert fresh.public.fingerprint in str(refusal.value)
    assert not is_approved(folder, second, safe)
    shutil.rmtree(study_folder(folder, small.digest()).path)  # deleting files forgets no key
    with pytest.raises(SignatureError):
        agree(folder, second, member, safe)
    agree(folder, second, member, safe, new_keys=["west"])
    assert is_approved(folder, second, safe)
    agree(folder, third, member, safe)  # the newest pin counts


@pytest.fixture
def approved(folder: Path, small: Study, safe: Safe, member: Member) -> Study:
    sync_studies(folder, Desk(offered(small, member)), member, safe.log)
    agree(folder, small, member, safe)
    return small


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_nobody_approves_by_editing_a_file(
    folder: Path, small: Study, safe: Safe, member: Member
) -> None:
    sync_studies(folder, Desk(offered(small, member)), member, safe.log)
    refuse(folder, small, member, safe)
    place = study_folder(folder, small.digest())
    _edit(place.answer, decision="approve")
    assert not is_approved(folder, small, safe)


def test_an_older_approval_put_back_does_not_count(
    folder: Path, approved: Study, safe: Safe, member: Member
) -> None:
    place = study_folder(folder, approved.digest())
    kept = place.answer.read_bytes()
    refuse(folder, approved, member, safe)
    place.answer.write_bytes(kept)
    assert not is_approved(folder, approved, safe)


def test_an_older_approval_of_other_hospitals_put_back_does_not_count(
    folder: Path, approved: Study, safe: Safe, member: Member
) -> None:
    place = study_folder(folder, approved.digest())
    kept = {path: path.read_bytes() for path in (place.offer, place.answer)}
    refuse(folder, approved, member, safe)
    newer = offered(approved, member, west=Identity.generate())
    sync_studies(folder, Desk(newer), member, safe.log)
    agree(folder, approved, member, safe, new_keys=["west"])
    assert is_approved(folder, approved, safe)
    for path, content in kept.items():
        path.write_bytes(content)
    assert not is_approved(folder, approved, safe)


def test_another_hospitals_approval_does_not_count(
    folder: Path, approved: Study, safe: Safe
) -> None:
    place = study_folder(folder, approved.digest())
    offer = place.offered()
    assert offer is not None
    forged = Answer.make(
        offer.offer, hospital="north", decision="approve", answered_at=NOON, identity=SOUTH
    )
    place.answer.write_text(forged.model_dump_json())
    assert not is_approved(folder, approved, safe)


def test_swapped_files_of_an_approved_study_do_not_count(
    folder: Path, approved: Study, safe: Safe, member: Member
) -> None:
    place = study_folder(folder, approved.digest())
    good = {path: path.read_bytes() for path in (place.study, place.offer, place.answer)}
    weaker = parse_study(
        approved.revised(privacy__epsilon=40.0).model_dump(
            mode="json", exclude_unset=True, exclude_none=True
        ),
        origin="test",
    )
    spoiled = {
        place.study: weaker.to_toml().encode(),
        place.offer: offered(approved, member, west=Identity.generate()).model_dump_json().encode(),
        place.answer: b"{}",
    }
    for path, content in spoiled.items():
        path.write_bytes(content)
        assert not is_approved(folder, approved, safe), path
        path.write_bytes(good[path])
    assert is_approved(folder, approved, safe)
    for path, content in good.items():
        path.unlink()
        assert not is_approved(folder, approved, safe), path
        path.write_bytes(content)
    # The same approval does not serve another study.
    other = study_folder(folder, weaker.digest())
    shutil.copytree(place.path, other.path)
    other.study.write_text(weaker.to_toml())
    assert not is_approved(folder, weaker, safe)


@pytest.mark.parametrize("digest", ["", "..", "../../etc", "A" * 64, "0" * 63, "0" * 64])
def test_a_digest_is_never_a_path(folder: Path, digest: str) -> None:
    with pytest.raises(RefusalError) as refusal:
        laid_out_study(folder, digest)
    assert refusal.value.rule == "study.approval"


def test_a_decision_needs_an_offer(folder: Path, small: Study, safe: Safe, member: Member) -> None:
    with pytest.raises(MessageError, match="nothing to answer"):
        agree(folder, small, member, safe)
    sync_studies(folder, Desk(offered(small, member)), member, safe.log)
    stranger = replace(member, coordinator=Identity.generate().public)
    with pytest.raises(ConsiliumError, match="offer: the signature"):
        agree(folder, small, stranger, safe)
