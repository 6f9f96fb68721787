"""The filter stops in time, and its divergences are the published ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.accounting import GaussianEvent, epsilon
from common.privacy.filter import RdpFilter, renyi
from common.privacy.units import Relation

ADD = Relation.ADD_REMOVE


def test_gaussian_divergence_is_mironovs() -> None:
    events = [GaussianEvent(noise_multiplier=2.0, steps=3)]
    assert renyi(events, order=5.0, relation=ADD) == pytest.approx(3 * 5.0 / 8.0)
    assert renyi(events, order=5.0, relation=Relation.REPLACE_ONE) == pytest.approx(7.5)


def test_sampling_amplifies_under_add_remove() -> None:
    sampled = [GaussianEvent(noise_multiplier=2.0, sampling_rate=0.01)]
    whole = [GaussianEvent(noise_multiplier=2.0)]
    assert renyi(sampled, order=5.0, relation=ADD) < renyi(whole, order=5.0, relation=ADD) / 100


@settings(max_examples=30)
@given(
    st.floats(0.5, 10.0),
    st.sampled_from([1e-4, 1e-6]),
    st.lists(
        st.tuples(st.sampled_from([0.02, 0.2, 1.0]), st.floats(1.0, 20.0), st.integers(1, 50)),
        max_size=30,
    ),
    st.sampled_from(list(Relation)),
)
def test_what_the_filter_admits_never_exceeds_its_epsilon(
    target: float,
    delta: float,
    steps: list[tuple[float, float, int]],
    relation: Relation,
) -> None:
    state = RdpFilter.opened(epsilon=target, delta=delta, relation=relation)
    admitted: list[GaussianEvent] = []
    for rate, noise, count in steps:
        event = GaussianEvent(noise_multiplier=noise, sampling_rate=rate, steps=count)
        try:
            state = state.charge([event])
        except PrivacyError:
            continue
        admitted.append(event)
    assert state.spent_epsilon() <= target * (1 + 1e-12)
    # The exact composition is never above the filter's own bound.
    assert epsilon(admitted, delta=delta, relation=relation) <= target * 1.003


def test_a_refused_step_is_not_charged() -> None:
    state = RdpFilter.opened(epsilon=1.0, delta=1e-5, relation=ADD)
    with pytest.raises(PrivacyError, match=r"privacy filter: expected .* stop, or add noise"):
        state.charge([GaussianEvent(noise_multiplier=0.1)])
    assert state.spent == 0.0


def test_a_known_round_gets_a_better_order() -> None:
    typical = [GaussianEvent(noise_multiplier=1.5, sampling_rate=0.064, steps=10)]
    plain = RdpFilter.opened(epsilon=3.0, delta=1e-5, relation=ADD)
    informed = RdpFilter.opened(epsilon=3.0, delta=1e-5, relation=ADD, expected=typical)

    def rounds(state: RdpFilter) -> int:
        return math.floor(state.budget / renyi(typical, order=state.order, relation=ADD))

    assert rounds(informed) >= rounds(plain) > 0


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_an_absurd_budget_is_refused(wrong: float) -> None:
    with pytest.raises(PrivacyError, match="ε: expected"):
        RdpFilter.opened(epsilon=wrong, delta=1e-5, relation=ADD)
