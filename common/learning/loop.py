"""The training loop: three functions over explicit state, for public and private runs alike.

What differs between them is only where the gradient comes from (see ``gradients``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from common.learning.optimisers import Moments, Plateau, learning_rate_at, update
from common.stages import OptimiserSpec

Gradient = Callable[[Tensor], Tensor]
"""Gives the (possibly noised) mean gradient at weights, both [d]; or [K, d] of K hospitals."""

_PLATEAU_CHECK_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Where training stands. ``step`` counts from the start of the stage, over all its rounds."""

    step: int
    weights: Tensor
    moments: Moments
    plateau: Plateau = Plateau()


def init(weights: Tensor, *, first_step: int = 0) -> LoopState:
    """Start from ``weights`` with no memory of earlier gradients."""
    return LoopState(step=first_step, weights=weights, moments=Moments.zeros(weights))


def step(
    state: LoopState, gradient: Gradient, spec: OptimiserSpec, *, first_step: int, total_steps: int
) -> LoopState:
    """One step. ``total_steps`` is the length of the stage, for the schedule."""
    rate = learning_rate_at(spec, state.step, total_steps) * state.plateau.scale
    weights, moments = update(
        spec,
        state.moments,
        state.weights,
        gradient(state.weights),
        step=state.step - first_step,
        learning_rate=rate,
    )
    return LoopState(step=state.step + 1, weights=weights, moments=moments, plateau=state.plateau)


def run(
    weights: Tensor,
    gradient: Gradient,
    spec: OptimiserSpec,
    *,
    steps: int,
    first_step: int = 0,
    total_steps: int | None = None,
    watch: Callable[[Tensor], float] | None = None,
) -> Tensor:
    """``steps`` steps from ``weights``; the final weights.

    ``watch`` gives the public loss that a ``plateau`` schedule follows; without it such a schedule
    is a ValueError, since no other loss may be looked at for free.
    """
    if spec.schedule == "plateau" and watch is None:
        raise ValueError("a plateau schedule needs a public loss to watch")
    state = init(weights, first_step=first_step)
    for _ in range(steps):
        state = step(state, gradient, spec, first_step=first_step, total_steps=total_steps or steps)
        if (
            watch is not None
            and spec.schedule == "plateau"
            and state.step % _PLATEAU_CHECK_EVERY == 0
        ):
            state = LoopState(
                step=state.step,
                weights=state.weights,
                moments=state.moments,
                plateau=state.plateau.seen(watch(state.weights)),
            )
    return state.weights
