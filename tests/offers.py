"""A coordinator's offers and an operator's approvals, without either."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path

from client.approvals import study_folder
from client.safe import open_safe
from client.studies import Member, decide
from common.enrolment import Offer, Offered
from common.identity import Identity
from common.study import Study

COORDINATOR = Identity.generate()
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def offer_of(study: Study, keys: Mapping[str, str], identity: Identity = COORDINATOR) -> Offer:
    """The coordinator's offer of ``study`` to hospitals with these public keys."""
    return Offer.make(
        study=study.revised(simulation=None).to_toml(),
        digest=study.digest(),
        hospitals=dict(keys),
        submitted_at=NOON,
        identity=identity,
    )


def approve_by_hand(
    folder: Path,
    study: Study,
    safe_folder: Path,
    keys: Mapping[str, str] | Collection[str],
    *,
    new_keys: Collection[str] = (),
) -> Offered:
    """Lay an offer into a hospital's folder and approve it as its operator would.

    ``keys``: public keys by name, or the hospital's own name alone.
    """
    with open_safe(safe_folder, {}) as safe:
        mine = safe.identity.public.text()
        known = keys if isinstance(keys, Mapping) else dict.fromkeys(keys, mine)
        name = next(one for one, key in known.items() if key == mine)
        offered = Offered(offer=offer_of(study, known), state="running")
        place = study_folder(folder, study.digest())
        place.path.mkdir(parents=True, exist_ok=True)
        place.study.write_text(offered.offer.study)
        place.offer.write_text(offered.model_dump_json())
        member = Member(name=name, coordinator=COORDINATOR.public, identity=safe.identity)
        now = datetime.now(UTC)
        decide(folder, study.digest(), "approve", member, safe.log, now=now, new_keys=new_keys)
    return offered
