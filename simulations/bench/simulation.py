"""What one round of many simulated hospitals costs, beside the same work done otherwise.

(a) MLP 30-64-64-1, 1,000 hospitals × 32 records, two steps on half of them; (b) a CNN of 30,001
parameters with GroupNorm, 100 × 64 images of 28 × 28, four steps on a quarter; (c) a two-layer
transformer of width 32 with LoRA of rank 8, 50 × 32 texts of 64 tokens, two steps on half. (a) and
(b) go through everything a simulation has: grid, messages, charges, metrics, checkpoints. (c) is
the engine's step alone, since no study can ask for a transformer yet. CPU seconds of all threads.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.hospital import Hospital
from client.training import Assignment
from common.features import FeatureMap, range_scaling
from common.learning.records import Records
from common.models import build_teacher
from common.privacy.budget import budget_of
from common.randomness import SeededNoise
from common.study import Study, parse_study
from common.tables import Table, TableReport
from common.tasks import task_of
from common.tensors import get_vector, load_tensors, set_vector, trainable
from server.conduct import Progress
from server.store import RunFolder
from simulations.bench import flower_ray, pfl_loop
from simulations.bench.models import VOCABULARY, lora_transformer
from simulations.bench.processes import peak_mib
from simulations.bench.usual import LEARNING_RATE, opacus_steps
from simulations.engine import Cohort, Lane, Round, updates_of
from simulations.hospitals import Site, World, open_world, seeded_noise
from simulations.simulate import InProcess, run_in_process
from simulations.tiles import BATCH_BYTES, tiles

_ROUNDS = 6
_NOISE_SEED = 1
_WIDTH = 32
SCALES = (100, 1_000, 10_000)


def simulation(data_folder: Path) -> dict[str, Any]:
    """CPU seconds a round of each way; ``data_folder`` is not used: the records are made up."""
    del data_folder
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small work: more threads would mostly wait for each other
    try:
        a = _work(_tables(_ROUNDS), 1_000, 32)
        b = _work(_images(_ROUNDS), 100, 64)
        return {"a": a, "b": b, "c": _transformer(), "scale": [_scale(one) for one in SCALES]}
    finally:
        torch.set_num_threads(threads)


def _work(study: Study, hospitals: int, records: int) -> dict[str, Any]:
    world = made_up_world(study, hospitals, records)
    ours, trained = _rounds(world, "stacked")
    one = study.revised(finetune__rounds=1)
    (first,) = _rounds(replace(world, study=one), "stacked")[1]
    (twin,) = _rounds(replace(world, study=one), "one-by-one")[1]
    nonprivate, _ = _rounds(replace(world, study=_plain(study)), "stacked")
    members = open_world(world, seeded_noise(_NOISE_SEED, [site.name for site in world.sites]))
    return {
        "hospitals": hospitals,
        "parameters": len(trained[0]),
        "ours_cpu_s": ours,
        "nonprivate_stacked_cpu_s": nonprivate,
        "ratio_to_nonprivate": ours / nonprivate,
        "opacus_loop_cpu_s": _opacus_loop(study, members),
        "plain_loop_cpu_s": _plain_loop(study, members),
        "pfl_cpu_s": pfl_loop.round_cpu_s(study, _features(study), members),
        "flower_ray_cpu_s": _flower_ray(study, hospitals, records),
        "max_abs_diff": float((first - twin).abs().max()),
    }


def _rounds(world: World, engine: InProcess) -> tuple[float, list[Tensor]]:
    """Median CPU seconds of a round of fine-tuning after the first, and the weights after each."""
    study = world.study
    hospitals = open_world(world, seeded_noise(_NOISE_SEED, [site.name for site in world.sites]))
    at: list[float] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "finetune":
            at.append(time.process_time())

    with tempfile.TemporaryDirectory() as name:
        run = RunFolder.create(Path(name) / "run", study)
        gc.collect()
        run_in_process(study, run, hospitals, world.corpus, watch, engine=engine, debug=True)
        weights = [
            load_tensors(run.round_path("finetune", one + 1))["weights"]
            for one in range(study.finetune.rounds)
        ]
    gaps = [late - early for early, late in pairwise(at)]
    return statistics.median(gaps) if gaps else at[0], weights


def _scale(hospitals: int) -> dict[str, Any]:
    """The same round of (a) with that many hospitals, in a process of its own for its memory."""
    done = subprocess.run(
        [sys.executable, "-m", "simulations.bench.simulation", str(hospitals)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _scale_here(hospitals: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    cpu_s, _ = _rounds(made_up_world(_tables(4), hospitals, 32), "stacked")
    return {
        "hospitals": hospitals,
        "cpu_s": cpu_s,
        "cpu_ms_each": 1e3 * cpu_s / hospitals,
        "rss_mib": peak_mib(),
    }


# The same work otherwise


def _opacus_loop(study: Study, hospitals: list[Hospital]) -> float:
    """One hospital after another, each with an Opacus engine."""
    features, loss = _features(study), task_of(study).loss
    start = get_vector(build_teacher(study, features))

    def one(hospital: Hospital) -> None:
        model = build_teacher(study, features)
        set_vector(model, start)
        inputs, labels = features.encode(hospital.train), torch.from_numpy(hospital.train.labels)
        opacus_steps(study, model, inputs, labels, loss)

    return _cpu_s(lambda: deque(map(one, hospitals), maxlen=0))


def _plain_loop(study: Study, hospitals: list[Hospital]) -> float:
    """One hospital after another, one model, plain autograd and SGD: no privacy at all."""
    features, loss = _features(study), task_of(study).loss
    model = build_teacher(study, features).train()
    start = get_vector(model)
    steps, rate = study.finetune.local_steps, study.finetune.sampling_rate
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)

    def one(hospital: Hospital) -> Tensor:
        set_vector(model, start)
        inputs, labels = features.encode(hospital.train), torch.from_numpy(hospital.train.labels)
        batch = round(rate * len(labels))
        for _ in range(steps):
            rows = torch.randperm(len(labels), generator=generator)[:batch]
            optimiser.zero_grad()
            loss(model(inputs[rows]), labels[rows]).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return get_vector(model) - start

    return _cpu_s(lambda: deque(map(one, hospitals), maxlen=0))


def _flower_ray(study: Study, hospitals: int, records: int) -> float | None:
    """Flower's own simulation on Ray with an Opacus client; None without the extra."""
    if importlib.util.find_spec("ray") is None:
        return None
    return flower_ray.round_cpu_s(study, hospitals, records)


def _cpu_s(work: Callable[[], object]) -> float:
    gc.collect()
    began = time.process_time()
    work()
    return time.process_time() - began


# (c), where no study leads


def _transformer(hospitals: int = 50, records: int = 32, tokens: int = 64) -> dict[str, Any]:
    """The engine's steps on a LoRA transformer, against Opacus in a loop."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, VOCABULARY, (hospitals * records, tokens), generator=generator)
    targets = torch.randint(0, 2, (hospitals * records,), generator=generator)
    study = _tables(1)
    ours, updates = _stacked_transformer(study, inputs, targets, hospitals)
    nonprivate, _ = _stacked_transformer(_plain(study), inputs, targets, hospitals)
    twin = _twin_updates(study, inputs, targets, hospitals)
    return {
        "hospitals": hospitals,
        "parameters": updates.shape[1],
        "ours_cpu_s": ours,
        "nonprivate_stacked_cpu_s": nonprivate,
        "ratio_to_nonprivate": ours / nonprivate,
        "opacus_loop_cpu_s": _opacus_transformers(study, inputs, targets, hospitals),
        "flower_ray_cpu_s": None,
        "max_abs_diff": float((updates[: len(twin)] - twin).abs().max()),
    }


def _small_transformer() -> nn.Module:
    torch.manual_seed(0)  # its frozen part is drawn by torch itself
    return lora_transformer(width=_WIDTH)


def _assignment(study: Study) -> Assignment:
    return Assignment(
        study=study,
        stage="finetune",
        round=0,
        attempt=0,
        charge=budget_of(study).charge("finetune"),
        features=_features(study),
        model=_small_transformer(),
        teacher=None,
    )


def _cohort(inputs: Tensor, targets: Tensor, hospitals: int) -> Cohort:
    each = len(inputs) // hospitals
    parts = [slice(one * each, (one + 1) * each) for one in range(hospitals)]
    records = {
        node: Records(inputs[part], targets[part], torch.arange(each), each)
        for node, part in enumerate(parts, start=1)
    }
    return Cohort(inputs, targets, records, {node + 1: one.start for node, one in enumerate(parts)})


def _lanes(hospitals: int) -> list[Lane]:
    return [
        Lane(node, 32, SeededNoise(_NOISE_SEED, f"h{node}").stream("bench"))
        for node in range(1, hospitals + 1)
    ]


def _stacked_transformer(
    study: Study, inputs: Tensor, targets: Tensor, hospitals: int
) -> tuple[float, Tensor]:
    made: list[Tensor] = []

    def work() -> None:
        round_ = Round(_assignment(study), _cohort(inputs, targets, hospitals))
        lanes = _lanes(hospitals)
        sizes = [round_.bytes_of(lane.node) for lane in lanes]
        made[:] = [updates_of(round_, lanes[tile]) for tile in tiles(sizes, BATCH_BYTES)]

    cpu_s = statistics.median(_cpu_s(work) for _ in range(3))
    return cpu_s, torch.cat(made)


def _twin_updates(study: Study, inputs: Tensor, targets: Tensor, hospitals: int) -> Tensor:
    cohort, assignment = _cohort(inputs, targets, hospitals), _assignment(study)
    return torch.stack(
        [
            assignment.update(cohort.records[lane.node], lane.declared, lane.stream)
            for lane in _lanes(hospitals)[:5]
        ]
    )


def _opacus_transformers(study: Study, inputs: Tensor, targets: Tensor, hospitals: int) -> float:
    loss, each = task_of(study).loss, len(inputs) // hospitals

    def one(number: int) -> None:
        part = slice(number * each, (number + 1) * each)
        opacus_steps(study, _small_transformer(), inputs[part], targets[part], loss)

    return _cpu_s(lambda: deque(map(one, range(hospitals)), maxlen=0))


# What is worked on


def _tables(rounds: int) -> Study:
    return _study(
        rounds,
        name="simulation-a",
        task="diagnosis",
        columns=[
            {"name": f"c{one}", "kind": "numeric", "range": [-4.0, 4.0], "optional": False}
            for one in range(30)
        ],
        public={"kind": "dictionary", "records": 16},
        teacher={"kind": "mlp", "hidden": [64, 64]},
        student={"kind": "mlp", "hidden": [8]},
        steps=2,
        rate=0.5,
    )


def _images(rounds: int) -> Study:
    return _study(
        rounds,
        name="simulation-b",
        task="imaging",
        columns=[{"name": "x", "kind": "image", "shape": [28, 28]}],
        public={"kind": "held_apart"},
        teacher={"kind": "cnn", "hidden": [16, 32, 16]},
        student={"kind": "cnn", "hidden": [4]},
        steps=4,
        rate=0.25,
    )


def _study(
    rounds: int, *, columns: list[dict[str, Any]], steps: int, rate: float, **parts: Any
) -> Study:
    sgd = {"kind": "sgd", "learning_rate": LEARNING_RATE}
    return parse_study(
        {
            **parts,
            "dictionary": {
                "patient_id": "patient",
                "label": {"name": "ill", "classes": [[0], [1]]},
                "columns": columns,
            },
            "pretrain": {"steps": 0, "optimiser": sgd},
            "finetune": {
                "rounds": rounds,
                "local_steps": steps,
                "sampling_rate": rate,
                "trainable": "all",
                "optimiser": sgd,
            },
            "distill": {"on": "public", "steps": 1, "optimiser": sgd},
            "privacy": {"trust": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0},
            "evaluation": {"folds": 9},
        },
        origin="simulation",
    )


def _plain(study: Study) -> Study:
    return study.revised(privacy__trust="none", privacy__epsilon=None, privacy__delta=None)


def _features(study: Study) -> FeatureMap:
    return FeatureMap(study.dictionary, range_scaling(study.dictionary))


def made_up_world(study: Study, hospitals: int, records: int) -> World:
    """Hospitals with ``records`` training patients of one record each."""
    generator = np.random.default_rng(0)
    rows = records + records // (study.evaluation.folds - 1)
    shape = study.dictionary.image_shape

    def table(name: str, rows: int) -> Table:
        values = {
            column.name: generator.random((rows, *shape), dtype=np.float32)
            if shape
            else generator.standard_normal(rows, dtype=np.float32)
            for column in study.dictionary.columns
        }
        patients = np.array([f"{name}-{row}" for row in range(rows)], dtype=object)
        labels = np.arange(rows) % 2
        return Table(study.dictionary, values, labels, patients, TableReport(rows, rows, 0, ()))

    sites = tuple(
        Site(f"hospital-{number:05d}", table(f"{number}", rows)) for number in range(hospitals)
    )
    return World(study, sites, table("public", 8) if shape else None)


if __name__ == "__main__":
    print(json.dumps(_scale_here(int(sys.argv[1]))))
