"""What privacy costs in time: the hospital's ledger, and one private step next to Opacus's."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common.learning import loop
from common.learning.gradients import choose_engine, clipped_sum, private_gradient
from common.learning.records import Records
from common.randomness import SecretNoise
from common.stages import OptimiserSpec
from common.tensors import get_vector
from simulations.bench.ledger import ledger_figures
from simulations.bench.models import (
    CLIP_NORM,
    NOISE_MULTIPLIER,
    Workload,
    in_mid_training,
    loss,
    plan,
    workloads,
)

_LEARNING_RATE = 0.1
_REPETITIONS = {"mlp": 300, "cnn": 40, "lora": 40}

Step = Callable[[], object]


def privacy(data_folder: Path) -> dict[str, Any]:  # noqa: ARG001 - every benchmark takes a folder
    """Milliseconds and seconds; needs no data."""
    return {**ledger_figures(), "step": step_figures()}


def step_figures(repetitions: dict[str, int] | None = None) -> dict[str, dict[str, float]]:
    """Seconds per step, medians of interleaved repetitions on one thread; one row per model.

    ``ours_s``: sample, clip, noise from the cryptographic source, move the weights. ``opacus_s``:
    the step of ``PrivacyEngine``'s own optimiser, the faster of hooks and ghost clipping.
    ``plain_s``: SGD without privacy. ``max_abs_diff``: largest difference between our clipped sum
    and Opacus's, both without noise.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Opacus's step warns; printing would slow it down
            return {
                name: _compare(workload, (repetitions or _REPETITIONS)[name])
                for name, workload in workloads().items()
            }
    finally:
        torch.set_num_threads(threads)


def _compare(workload: Workload, repetitions: int) -> dict[str, float]:
    steps = {
        "ours_s": _ours(workload),
        "hooks": _opacus(workload, "hooks")[0],
        "ghost": _opacus(workload, "ghost")[0],
        "plain_s": _plain(workload),
    }
    median = _interleaved(steps, repetitions)
    return {
        "ours_s": median["ours_s"],
        "opacus_s": min(median["hooks"], median["ghost"]),
        "plain_s": median["plain_s"],
        "max_abs_diff": _difference(workload),
    }


def _interleaved(steps: dict[str, Step], repetitions: int) -> dict[str, float]:
    """Median seconds of each step; the steps take turns, so that they share the machine's moods."""
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _fresh(workload: Workload) -> nn.Module:
    torch.manual_seed(0)  # the same public start for every contestant
    return in_mid_training(workload.make())


def _records(workload: Workload) -> Records:
    rows = len(workload.inputs)
    return Records(workload.inputs, workload.targets, torch.arange(rows), rows)


def _ours(workload: Workload) -> Step:
    model, records = _fresh(workload), _records(workload)
    gradient = private_gradient(
        choose_engine(model, loss, records),
        records,
        plan(),
        expected_units=records.units,
        stream=SecretNoise.generate().stream("bench"),
    )
    spec = OptimiserSpec(kind="sgd", learning_rate=_LEARNING_RATE)
    state = loop.init(get_vector(model))

    def step() -> None:
        nonlocal state
        state = loop.step(state, gradient, spec, first_step=0, total_steps=10**9)

    return step


def _opacus(
    workload: Workload, mode: str, *, noise_multiplier: float = NOISE_MULTIPLIER
) -> tuple[Step, nn.Module]:
    """One whole step of Opacus's own optimiser, and the model it trains."""
    model, rows = _fresh(workload), len(workload.inputs)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser: Any = torch.optim.SGD(trained, lr=_LEARNING_RATE)
    loader = DataLoader(TensorDataset(workload.inputs, workload.targets), batch_size=rows)
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=optimiser,
        data_loader=loader,
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=noise_multiplier,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimiser = made[0], made[1]
    criterion: Any = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        optimiser.zero_grad()
        criterion(wrapped(workload.inputs), workload.targets).backward()
        optimiser.step()

    return step, model


def _plain(workload: Workload) -> Step:
    model = _fresh(workload)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=_LEARNING_RATE)

    def step() -> None:
        optimiser.zero_grad()
        loss(model(workload.inputs), workload.targets).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def _difference(workload: Workload) -> float:
    """Between the clipped sums: Opacus's is read off the step it takes without noise."""
    model, rows = _fresh(workload), len(workload.inputs)
    start = get_vector(model)
    engine = choose_engine(model, loss, _records(workload))
    ours = clipped_sum(
        engine, start, workload.inputs, workload.targets, torch.arange(rows), rows, plan()
    )
    step, theirs = _opacus(workload, "hooks", noise_multiplier=0.0)
    step()
    moved = (start - get_vector(theirs)) * (rows / _LEARNING_RATE)
    return float((ours - moved).abs().max())
