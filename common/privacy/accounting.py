"""Privacy accounting by privacy loss distributions (PLD).

An event records the mathematics of a release, never how it was computed. Events compose by
convolving their privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022, "Connect
the dots"), never by adding ε. An event of unknown type is unsupported, never free.

PLD composition holds for mechanisms fixed in advance. Where a mechanism's parameters were chosen
after earlier releases were seen, ``common.privacy.filter`` applies instead.

The Gaussian-DP (GDP) central-limit formula is not used anywhere for a reported figure: it
understates ε.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from common.errors import PrivacyError
from common.privacy import pld
from common.privacy.units import Relation

# Outside these bounds a search for noise gives up: there is nothing to learn, or nothing to hide.
_SMALLEST_NOISE_MULTIPLIER = 0.05
_LARGEST_NOISE_MULTIPLIER = 1e6
# The tree's leaves and nodes hold 16 to 128 KiB each.
_CACHED_DISTRIBUTIONS = 2048


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
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PrivacyError(f"steps: expected a whole number of at least 1, found {self.steps}")


Event = GaussianEvent


def epsilon(events: Iterable[Event], *, delta: float, relation: Relation) -> float:
    """The ε at ``delta`` of all ``events`` composed; 0 for none, infinite where none is finite.

    An upper bound, within a few tenths of a percent of the exact value (see ``pld``).
    Source: PLD composition, Koskela, Jälkö & Honkela 2020 (arXiv 1906.03049).

    >>> round(epsilon([GaussianEvent(noise_multiplier=4.0)], delta=1e-5,
    ...               relation=Relation.ADD_REMOVE), 2)
    0.93
    """
    check_delta(delta)
    together = merged(events)
    return _epsilon(together, delta, relation) if together else 0.0


@lru_cache(maxsize=_CACHED_DISTRIBUTIONS)
def _epsilon(events: tuple[GaussianEvent, ...], delta: float, relation: Relation) -> float:
    return _composed(events, relation, 0).epsilon(delta)


def library_epsilon(events: Iterable[Event], *, delta: float, relation: Relation) -> float:
    """The same ε by ``dp-accounting``, an independent library; slow for many distinct events.

    Statements are checked against it: two implementations must fail alike to mislead anyone.
    """
    check_delta(delta)
    return _library_epsilon(merged(events), delta, relation)


@lru_cache(maxsize=256)
def _library_epsilon(events: tuple[GaussianEvent, ...], delta: float, relation: Relation) -> float:
    import dp_accounting  # noqa: PLC0415 (a second to load, and only statements need it)

    neighbours = {
        Relation.ADD_REMOVE: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        Relation.REPLACE_ONE: dp_accounting.NeighboringRelation.REPLACE_ONE,
    }
    accountant = dp_accounting.pld.PLDAccountant(neighbours[relation])
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(
            dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
            if event.sampling_rate < 1
            else gaussian,
            event.steps,
        )
    return float(accountant.get_epsilon(delta))


def calibrate(
    events_at: Callable[[float], Sequence[Event]],
    *,
    epsilon: float,
    delta: float,
    relation: Relation,
    tolerance: float = 1e-3,
) -> float:
    """The smallest noise multiplier whose events stay at or under (``epsilon``, ``delta``).

    ``events_at(noise_multiplier)`` gives the whole run's events at that noise. The bisection keeps
    the private side of the root, so the answer never exceeds the target; it is at most a fraction
    ``tolerance`` above the root.

    Raises PrivacyError when ``epsilon`` is not positive or no noise suffices.
    """

    def is_private(noise_multiplier: float) -> bool:
        together = merged(events_at(noise_multiplier))
        return not together or _composed(together, relation, 0).epsilon(delta) <= epsilon

    return smallest_noise(is_private, epsilon=epsilon, delta=delta, tolerance=tolerance)


def smallest_noise(
    is_private: Callable[[float], bool], *, epsilon: float, delta: float, tolerance: float
) -> float:
    """The search behind ``calibrate``, for any accountant.

    ``is_private(noise_multiplier)``: whether the run keeps (``epsilon``, ``delta``) at that noise.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"ε: expected a finite number above 0, found {epsilon}")
    check_delta(delta)
    low, high = _SMALLEST_NOISE_MULTIPLIER, 1.0
    if is_private(low):
        return low
    while not is_private(high):
        low, high = high, high * 2
        if high > _LARGEST_NOISE_MULTIPLIER:
            raise PrivacyError(
                f"ε = {epsilon} at δ = {delta} cannot be reached with any noise; "
                f"use fewer steps or a larger ε"
            )
    while high - low > tolerance * low:
        middle = math.sqrt(low * high)
        if is_private(middle):
            high = middle
        else:
            low = middle
    return high


def check_delta(delta: float) -> None:
    """Refuse a δ that is no probability of failure."""
    if not 0 < delta < 1:
        raise PrivacyError(f"δ: expected a number in (0, 1), far below 1 / patients, found {delta}")


def merged(events: Iterable[Event]) -> tuple[GaussianEvent, ...]:
    """The shortest equivalent list, in a fixed order: equal for equal privacy.

    Identical mechanisms become one with their steps added. Whole-cohort releases are exactly one
    Gaussian, whose 1/σ² is the sum of theirs.

    >>> merged([GaussianEvent(noise_multiplier=2.0)] * 4)
    (GaussianEvent(noise_multiplier=1.0, sampling_rate=1.0, steps=1),)
    """
    known = tuple(events)
    for event in known:
        if type(event) is not GaussianEvent:
            raise PrivacyError(
                f"event: expected a GaussianEvent, found {type(event).__name__}; "
                f"an unknown mechanism is unsupported, never free"
            )
    return _merged(known)


@lru_cache(maxsize=_CACHED_DISTRIBUTIONS)
def _merged(events: tuple[GaussianEvent, ...]) -> tuple[GaussianEvent, ...]:
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[(event.sampling_rate, event.noise_multiplier)] += event.steps
    precision = math.fsum(count / noise**2 for (rate, noise), count in steps.items() if rate == 1)
    together = [
        GaussianEvent(noise_multiplier=noise, sampling_rate=rate, steps=count)
        for (rate, noise), count in sorted(steps.items())
        if rate != 1
    ]
    if precision:
        together.append(GaussianEvent(noise_multiplier=1 / math.sqrt(precision)))
    return tuple(together)


@lru_cache(maxsize=_CACHED_DISTRIBUTIONS)
def _event_pld(event: GaussianEvent, relation: Relation) -> pld.Pld:
    return pld.gaussian(
        noise_multiplier=event.noise_multiplier,
        sampling_rate=event.sampling_rate,
        steps=event.steps,
        replace_one=relation is Relation.REPLACE_ONE,
    )


@lru_cache(maxsize=_CACHED_DISTRIBUTIONS)
def _composed(events: tuple[GaussianEvent, ...], relation: Relation, depth: int) -> pld.Pld:
    """All ``events``, which agree in the first ``depth`` bits of their mechanism's address.

    Splitting by address, not by position, means that one more event changes one path of the tree
    and every other node is found in the cache.
    """
    if len(events) == 1:
        return _event_pld(events[0], relation)
    halves: tuple[list[GaussianEvent], list[GaussianEvent]] = ([], [])
    for event in events:
        address = _address(event.noise_multiplier, event.sampling_rate)
        halves[address >> depth & 1].append(event)
    if not halves[0] or not halves[1]:
        return _composed(events, relation, depth + 1)
    left, right = (_composed(tuple(half), relation, depth + 1) for half in halves)
    return pld.compose(left, right)


@lru_cache(maxsize=2 * _CACHED_DISTRIBUTIONS)
def _address(noise_multiplier: float, sampling_rate: float) -> int:
    """256 well-mixed bits that name a mechanism, whatever its number of steps."""
    name = f"{noise_multiplier!r} {sampling_rate!r}".encode()
    return int.from_bytes(hashlib.sha256(name).digest(), "big")
