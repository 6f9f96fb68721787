"""What each trainable layer saw and what the loss asked of it, record by record.

One forward pass records every trainable layer's input; one backward pass, down to those layers'
outputs only, gives the derivative of each record's loss. From the two every per-record gradient,
its norm, or any weighted sum of them follows layer by layer, without a second backward pass
(Bu et al. 2023, "book-keeping", arXiv 2210.00038). Weight gradients of the plain sum, which no
private step needs, are never computed. Layers without a rule are differentiated in the same
backward pass, by each record's own copy of their weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from common.errors import PrivacyError
from common.learning.unruled import copied
from common.models.checks import (
    check_private,
    check_records_apart,
    check_records_first,
    learners,
    place_of,
)
from common.place import here, wide
from common.tensors import trainable

_logger = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Per-record losses [rows] from answers [rows, outputs] and targets [rows, …]."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One use of one layer: its input and the loss's derivative at its output, [rows, …] each."""

    layer: nn.Module
    inputs: Tensor
    derivative: Tensor


@dataclass(frozen=True, eq=False)
class LayerGradient:
    """Per-record gradients [rows, …] of one parameter."""

    parameter: nn.Parameter
    each: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """Uses of layers that have a rule, and the gradients themselves of those that have none."""

    calls: list[LayerCall]
    gradients: list[LayerGradient]


class Capture:
    """Runs a model on records and keeps nothing: neither hooks nor sums outlive a call."""

    def __init__(self, model: nn.Module) -> None:
        """Raises PrivacyError when ``model`` has no per-record gradients."""
        check_private(model)
        self.model = model
        self.parameters = trainable(model)
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self._layers, self._unruled = learners(model)
        self._records_apart = False
        for layer in self._unruled:
            _say_once(type(layer).__name__)

    @property
    def learners(self) -> list[nn.Module]:
        """The layers that learn."""
        return [*self._layers, *self._unruled]

    def check(self, like: Tensor) -> None:
        """Refuse a model that mixes records of the kind of ``like`` [rows, …]; looked at once.

        Made-up records are asked about, so the model must be as it was given: not spread over
        groups of rows.
        """
        if not self._records_apart:
            check_records_apart(self.model, like)
            self._records_apart = True

    def __call__(self, loss: Loss, inputs: Tensor, targets: Tensor) -> Seen:
        """What of the trainable layers matters to the loss, at the model's weights.

        Raises PrivacyError when the model mixes records, in a way that shows only when it runs.
        """
        rows = len(inputs)
        self.check(inputs)
        if not self.model.training:
            self.model.train()
        buffers = list(self.model.buffers())
        versions = [(id(buffer), buffer._version) for buffer in buffers]
        seen: list[tuple[nn.Module, Tensor, int, Tensor, int, GradientEdge]] = []

        def note(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            given: Tensor = arguments[0]
            edge = get_gradient_edge(output)
            seen.append((layer, given.detach(), given._version, output, output._version, edge))

        handles = [layer.register_forward_hook(note) for layer in self._layers]
        try:
            with copied(self._unruled, rows) as copies:
                with here().passing():
                    answers = self.model(inputs)
                losses = loss(wide(answers), targets)
        finally:
            for handle in handles:
                handle.remove()
        if losses.shape != (rows,):
            raise ValueError(f"expected one loss per record [{rows}], found {tuple(losses.shape)}")
        for layer, given, before, output, later, _ in seen:
            check_records_first(self.model, layer, rows, tuple(given.shape), tuple(output.shape))
            if given._version != before or output._version != later:
                raise PrivacyError(
                    f"{place_of(self.model, layer)}: its input or output is overwritten "
                    f"later, so that per-record gradients would be wrong; avoid in-place operations"
                )
        if versions != [(id(buffer), buffer._version) for buffer in self.model.buffers()]:
            raise PrivacyError(
                f"{type(self.model).__name__}: a buffer changed while patients' records passed; "
                f"a model must not remember them outside the private step"
            )
        wanted: list[Any] = [*(one[5] for one in seen), *copies.values()]
        derivatives = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        calls = [
            LayerCall(layer, wide(given), wide(derivative))
            for (layer, given, *_), derivative in zip(seen, derivatives, strict=False)
            if derivative is not None
        ]
        gradients = [
            LayerGradient(parameter, each)
            for parameter, each in zip(copies, derivatives[len(seen) :], strict=True)
            if each is not None
        ]
        return Seen(calls, gradients)


@lru_cache
def _say_once(kind: str) -> None:
    _logger.warning(
        "%s: no gradient rule; each record passes through it with weights of its own", kind
    )
