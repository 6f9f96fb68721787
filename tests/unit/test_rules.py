"""Aggregation rules against their papers' equations, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from common.study import FederationSpec
from server import rules
from server.rules import Accumulator


def spec(rule: str, **changes: Any) -> FederationSpec:
    return FederationSpec.model_validate({"rule": rule} | changes)


def walk(settings_: FederationSpec, updates: list[float], rounds: int | None = None) -> list[float]:
    """Weights after each round, from 1.0."""
    state = rules.start(torch.tensor([1.0]))
    seen = []
    for number, one in enumerate(updates):
        state = rules.apply(
            settings_,
            state,
            torch.tensor([one]),
            round_number=number,
            rounds=rounds or len(updates),
        )
        seen.append(float(state.weights))
    return seen


def test_fedavg_adds_the_mean_update() -> None:
    """McMahan et al. 2017, algorithm 1, with a server step η (Reddi et al. 2021, algorithm 1)."""
    assert walk(spec("fedavg"), [0.5, -0.25]) == pytest.approx([1.5, 1.25])
    assert walk(spec("fedavg", server_learning_rate=0.5), [0.5, -0.25]) == pytest.approx(
        [1.25, 1.125]
    )


def test_fedprox_aggregates_as_fedavg() -> None:
    """Li et al. 2020: only the local objective differs."""
    assert walk(spec("fedprox", proximal_mu=0.1), [0.5, -0.25]) == pytest.approx([1.5, 1.25])


def test_fedavgm_accumulates_momentum() -> None:
    """Hsu, Qi & Brown 2019, section 4.3: v ← β v + Δ; w ← w + η v."""
    # v: 1, 0.5·1 + 2 = 2.5, 0.5·2.5 − 1 = 0.25; w: 1 + 0.1 v.
    found = walk(spec("fedavgm", momentum=0.5, server_learning_rate=0.1), [1.0, 2.0, -1.0])
    assert found == pytest.approx([1.1, 1.35, 1.375])


def test_fedadam_by_hand() -> None:
    """Reddi et al. 2021 (arXiv 2003.00295), algorithm 2, FedAdam; v₋₁ = τ²."""
    # β₁ = .5, β₂ = .75, τ = .1, η = 1, Δ = 1 then 0:
    # m = .5, v = .75·.01 + .25·1 = .2575, w = 1 + .5 / (√.2575 + .1);
    # m = .25, v = .75·.2575 = .193125, w += .25 / (√.193125 + .1).
    found = walk(spec("fedadam", momentum=0.5, beta2=0.75, tau=0.1), [1.0, 0.0])
    first = 1 + 0.5 / (math.sqrt(0.2575) + 0.1)
    assert found == pytest.approx([first, first + 0.25 / (math.sqrt(0.193125) + 0.1)])


def test_fedyogi_by_hand() -> None:
    """The same, FedYogi: v ← v − (1 − β₂) Δ² sign(v − Δ²)."""
    # Δ = 1: v = .01 + .25 = .26. Δ = .1: Δ² = .01 < .26, so v = .26 − .25·.01 = .2575.
    found = walk(spec("fedyogi", momentum=0.5, beta2=0.75, tau=0.1), [1.0, 0.1])
    first = 1 + 0.5 / (math.sqrt(0.26) + 0.1)
    assert found == pytest.approx(
        [first, first + (0.25 + 0.05) / (math.sqrt(0.2575) + 0.1)], rel=1e-6
    )


def test_the_tail_is_the_mean_of_the_last_rounds() -> None:
    """Polyak & Juditsky 1992: the average of the last iterates, here of half of four."""

    def result(share: float) -> float:
        state = rules.start(torch.tensor([0.0]))
        for number in range(4):
            state = rules.apply(
                spec("fedavg", tail_average=share),
                state,
                torch.tensor([1.0]),
                round_number=number,
                rounds=4,
            )
        return float(rules.result(state))

    assert result(0.0) == 4.0
    assert result(0.5) == pytest.approx((3 + 4) / 2)
    assert result(1.0) == pytest.approx((1 + 2 + 3 + 4) / 4)


def test_an_exponential_average_by_hand() -> None:
    """Models 1, 2, 4 at β = 0.5 count ¼, ½ and 1: (¼·1 + ½·2 + 4) / 1.75 = 3."""
    state = rules.start(torch.tensor([0.0]))
    for number, update in enumerate([1.0, 1.0, 2.0]):
        state = rules.apply(
            spec("fedavg", ema=0.5), state, torch.tensor([update]), round_number=number, rounds=3
        )
    assert float(state.weights) == 4.0  # what hospitals go on from is not averaged
    assert float(rules.result(state)) == pytest.approx((0.25 * 1 + 0.5 * 2 + 4) / 1.75)


def test_two_averages_are_refused() -> None:
    with pytest.raises(ValidationError, match="give one, found 0.9 and 0.5"):
        spec("fedavg", ema=0.9, tail_average=0.5)


def test_a_rule_leaves_its_state_alone() -> None:
    state = rules.start(torch.ones(2))
    rules.apply(spec("fedyogi"), state, torch.ones(2), round_number=0, rounds=1)
    assert state.weights.tolist() == [1.0, 1.0]
    assert state.first.tolist() == state.second.tolist() == [0.0, 0.0]


def accumulated(updates: list[tuple[Tensor, float]]) -> Accumulator:
    total = Accumulator.empty(3)
    for update, weight in updates:
        total = total.add(update, weight)
    assert total.hospitals == len(updates)
    return total


def mean(updates: list[tuple[Tensor, float]]) -> Tensor:
    return accumulated(updates).mean()


def summed(updates: list[tuple[Tensor, float]]) -> Tensor:
    return accumulated(updates).total()


def test_a_weighted_mean() -> None:
    found = mean([(torch.tensor([1.0, 0, 0]), 30), (torch.tensor([5.0, 4, 0]), 10)])
    assert found.tolist() == [2.0, 1.0, 0.0]
    assert mean([]).tolist() == [0.0, 0.0, 0.0]


@given(
    st.permutations(range(8)),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=24, max_size=24),
)
def test_the_order_of_arrival_changes_no_bit(order: list[int], numbers: list[float]) -> None:
    updates = [
        (torch.tensor(numbers[3 * one : 3 * one + 3], dtype=torch.float32), 10.0 + one)
        for one in range(8)
    ]
    assert torch.equal(summed([updates[one] for one in order]), summed(updates))
    exact = [
        math.fsum(float(update[place]) * weight for update, weight in updates) for place in range(3)
    ]
    # Eight numbers, each rounded to a multiple of 2⁻⁴⁸; then the sum of both parts in float64.
    torch.testing.assert_close(
        summed(updates), torch.tensor(exact, dtype=torch.float64), rtol=2e-16, atol=8 * 2.0**-49
    )


def test_updates_are_not_changed_by_summing() -> None:
    update = torch.ones(3)
    mean([(update, 2.0), (update, 3.0)])
    assert update.tolist() == [1.0, 1.0, 1.0]
