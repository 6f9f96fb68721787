"""What a set of releases costs one patient, and whether it fits the hospital's limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from common.errors import PrivacyError, RefusalError
from common.privacy.accounting import GaussianEvent, check_delta, epsilon
from common.privacy.filter import RdpFilter
from common.privacy.units import PrivacyUnit, Relation

YEAR = timedelta(days=365)


class Accounting(StrEnum):
    """How a patient's releases are composed.

    ``PLD``: exact, for studies whose noise and sampling were fixed before their data were seen.
    ``FILTER``: an RDP filter, which also holds when each was chosen after seeing earlier releases;
    it admits fewer rounds.
    """

    PLD = "pld"
    FILTER = "filter"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most any patient may spend: ε in all and in any 365 days, both at ``delta``.

    Every release is composed under ``relation``, whatever its study declared.
    """

    epsilon_lifetime: float
    epsilon_per_year: float
    delta: float
    relation: Relation
    accounting: Accounting = Accounting.PLD

    def __post_init__(self) -> None:
        """Refuse limits that limit nothing."""
        for name in ("epsilon_lifetime", "epsilon_per_year"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise PrivacyError(f"{name}: expected a finite number above 0, found {value}")
        check_delta(self.delta)


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One release as it counts against a patient."""

    events: tuple[GaussianEvent, ...]
    relation: Relation
    adaptive: bool
    time: datetime


@dataclass(frozen=True, kw_only=True)
class Spent:
    """ε at the limits' δ, over a patient's life and over the last 365 days."""

    lifetime: float
    year: float


def charged_events(
    events: Iterable[GaussianEvent], *, unit: PrivacyUnit, records_per_patient: int
) -> tuple[GaussianEvent, ...]:
    """The patient-level events that dominate ``events``.

    A record-level release of a patient with k records is charged as one clipped at k times the
    norm and sampled whenever any record is: noise σ/k, rate 1-(1-q)^k. Given which of the k
    records were drawn, the two outputs differ by at most k clip norms; the hockey-stick divergence
    is jointly convex, so the mixture over draws is at most its worst case. A record-level ε is
    therefore never taken for a patient-level one, and k records cost what they really cost.
    """
    if records_per_patient < 1:
        raise PrivacyError(f"records per patient: expected at least 1, found {records_per_patient}")
    if unit is PrivacyUnit.PATIENT or records_per_patient == 1:
        return tuple(events)
    count = records_per_patient
    return tuple(
        GaussianEvent(
            noise_multiplier=event.noise_multiplier / count,
            # Rounding must not make the rate smaller than it is.
            sampling_rate=min(1.0, _any_of(event.sampling_rate, count) * (1 + 1e-12)),
            steps=event.steps,
        )
        for event in events
    )


def spent(charges: Sequence[Charge], *, limits: Limits, now: datetime) -> Spent:
    """What ``charges`` cost one patient so far; infinite where the relations do not mix."""
    recent = [charge for charge in charges if charge.time > now - YEAR]
    return Spent(
        lifetime=_epsilon(charges, limits, limits.epsilon_lifetime),
        year=_epsilon(recent, limits, limits.epsilon_per_year),
    )


def refuse_overspending(charges: Sequence[Charge], *, limits: Limits, now: datetime) -> None:
    """Raise RefusalError, naming the limit, if ``charges`` (the new one included) exceed it."""
    after = spent(charges, limits=limits, now=now)
    for rule, found, limit in (
        ("budget.epsilon_lifetime", after.lifetime, limits.epsilon_lifetime),
        ("budget.epsilon_per_year", after.year, limits.epsilon_per_year),
    ):
        if not found <= limit:
            raise RefusalError(
                f"{rule}: a patient of this cohort would reach ε = {_shown(found)} at δ = "
                f"{limits.delta:g}; the hospital's limit is {limit:g}; use more noise or fewer "
                f"steps, or wait (see `consilium hospital budget`)",
                rule=rule,
            )


def _epsilon(charges: Sequence[Charge], limits: Limits, limit: float) -> float:
    """Composition under the limits' relation.

    A clipped, sampled sum moves by one clip norm when a patient leaves and by two when one is
    replaced, so every Gaussian event has a loss under either relation. But a release declared
    private under replace-one only may depend on the exact number of patients (a mean over n): it
    hides no presence, and no finite ε bounds it under add/remove.
    """
    if any(
        charge.relation is Relation.REPLACE_ONE and limits.relation is Relation.ADD_REMOVE
        for charge in charges
    ):
        return math.inf
    events = [event for charge in charges for event in charge.events]
    if limits.accounting is Accounting.FILTER or any(charge.adaptive for charge in charges):
        return _filtered(events, limits, limit)
    return epsilon(events, delta=limits.delta, relation=limits.relation)


def _filtered(events: Sequence[GaussianEvent], limits: Limits, limit: float) -> float:
    """The filter's ε; its order depends on the limit alone, so it was fixed beforehand."""
    opened = RdpFilter.opened(epsilon=limit, delta=limits.delta, relation=limits.relation)
    try:
        return opened.charge(events).spent_epsilon()
    except PrivacyError:
        return math.inf


def _any_of(rate: float, count: int) -> float:
    return -math.expm1(count * math.log1p(-rate)) if rate < 1 else 1.0


def _shown(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.4g}"
