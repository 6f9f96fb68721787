"""Aggregation rules: small pure functions over immutable state.

Updates are summed while replies stream in; only the running sum and the number of hospitals are
held. Sign convention: an update is (local weights − global weights), so the server *adds* it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.study import FederationSpec

# Numbers are split at fixed places, whatever they are summed with (Demmel & Nguyen 2013): multiples
# of 2⁻¹⁴ up to 2³⁷, and what is left of them as multiples of 2⁻⁴⁸. Adding and taking away a number
# whose last digit is worth that much rounds to it.
_COARSE, _FINE = 1.5 * 2.0**38, 1.5 * 2.0**4
_BLOCK = 2**14


@dataclass(frozen=True)
class Accumulator:
    """The weighted sum of the updates seen so far [d], bit for bit the same in any order.

    Both parts of it are sums without rounding, of up to a million updates.
    """

    coarse: NDArray[np.float64]
    fine: NDArray[np.float64]
    weight: float
    hospitals: int

    @classmethod
    def empty(cls, size: int) -> Accumulator:
        """Nothing seen yet."""
        return cls(np.zeros(size), np.zeros(size), 0.0, 0)

    def add(self, update: Tensor, weight: float) -> Accumulator:
        """With one more update [d]. Reuses the sum's memory: the old accumulator is spent."""
        # In blocks that stay in the processor's cache: nine passes, one over memory.
        values = update.numpy()
        for start in range(0, len(values), _BLOCK):
            block = slice(start, start + _BLOCK)
            rest = np.multiply(values[block], weight, dtype=np.float64)
            part = np.add(rest, _COARSE)
            part -= _COARSE
            rest -= part
            rest += _FINE
            rest -= _FINE
            self.coarse[block] += part
            self.fine[block] += rest
        return Accumulator(self.coarse, self.fine, self.weight + weight, self.hospitals + 1)

    def total(self) -> Tensor:
        """The weighted sum [d] in float64."""
        return torch.from_numpy(self.coarse + self.fine)

    def mean(self) -> Tensor:
        """The weighted mean update [d]; zero if nothing came."""
        total = self.total()
        return (total / self.weight if self.weight else total).float()


@dataclass(frozen=True)
class RuleState:
    """Global weights [d], the rule's two moments [d], and what the result is the mean of:
    the weighted sum [d] of rounds' models, and the sum of their weights."""

    weights: Tensor
    first: Tensor
    second: Tensor
    average_sum: Tensor
    average_weight: float = 0.0


def start(weights: Tensor) -> RuleState:
    """The state before the first round."""
    zeros = torch.zeros_like(weights)
    return RuleState(weights, zeros, zeros.clone(), torch.zeros_like(weights, dtype=torch.float64))


def apply(
    spec: FederationSpec, state: RuleState, update: Tensor, *, round_number: int, rounds: int
) -> RuleState:
    """The state after a round whose mean update is ``update`` [d].

    ``fedavg``, ``fedprox``: w + η Δ (McMahan et al. 2017; Li et al. 2020).
    ``fedavgm``: m ← β m + Δ, w + η m (Hsu et al. 2019, eq. 2).
    ``fedadam``, ``fedyogi``: Reddi et al. 2021 (arXiv 2003.00295), algorithm 2:
    m ← β₁ m + (1−β₁) Δ; v ← β₂ v + (1−β₂) Δ² (Adam) or v − (1−β₂) Δ² sign(v − Δ²) (Yogi);
    w + η m / (√v + τ), with v starting at τ².

    With ``tail_average`` the models of the last rounds count alike in the result; with ``ema`` all
    rounds' do, each ``ema`` times as much as the one after it.
    """
    rate, beta1, beta2, tau = (spec.server_learning_rate, spec.momentum, spec.beta2, spec.tau)
    first, second = state.first, state.second
    if spec.rule in ("fedavg", "fedprox"):
        move = update
    elif spec.rule == "fedavgm":
        first = beta1 * first + update
        move = first
    else:
        square = update.square()
        if round_number == 0:
            second = torch.full_like(second, tau**2)
        first = beta1 * first + (1 - beta1) * update
        if spec.rule == "fedadam":
            second = beta2 * second + (1 - beta2) * square
        else:
            second = second - (1 - beta2) * square * torch.sign(second - square)
        move = first / (second.sqrt() + tau)
    weights = state.weights + rate * move
    state = replace(state, weights=weights, first=first, second=second)
    fade = spec.ema or 1.0
    if spec.ema or round_number >= rounds - round(spec.tail_average * rounds):
        state = replace(
            state,
            average_sum=fade * state.average_sum + weights.double(),
            average_weight=fade * state.average_weight + 1,
        )
    return state


def result(state: RuleState) -> Tensor:
    """The stage's final weights [d]: the weighted mean of rounds' models, or the last one."""
    if state.average_weight:
        return (state.average_sum / state.average_weight).float()
    return state.weights
