"""What the ledger hands out, and how a charge is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from client.ledger_cohorts import Cohort
from client.spend import Charge
from common.privacy.accounting import GaussianEvent
from common.privacy.units import PrivacyUnit, Relation


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """Leave to make one release. Only ``Ledger.reserve`` and ``Ledger.resume`` give one."""

    entry: int
    request_digest: str
    attempt: int
    cohort: Cohort
    nonce: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class StoredRelease:
    """A release made earlier, byte for byte."""

    reservation: Reservation
    content: bytes = field(repr=False)
    is_committed: bool


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One charge, as reports show it. ``state`` is reserved, released or committed."""

    id: int
    cohort: int
    study: str
    stage: str
    round: int
    attempt: int
    unit: PrivacyUnit
    charge: Charge
    state: str
    study_digest: str
    declared: tuple[GaussianEvent, ...]


def event_json(event: GaussianEvent) -> list[float | int]:
    """Noise multiplier, sampling rate, steps."""
    return [event.noise_multiplier, event.sampling_rate, event.steps]


def _event(parts: Sequence[Any]) -> GaussianEvent:
    noise, rate, steps = parts
    return GaussianEvent(noise_multiplier=noise, sampling_rate=rate, steps=steps)


def parse_charge(facts: Mapping[str, Any]) -> Charge:
    """The charge in an entry's facts."""
    return Charge(
        events=tuple(_event(one) for one in facts["charged"]),
        relation=Relation(facts["relation"]),
        adaptive=facts["adaptive"],
        time=datetime.fromisoformat(facts["time"]),
    )


def parse_entry(identifier: int, cohort: int, text: str, state: str) -> Entry:
    """One row of the ledger."""
    facts = json.loads(text)
    return Entry(
        id=identifier,
        cohort=cohort,
        study=facts["study"],
        stage=facts["stage"],
        round=facts["round"],
        attempt=facts["attempt"],
        unit=PrivacyUnit(facts["unit"]),
        charge=parse_charge(facts),
        state=state,
        study_digest=facts["study_digest"],
        declared=tuple(_event(one) for one in facts["declared"]),
    )
