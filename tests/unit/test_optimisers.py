"""Our pure optimisers take the very steps of PyTorch's."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common.learning import loop
from common.learning.optimisers import Moments, Plateau, learning_rate_at, update
from common.stages import OptimiserSpec

STEPS = 200


def spec(kind: str = "sgd", **changes: Any) -> OptimiserSpec:
    return OptimiserSpec.model_validate({"kind": kind, "learning_rate": 0.05} | changes)


def slope(weights: Tensor) -> Tensor:
    """The gradient of an uneven, not quite convex valley."""
    scales = torch.linspace(0.1, 3.0, weights.numel(), dtype=weights.dtype)
    return scales * weights + torch.sin(3 * weights)


def theirs(kind: str, parameters: list[Tensor], decay: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, weight_decay=decay)
    if kind == "momentum":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.8, weight_decay=decay)
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    return make(parameters, lr=0.05, betas=(0.8, 0.98), weight_decay=decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw"])
def test_steps_equal_pytorch(kind: str, decay: float) -> None:
    ours = start = torch.linspace(-2, 2, 11, dtype=torch.float64)
    weights = start.clone().requires_grad_()
    optimiser = theirs(kind, [weights], decay)
    settings = spec(kind, momentum=0.8, beta2=0.98, weight_decay=decay)
    moments = Moments.zeros(ours)
    for step in range(STEPS):
        gradient = slope(ours)
        ours, moments = update(settings, moments, ours, gradient, step=step, learning_rate=0.05)
        weights.grad = slope(weights.detach())
        optimiser.step()
        torch.testing.assert_close(ours, weights.detach(), rtol=1e-9, atol=1e-9)
    assert float((ours - start).norm()) > 1  # they did move


def test_a_step_leaves_its_arguments_alone() -> None:
    weights, gradient = torch.ones(3), torch.ones(3)
    update(spec("adam"), Moments.zeros(weights), weights, gradient, step=0, learning_rate=1.0)
    assert weights.tolist() == gradient.tolist() == [1.0, 1.0, 1.0]


def rates(settings: OptimiserSpec, steps: int) -> list[float]:
    return [learning_rate_at(settings, step, steps) for step in range(steps)]


def test_schedules() -> None:
    assert rates(spec(schedule="constant"), 3) == [0.05] * 3
    assert rates(spec(schedule="plateau"), 3) == [0.05] * 3
    cosine = rates(spec(schedule="cosine", learning_rate=2.0), 10)
    assert cosine == pytest.approx([1 + math.cos(math.pi * step / 10) for step in range(10)])


def test_warm_up_rises_in_equal_steps_then_hands_over() -> None:
    warm = rates(spec(learning_rate=1.0, warmup=0.4), 10)
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    both = rates(spec(learning_rate=1.0, warmup=0.4, schedule="cosine"), 10)
    assert both[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert both[4:] == sorted(both[4:], reverse=True)
    assert rates(spec(learning_rate=1.0, warmup=0.99, schedule="cosine"), 1) == [1.0]


def test_a_plateau_halves_after_three_checks_without_gain() -> None:
    plateau = Plateau()
    scales = []
    for loss in (1.0, 0.9, 0.9, 0.8999, 0.95, 0.5, 0.5, 0.5, 0.5):
        plateau = plateau.seen(loss)
        scales.append(plateau.scale)
    assert scales == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]


def test_a_loop_descends_and_a_plateau_needs_a_public_loss() -> None:
    start = torch.tensor([3.0])
    final = loop.run(start, lambda weights: weights, spec(learning_rate=0.1), steps=30)
    assert float(final) == pytest.approx(3 * 0.9**30, rel=1e-5)
    assert start.tolist() == [3.0]
    with pytest.raises(ValueError, match="public loss to watch"):
        loop.run(start, lambda weights: weights, spec(schedule="plateau"), steps=1)


def test_a_watched_plateau_slows_the_loop() -> None:
    taken: list[float] = []

    def gradient(weights: Tensor) -> Tensor:
        taken.append(float(weights))
        return torch.ones(1)

    loop.run(
        torch.zeros(1),
        gradient,
        spec(schedule="plateau", learning_rate=1.0),
        steps=101,
        watch=lambda _: 1.0,  # it never gets better after the first check
    )
    moves = [round(one - two, 6) for one, two in itertools.pairwise(taken)]
    assert moves[:80] == [1.0] * 80
    assert moves[80:] == [0.5] * 20


def test_a_round_continues_the_stages_schedule() -> None:
    """Three rounds of four steps follow one cosine of twelve; moments start anew each round."""
    settings = spec(schedule="cosine", learning_rate=1.0)

    def constant(_: Tensor) -> Tensor:
        return torch.ones(1)

    weights, moved = torch.zeros(1), []
    for number in range(3):
        after = loop.run(
            weights, constant, settings, steps=4, first_step=4 * number, total_steps=12
        )
        moved.append(float(weights - after))
        weights = after
    expected = rates(settings, 12)
    assert moved == pytest.approx([sum(expected[4 * one : 4 * one + 4]) for one in range(3)])


def test_adam_of_a_later_round_corrects_its_bias_from_its_own_first_step() -> None:
    first = loop.run(torch.zeros(2), lambda _: torch.ones(2), spec("adam"), steps=1)
    later = loop.run(
        torch.zeros(2), lambda _: torch.ones(2), spec("adam"), steps=1, first_step=7, total_steps=9
    )
    torch.testing.assert_close(first, later)
    assert float(first[0]) == pytest.approx(-0.05)
