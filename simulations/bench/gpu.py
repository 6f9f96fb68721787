"""A private step of a larger model where this machine can run it: processor, GPU, and bfloat16."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.compute import ComputeSpec
from common.learning.gradients import Engine, choose_engine, clipped_sum, private_gradient
from common.learning.records import Records
from common.place import CPU, placed
from common.randomness import SecretNoise
from common.tensors import get_vector
from simulations.bench.models import (
    VOCABULARY,
    Transformer,
    in_mid_training,
    lora_transformer,
    loss,
    plan,
)

_WIDTH, _LAYERS, _HEADS = 384, 6, 12  # of MiniLM-L6 (Wang et al. 2020)
_TOKENS, _RECORDS = 128, 128
_PLACES: Mapping[str, ComputeSpec] = {
    "cpu": ComputeSpec(device="cpu", precision="float32"),
    "gpu_float32": ComputeSpec(device="cuda", precision="float32"),
    "gpu_bfloat16": ComputeSpec(device="cuda", precision="bfloat16"),
}
_STEPS = {"cpu": 1, "gpu_float32": 8, "gpu_bfloat16": 8}


def gpu(data_folder: Path) -> dict[str, Any]:  # noqa: ARG001 - every benchmark takes a folder
    """Seconds a private step takes on 128 texts of 128 tokens; None where there is no GPU.

    ``full``: all weights of a transformer like MiniLM-L6 learn; ``lora``: corrections of rank 8.
    Each with the clipped sum alone (``_sum_s``), the whole step with its sample and noise
    (``_step_s``), and how far a clipped sum is from the processor's, in units of the clip norm a
    record (``_max_abs_diff``).
    """
    found = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if found else None,
        "threads": torch.get_num_threads(),
        "records": _RECORDS,
        **{name: _row(lora=name == "lora", found=found) for name in ("full", "lora")},
    }


def _row(*, lora: bool, found: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, VOCABULARY, (_RECORDS, _TOKENS), generator=generator)
    labels = torch.randint(0, 2, (_RECORDS,), generator=generator)
    records = Records(inputs, labels, torch.arange(_RECORDS), _RECORDS)
    model = _model(lora=lora)
    row: dict[str, Any] = {"parameters": len(get_vector(model))}
    sums: dict[str, Tensor] = {}
    for name, spec in _PLACES.items():
        if spec.device == "cuda" and not found:
            row |= {f"{name}_{key}": None for key in ("sum_s", "step_s", "max_abs_diff")}
            continue
        with placed(spec) as place:
            model.to(place.device)
            engine = choose_engine(model, loss, records)
            sums[name] = _sum(engine, records)
            sum_s, step_s = _times(engine, records, _STEPS[name])
        row |= {f"{name}_sum_s": sum_s, f"{name}_step_s": step_s}
        row[f"{name}_max_abs_diff"] = float((sums[name] - sums["cpu"]).abs().max())
    model.to(CPU)
    return row


def _times(engine: Engine, records: Records, steps: int) -> tuple[float, float]:
    stream = SecretNoise.generate().stream("bench")
    gradient = private_gradient(
        engine, records, plan(), expected_units=records.units, stream=stream
    )
    weights = get_vector(engine.model)
    gradient(weights)
    sums, whole = [], []
    for _ in range(steps):
        began = time.perf_counter()
        _sum(engine, records)
        sums.append(time.perf_counter() - began)
        began = time.perf_counter()
        gradient(weights)
        whole.append(time.perf_counter() - began)
    return statistics.median(sums), statistics.median(whole)


def _sum(engine: Engine, records: Records) -> Tensor:
    weights, total = get_vector(engine.model), torch.zeros(engine.size)
    at_once = engine.rows_at_once(one_record_each=True)
    for rows in torch.split(torch.arange(records.units), at_once):
        total += clipped_sum(
            engine,
            weights,
            records.inputs[rows],
            records.targets[rows],
            torch.arange(len(rows)),
            len(rows),
            plan(),
        )
    return total / records.units


def _model(*, lora: bool) -> nn.Module:
    if not lora:
        return Transformer(width=_WIDTH, layers=_LAYERS, heads=_HEADS)
    return in_mid_training(lora_transformer(_WIDTH, layers=_LAYERS, heads=_HEADS))
