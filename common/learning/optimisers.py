"""Optimisers and schedules as pure functions over flat vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.stages import OptimiserSpec

_EPSILON = 1e-8  # Adam's guard against division by zero (Kingma & Ba 2015)


@dataclass(frozen=True)
class Moments:
    """First and second moment of the gradient, as the weights in shape; zeros at the start."""

    first: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> Moments:
        """No memory of any gradient, for weights like these; nothing is held until it is needed."""
        zero = like.new_zeros(()).expand_as(like)
        return cls(zero, zero)


def update(
    spec: OptimiserSpec,
    moments: Moments,
    weights: Tensor,
    gradient: Tensor,
    *,
    step: int,
    learning_rate: float,
) -> tuple[Tensor, Moments]:
    """New weights and moments after one step down ``gradient``, all of one shape.

    ``step`` counts from 0. Every number is updated by itself, so that [d] may be [K, d].

    ``sgd`` and ``momentum``: w ← w − η v with v ← μ v + g (μ = 0 for ``sgd``), Sutskever et al.
    2013. ``adam``: Kingma & Ba 2015, algorithm 1, decay added to the gradient. ``adamw``: decay
    apart from the gradient, Loshchilov & Hutter 2019, algorithm 2.
    """
    decay = spec.weight_decay
    if spec.kind in ("sgd", "momentum", "adam") and decay:
        gradient = gradient + decay * weights
    if spec.kind == "sgd":
        return torch.sub(weights, gradient, alpha=learning_rate), moments
    if spec.kind == "momentum":
        velocity = spec.momentum * moments.first + gradient
        return weights - learning_rate * velocity, replace(moments, first=velocity)
    first = spec.momentum * moments.first + (1 - spec.momentum) * gradient
    second = spec.beta2 * moments.second + (1 - spec.beta2) * gradient.square()
    unbiased_first = first / (1 - spec.momentum ** (step + 1))
    unbiased_second = second / (1 - spec.beta2 ** (step + 1))
    direction = unbiased_first / (unbiased_second.sqrt() + _EPSILON)
    if spec.kind == "adamw":
        direction = direction + decay * weights
    return weights - learning_rate * direction, Moments(first, second)


def learning_rate_at(spec: OptimiserSpec, step: int, total_steps: int) -> float:
    """The learning rate of ``step`` (from 0) of ``total_steps``.

    A linear warm-up over the first ``warmup`` share of the steps; then constant, or a cosine down
    to zero (Loshchilov & Hutter 2017). ``plateau`` is constant here: :class:`Plateau` scales it.

    >>> spec = OptimiserSpec(kind="sgd", learning_rate=1.0, schedule="cosine")
    >>> [round(learning_rate_at(spec, step, 4), 2) for step in range(4)]
    [1.0, 0.85, 0.5, 0.15]
    """
    warmup_steps = round(spec.warmup * total_steps)
    if step < warmup_steps:
        return spec.learning_rate * (step + 1) / warmup_steps
    if spec.schedule != "cosine":
        return spec.learning_rate
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Plateau:
    """Halves the learning rate when a watched *public* loss stops falling.

    ``patience`` checks without an improvement of ``margin`` (relative) halve ``scale``.
    """

    scale: float = 1.0
    best: float = math.inf
    waited: int = 0
    patience: int = 3
    margin: float = 1e-3

    def seen(self, loss: float) -> Plateau:
        """The state after a check that measured ``loss``."""
        if loss < self.best * (1 - self.margin):
            return replace(self, best=loss, waited=0)
        if self.waited + 1 < self.patience:
            return replace(self, waited=self.waited + 1)
        return replace(self, scale=self.scale / 2, waited=0)
