"""Pneumonia on chest X-rays: teacher and student on the published test part of PneumoniaMNIST."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from client.sources.reading import read_public
from common.learning.evaluate import answer
from common.study import Study, load_study
from common.tables import Table
from common.tasks import task_of
from simulations.bench.trained import EXAMPLES, NON_PRIVATE, Trained, figures, find_folder, trained

_SEEDS = (0, 1, 2)
_SKEWED: Mapping[str, Any] = {
    "simulation__partition": "label_skew",
    "simulation__concentration": 0.5,
}
_TIMED_ROWS, _TIMES = 256, 20


def imaging(data_folder: Path) -> dict[str, Any] | None:
    """AUC on the published test part, over seeds that also draw the hospitals anew.

    Ten hospitals, patients dealt out at random and (``skewed_``) by label, Dirichlet 0.5. The
    student's size and time on one record are in terms of its teacher's.
    """
    folder = find_folder(data_folder, "images", "pneumoniamnist.npz")
    if folder is None:
        return None
    study = load_study(EXAMPLES / "pneumonia.toml")
    test = published(study, folder, "test")
    values: dict[str, list[float]] = {}
    for prefix, skew in (("", {}), ("skewed_", _SKEWED)):
        for seed in _SEEDS:
            private = study.revised(seed=seed, **skew)
            done = trained(private, folder)
            free = trained(private.revised(**NON_PRIVATE), folder)
            for key, model, run in (
                ("teacher_nonprivate_auc", free.teacher, free),
                ("student_nonprivate_auc", free.student, free),
                ("eps3_teacher_auc", done.teacher, done),
                ("eps3_auc", done.student, done),
            ):
                values.setdefault(prefix + key, []).append(auc_on(test, study, model, run))
    return figures(values, _SEEDS) | _sizes(done)


def published(study: Study, folder: Path, part: str) -> Table:
    """A part of the published file: ``train``, ``val`` or ``test``."""
    assert study.simulation is not None and study.simulation.source is not None  # noqa: S101
    rename = {
        column: name.replace("train_", f"{part}_")
        for column, name in study.simulation.source.rename.items()
    }
    source = study.simulation.source.model_copy(update={"rename": rename})
    return read_public(source, study.dictionary, folder)


def auc_on(table: Table, study: Study, model: nn.Module, run: Trained) -> float:
    """AUC of one of the run's models on ``table``."""
    task = task_of(study)
    answers = answer(model, run.features.encode(table))
    return task.figures(table.labels, task.predictions(answers).double().numpy())["auc"]


def _sizes(run: Trained) -> dict[str, float]:
    """How many times smaller, and faster on one processor, the student is than its teacher."""
    sizes = [sum(one.numel() for one in model.parameters()) for model in (run.teacher, run.student)]
    assert run.features.image_shape is not None  # noqa: S101
    images = torch.zeros(_TIMED_ROWS, 1, *run.features.image_shape)
    times = [_seconds(model, images) for model in (run.teacher, run.student)]
    return {
        "student_times_smaller": sizes[0] / sizes[1],
        "student_times_faster": times[0] / times[1],
    }


def _seconds(model: nn.Module, images: torch.Tensor) -> float:
    """Of one thread's own time, the best of several: the least disturbed by other work."""
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(_TIMES):
            start = time.process_time()
            answer(model, images)
            found.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(found)
