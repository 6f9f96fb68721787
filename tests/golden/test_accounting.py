"""Accounting against independently computed values and against dp-accounting."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import dp_accounting
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.accounting import GaussianEvent, calibrate, epsilon, merged
from common.privacy.units import Relation

ADD = Relation.ADD_REMOVE
REPLACE = Relation.REPLACE_ONE


def event(rate: float, noise: float, steps: int) -> GaussianEvent:
    return GaussianEvent(noise_multiplier=noise, sampling_rate=rate, steps=steps)


@pytest.mark.parametrize(
    ("events", "delta", "expected"),
    [
        # Computed with an independent PLD accountant (issues 2 and 3 of this project).
        ([event(0.0256, 1.0, 1170)], 1e-5, 5.57),
        ([event(0.128, 2.0, 350)], 1e-4, 5.25),
        ([event(0.041, 4.0, 2400)], 1e-6, 2.33),
        ([event(0.064, 1.5, 50), event(0.128, 2.0, 40)] * 10, 1e-5, 8.61),
        ([event(0.064, 1.5, 50), event(0.128, 2.0, 40)] * 100, 1e-5, 37.4),
    ],
)
def test_matches_independent_values(
    events: list[GaussianEvent], delta: float, expected: float
) -> None:
    assert epsilon(events, delta=delta, relation=ADD) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("relation", [ADD, REPLACE])
@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta", "interval"),
    [
        (0.0256, 1.0, 1170, 1e-5, 1e-4),
        (0.5, 8.0, 10, 1e-8, 1e-4),
        (0.01, 0.5, 1, 1e-6, 1e-3),
        (1e-3, 0.5, 1000, 1e-6, 1e-3),
        (0.9, 0.8, 3, 1e-5, 1e-3),
        (0.999, 1.0, 5, 1e-5, 1e-3),
        (1.0, 0.3, 1, 1e-5, 1e-3),
        (1.0, 4.0, 9, 1e-10, 1e-4),
        (0.001, 10.0, 1000, 1e-9, 1e-5),
    ],
)
def test_agrees_with_dp_accounting(
    rate: float, noise: float, steps: int, delta: float, interval: float, relation: Relation
) -> None:
    neighbours = {
        ADD: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        REPLACE: dp_accounting.NeighboringRelation.REPLACE_ONE,
    }
    oracle = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise,
        sampling_prob=rate,
        value_discretization_interval=interval,
        neighboring_relation=neighbours[relation],
    )
    upper = oracle.self_compose(steps).get_epsilon_for_delta(delta)
    ours = epsilon([event(rate, noise, steps)], delta=delta, relation=relation)
    assert ours == pytest.approx(upper, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("relation", [ADD, REPLACE])
@pytest.mark.parametrize("noise", [0.2, 0.7, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("delta", [1e-4, 1e-7, 1e-10])
def test_never_below_the_exact_gaussian(noise: float, delta: float, relation: Relation) -> None:
    """Balle & Wang 2018, theorem 8, is exact for a whole-cohort Gaussian."""
    sensitivity = 1.0 if relation is ADD else 2.0
    ours = epsilon([event(1.0, noise, 1)], delta=delta, relation=relation)
    exact = dp_accounting.get_epsilon_gaussian(noise / sensitivity, delta)
    assert ours >= exact * (1 - 1e-9)
    assert ours == pytest.approx(exact, rel=1e-3, abs=2e-5)


def test_many_steps_of_a_gaussian_stay_above_the_exact_value() -> None:
    """Forcing the FFT path: a rate of almost 1 must not undercut the exact rate 1."""
    subsampled = epsilon([event(1 - 1e-9, 20.0, 400)], delta=1e-6, relation=ADD)
    exact = dp_accounting.get_epsilon_gaussian(1.0, 1e-6)
    assert exact * (1 - 1e-6) <= subsampled <= exact * 1.002


def test_whole_cohort_releases_merge_exactly() -> None:
    together = merged([event(1.0, 3.0, 2), event(1.0, 5.0, 1), event(1.0, 3.0, 1)])
    assert len(together) == 1
    assert together[0].noise_multiplier == pytest.approx(1 / math.sqrt(3 / 9 + 1 / 25))


def test_replace_one_costs_more_than_add_remove() -> None:
    events = [event(0.05, 1.0, 100)]
    assert epsilon(events, delta=1e-5, relation=REPLACE) > epsilon(events, delta=1e-5, relation=ADD)


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], delta=1e-5, relation=ADD) == 0.0


@pytest.mark.parametrize("relation", [ADD, REPLACE])
def test_a_thousand_distinct_events_take_seconds_not_minutes(relation: Relation) -> None:
    events = [event(0.001 + i * 1.1e-4, 0.8 + i * 7e-3, 1 + i % 400) for i in range(1000)]
    start_s = time.thread_time()
    whole = epsilon(events, delta=1e-5, relation=relation)
    # A few by `consilium bench privacy`; the library takes 16 ms and more for each.
    assert time.thread_time() - start_s < 15.0
    assert epsilon(events[::-1], delta=1e-5, relation=relation) == whole


def test_a_tree_of_distinct_events_agrees_with_dp_accounting() -> None:
    events = [event(0.01 * i, 0.7 + 0.3 * i, 10 * i) for i in range(1, 13)]
    total = None
    for each in events:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=each.noise_multiplier,
            sampling_prob=each.sampling_rate,
            value_discretization_interval=1e-3,
        ).self_compose(each.steps)
        total = one if total is None else total.compose(one)
    assert total is not None
    ours = epsilon(events, delta=1e-6, relation=ADD)
    assert ours == pytest.approx(total.get_epsilon_for_delta(1e-6), rel=2e-3)


@pytest.mark.parametrize("relation", [ADD, REPLACE])
@pytest.mark.parametrize("target", [0.3, 1.0, 8.0])
def test_calibration_stays_on_the_private_side(target: float, relation: Relation) -> None:
    def events_at(noise: float) -> list[GaussianEvent]:
        return [event(0.064, noise, 200), event(1.0, 4 * noise, 3)]

    noise = calibrate(events_at, epsilon=target, delta=1e-5, relation=relation)
    assert epsilon(events_at(noise), delta=1e-5, relation=relation) <= target
    assert epsilon(events_at(noise * 0.99), delta=1e-5, relation=relation) > target * 0.999


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_calibration_refuses_an_absurd_epsilon(target: float) -> None:
    with pytest.raises(PrivacyError, match="ε: expected"):
        calibrate(lambda s: [event(1.0, s, 1)], epsilon=target, delta=1e-5, relation=ADD)


def test_calibration_says_when_no_noise_suffices() -> None:
    with pytest.raises(PrivacyError, match="cannot be reached"):
        calibrate(lambda _: [event(1.0, 1.0, 1)], epsilon=0.1, delta=1e-5, relation=ADD)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_an_absurd_delta_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="δ: expected"):
        epsilon([event(1.0, 1.0, 1)], delta=delta, relation=ADD)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 1.0, "sampling_rate": 0.0},
        {"noise_multiplier": 1.0, "sampling_rate": 1.01},
        {"noise_multiplier": 1.0, "sampling_rate": math.nan},
        {"noise_multiplier": 1.0, "steps": 0},
        {"noise_multiplier": 1.0, "steps": True},
        {"noise_multiplier": 1.0, "steps": 1.5},
    ],
)
def test_impossible_events_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PrivacyError, match="expected"):
        GaussianEvent(**wrong)  # type: ignore[arg-type]


def test_an_unknown_event_is_unsupported_never_free() -> None:
    @dataclass(frozen=True)
    class Laplace:
        noise_multiplier: float = 1.0
        sampling_rate: float = 1.0
        steps: int = 1

    with pytest.raises(PrivacyError, match="unsupported, never free"):
        epsilon([Laplace()], delta=1e-5, relation=ADD)  # type: ignore[list-item]


events_strategy = st.builds(
    event,
    st.sampled_from([0.001, 0.02, 0.3, 1.0]),
    st.floats(0.5, 20.0),
    st.integers(1, 300),
)


@settings(max_examples=40)
@given(
    st.lists(events_strategy, min_size=1, max_size=5),
    events_strategy,
    st.sampled_from([ADD, REPLACE]),
    st.sampled_from([1e-4, 1e-7]),
)
def test_more_releases_never_cost_less(
    events: list[GaussianEvent], more: GaussianEvent, relation: Relation, delta: float
) -> None:
    before = epsilon(events, delta=delta, relation=relation)
    after = epsilon([*events, more], delta=delta, relation=relation)
    # Each is an upper bound within a few tenths of a percent, on a grid of its own.
    assert after >= before * 0.995 - 1e-6


@settings(max_examples=40)
@given(events_strategy, st.floats(1.05, 4.0), st.sampled_from([ADD, REPLACE]))
def test_more_noise_never_costs_more(one: GaussianEvent, factor: float, relation: Relation) -> None:
    quieter = epsilon([one], delta=1e-6, relation=relation)
    noisier = epsilon(
        [event(one.sampling_rate, one.noise_multiplier * factor, one.steps)],
        delta=1e-6,
        relation=relation,
    )
    assert noisier <= quieter * 1.005 + 1e-6
