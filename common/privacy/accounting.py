"""Privacy accounting by privacy loss distributions (PLD), through ``dp-accounting``.

An event records the mathematics of a release, never how it was computed. Events compose by
convolving their privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022, "Connect
the dots"), never by adding ε. An event of unknown type is unsupported, never free.

The Gaussian-DP (GDP) central-limit formula is not used anywhere for a reported figure: it
understates ε.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution as pld_lib

from common.errors import PrivacyError
from common.privacy.units import Relation

# Grid of the privacy loss; 1e-4 is dp-accounting's own default, and pessimistic rounding keeps the
# reported ε an upper bound whatever the grid.
_INTERVAL = 1e-4
_COARSE_INTERVAL = 1e-3
# Above this noise multiplier the calibration gives up: nothing can be learned there.
_LARGEST_NOISE_MULTIPLIER = 1e6

_NEIGHBOURS = {
    Relation.ADD_REMOVE: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    Relation.REPLACE_ONE: dp_accounting.NeighboringRelation.REPLACE_ONE,
}


@dataclass(frozen=True, kw_only=True)
class GaussianEvent:
    """``steps`` releases of a clipped sum with Gaussian noise, over Poisson samples of units.

    ``noise_multiplier`` is the noise's standard deviation divided by the clip norm of one unit.
    ``sampling_rate`` is the Poisson probability of each unit, 1 for the whole cohort.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that describe no mechanism."""
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PrivacyError(
                f"noise multiplier: expected a finite number above 0, found "
                f"{self.noise_multiplier}; a release without noise has no ε"
            )
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(
                f"sampling rate: expected a probability in (0, 1], found {self.sampling_rate}"
            )
        if self.steps < 1:
            raise PrivacyError(f"steps: expected at least 1, found {self.steps}")


Event = GaussianEvent


def epsilon(events: Sequence[Event], *, delta: float, relation: Relation) -> float:
    """The ε at ``delta`` of all ``events`` composed; 0 for none.

    Source: PLD composition, Koskela, Jälkö & Honkela 2020 (arXiv 1906.03049).

    >>> round(epsilon([GaussianEvent(noise_multiplier=4.0)], delta=1e-5,
    ...               relation=Relation.ADD_REMOVE), 2)
    0.9
    """
    check_delta(delta)
    if not events:
        return 0.0
    return float(_composed(_merged(events), relation, _INTERVAL).get_epsilon_for_delta(delta))


def calibrate(
    events_at: Any,
    *,
    epsilon: float,
    delta: float,
    relation: Relation,
    tolerance: float = 1e-3,
) -> float:
    """The smallest noise multiplier whose events stay at or under (``epsilon``, ``delta``).

    ``events_at(noise_multiplier)`` gives the whole run's events at that noise. The bisection keeps
    the private side of the root, so the answer never exceeds the target.

    Raises PrivacyError when ``epsilon`` is not positive or no noise suffices.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"ε: expected a finite number above 0, found {epsilon}")
    check_delta(delta)

    def spent(noise_multiplier: float, interval: float) -> float:
        merged = _merged(events_at(noise_multiplier))
        return float(_composed(merged, relation, interval).get_epsilon_for_delta(delta))

    # A coarse grid finds the neighbourhood cheaply; the fine grid settles the answer.
    low, high = 0.0, 1.0
    while spent(high, _COARSE_INTERVAL) > epsilon:
        low, high = high, high * 2
        if high > _LARGEST_NOISE_MULTIPLIER:
            raise PrivacyError(
                f"ε = {epsilon} at δ = {delta} cannot be reached with any noise; "
                f"use fewer steps or a larger ε"
            )
    low = max(low, high / 2 if low else 0.05)
    while (high - low) > tolerance * high / 2:
        middle = (low + high) / 2
        if spent(middle, _COARSE_INTERVAL) <= epsilon:
            high = middle
        else:
            low = middle
    # The grids disagree by a hair, in either direction: walk down while private, then up until so.
    while spent(high * (1 - tolerance), _INTERVAL) <= epsilon and high > 0.05:
        high *= 1 - tolerance
    while spent(high, _INTERVAL) > epsilon:
        high *= 1 + tolerance
    return high


def check_delta(delta: float) -> None:
    """Refuse a δ that is no probability of failure."""
    if not 0 < delta < 1:
        raise PrivacyError(f"δ: expected a number in (0, 1), far below 1 / patients, found {delta}")


def _merged(events: Sequence[Event]) -> tuple[GaussianEvent, ...]:
    """Identical mechanisms become one event with their steps added."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[(event.noise_multiplier, event.sampling_rate)] += event.steps
    return tuple(
        GaussianEvent(noise_multiplier=noise, sampling_rate=rate, steps=count)
        for (noise, rate), count in sorted(steps.items())
    )


@lru_cache(maxsize=4096)
def _event_pld(event: GaussianEvent, relation: Relation, interval: float) -> Any:
    if event.sampling_rate == 1.0:
        # T Gaussian releases of one cohort are exactly one with σ/√T.
        return pld_lib.from_gaussian_mechanism(
            standard_deviation=event.noise_multiplier / math.sqrt(event.steps),
            value_discretization_interval=interval,
            neighboring_relation=_NEIGHBOURS[relation],
        )
    one = pld_lib.from_gaussian_mechanism(
        standard_deviation=event.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=event.sampling_rate,
        neighboring_relation=_NEIGHBOURS[relation],
    )
    return one.self_compose(event.steps)


@lru_cache(maxsize=1024)
def _composed(events: tuple[GaussianEvent, ...], relation: Relation, interval: float) -> Any:
    total = _event_pld(events[0], relation, interval)
    for event in events[1:]:
        total = total.compose(_event_pld(event, relation, interval))
    return total
