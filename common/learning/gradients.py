"""Where gradients come from: Opacus per record for private steps, autograd for public ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from common.learning.loop import Gradient
from common.learning.records import Records
from common.privacy.plan import StepPlan, combine_records
from common.randomness import Stream
from common.tensors import set_vector, trainable

Loss = Callable[[Tensor, Tensor], Tensor]
"""Per-record losses [rows] from answers [rows, outputs] and targets [rows, …]."""

# Per-record gradients of at most so many numbers are held at once (float32: 128 MiB).
_CHUNK_NUMBERS = 32 * 2**20


class PerRecordGradients:
    """Gradients of each record's own loss, through Opacus's hooks.

    One instance serves many hospitals in turn: weights are an argument, nothing is kept between
    calls, so no stale sum can enter a later release.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = model
        self.loss = loss
        self.size = sum(parameter.numel() for parameter in trainable(model))
        self._hooked = GradSampleModule(model, loss_reduction="sum", strict=True)
        self._hooked.train()

    def __call__(self, weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Per-record gradients [rows, d] at ``weights`` [d]."""
        if len(inputs) == 0:
            return torch.zeros(0, self.size)
        self._forget()
        set_vector(self.model, weights)
        parameters = trainable(self.model)
        with _no_input_gradient_warning():
            torch.autograd.backward(self.loss(self._hooked(inputs), targets).sum())
        each = [
            parameter.grad_sample.reshape(len(inputs), -1)  # type: ignore[attr-defined]
            for parameter in parameters
        ]
        self._forget()
        return torch.cat(each, dim=1)

    def _forget(self) -> None:
        """Drop everything the hooks keep, also what an interrupted call left half done."""
        for layer in self.model.modules():
            layer.__dict__.pop("activations", None)
        for parameter in trainable(self.model):
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.__dict__.pop("_current_grad_sample", None)


@contextmanager
def _no_input_gradient_warning() -> Iterator[None]:
    # A frozen encoder's output needs no gradient, by design; torch warns at every step.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def private_gradient(
    each: PerRecordGradients,
    records: Records,
    plan: StepPlan,
    *,
    expected_units: float,
    stream: Stream,
) -> Gradient:
    """The noised mean gradient of one Poisson sample per call.

    ``expected_units`` is a *public* number (declared patients × sampling rate): dividing by the
    true size of the sample or the cohort would reveal it.
    """

    def gradient(weights: Tensor) -> Tensor:
        units = plan.sample(stream, records.units)
        total = torch.zeros(each.size)
        for chunk in torch.split(units, _units_per_chunk(each.size, plan.records_per_unit)):
            rows, owners = records.rows_of(chunk, plan.records_per_unit, stream)
            gradients = each(weights, records.inputs[rows], records.targets[rows])
            total += plan.clipped_sum(combine_records(gradients, owners, len(chunk)))
        return plan.noised(total, stream) / expected_units

    return gradient


def plain_gradient(
    model: nn.Module,
    loss: Loss,
    records: Records,
    plan: StepPlan,
    *,
    expected_units: float,
    stream: Stream,
) -> Gradient:
    """The same mean over the same samples, neither clipped nor noised: for the comparison only."""

    def gradient(weights: Tensor) -> Tensor:
        units = plan.sample(stream, records.units)
        if len(units) == 0:
            return torch.zeros_like(weights)
        rows, owners = records.rows_of(units, plan.records_per_unit, stream)
        share = 1.0 / torch.bincount(owners)[owners].float()
        return _backward(
            model,
            weights,
            lambda: (
                (loss(model(records.inputs[rows]), records.targets[rows]) * share).sum()
                / expected_units
            ),
        )

    return gradient


def batch_gradient(model: nn.Module, objective: Callable[[], Tensor]) -> Gradient:
    """The gradient of ``objective()``, a scalar over the model's current weights; public data."""
    return lambda weights: _backward(model, weights, objective)


def _backward(model: nn.Module, weights: Tensor, objective: Callable[[], Tensor]) -> Tensor:
    set_vector(model, weights)
    parameters = trainable(model)
    gradients = torch.autograd.grad(objective(), parameters)
    return torch.cat([one.reshape(-1) for one in gradients])


def _units_per_chunk(size: int, records_per_unit: int) -> int:
    return max(1, _CHUNK_NUMBERS // (size * records_per_unit))
