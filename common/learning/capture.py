"""What each trainable layer saw and what the loss asked of it, record by record.

One forward pass records every trainable layer's input; one backward pass, down to those layers'
outputs only, gives the derivative of each record's loss. From the two every per-record gradient,
its norm, or any weighted sum of them follows layer by layer, without a second backward pass
(Bu et al. 2023, "book-keeping", arXiv 2210.00038). Weight gradients of the plain sum, which no
private step needs, are never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from common.errors import PrivacyError
from common.models.checks import (
    check_private,
    check_records_apart,
    check_records_first,
    place_of,
    trains,
)
from common.tensors import trainable

Loss = Callable[[Tensor, Tensor], Tensor]
"""Per-record losses [rows] from answers [rows, outputs] and targets [rows, …]."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One use of one layer: its input and the loss's derivative at its output, [rows, …] each."""

    layer: nn.Module
    inputs: Tensor
    derivative: Tensor


class Capture:
    """Runs a model on records and keeps nothing: neither hooks nor sums outlive a call."""

    def __init__(self, model: nn.Module) -> None:
        """Raises PrivacyError when ``model`` has no per-record gradients."""
        check_private(model)
        self.model = model
        self.parameters = trainable(model)
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self._layers = [module for module in model.modules() if trains(module)]
        self._buffers = list(model.buffers())
        self._records_apart = False

    def check(self, like: Tensor) -> None:
        """Refuse a model that mixes records of the kind of ``like`` [rows, …]; looked at once.

        Made-up records are asked about, so the model must be as it was given: not spread over
        groups of rows.
        """
        if not self._records_apart:
            check_records_apart(self.model, like)
            self._records_apart = True

    def __call__(self, loss: Loss, inputs: Tensor, targets: Tensor) -> list[LayerCall]:
        """Every use of a trainable layer that matters to the loss, at the model's weights.

        Raises PrivacyError when the model mixes records, in a way that shows only when it runs.
        """
        rows = len(inputs)
        self.check(inputs)
        if not self.model.training:
            self.model.train()
        versions = [buffer._version for buffer in self._buffers]
        seen: list[tuple[nn.Module, Tensor, int, Tensor, int, GradientEdge]] = []

        def note(layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            given: Tensor = arguments[0]
            edge = get_gradient_edge(output)
            seen.append((layer, given.detach(), given._version, output, output._version, edge))

        handles = [layer.register_forward_hook(note) for layer in self._layers]
        try:
            losses = loss(self.model(inputs), targets)
        finally:
            for handle in handles:
                handle.remove()
        if losses.shape != (rows,):
            raise ValueError(f"expected one loss per record [{rows}], found {tuple(losses.shape)}")
        for layer, given, before, output, after, _ in seen:
            check_records_first(self.model, layer, rows, tuple(given.shape), tuple(output.shape))
            if given._version != before or output._version != after:
                raise PrivacyError(
                    f"{place_of(self.model, layer)}: its input or output is overwritten "
                    f"later, so that per-record gradients would be wrong; avoid in-place operations"
                )
        if versions != [buffer._version for buffer in self._buffers]:
            raise PrivacyError(
                f"{type(self.model).__name__}: a buffer changed while patients' records passed; "
                f"a model must not remember them outside the private step"
            )
        derivatives = torch.autograd.grad(losses.sum(), [one[5] for one in seen], allow_unused=True)
        return [
            LayerCall(layer, given, derivative)
            for (layer, given, *_), derivative in zip(seen, derivatives, strict=True)
            if derivative is not None
        ]
