"""Pneumonia on chest X-rays: teacher and student on the published test part of PneumoniaMNIST."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from client.sources.reading import read_public
from common.learning.evaluate import predictions
from common.study import Study, load_study
from common.tables import Table
from common.tasks import task_of
from simulations.bench.trained import (
    EXAMPLES,
    NON_PRIVATE,
    Trained,
    figures,
    find_folder,
    over_seeds,
    trained,
)

_SEEDS = (0, 1, 2)
# Where no budget limits them, more rounds and random views cost computing only; chosen on the
# published validation part.
_FREE: Mapping[str, Any] = {
    **NON_PRIVATE,
    "finetune__rounds": 150,
    "finetune__optimiser__learning_rate": 0.2,
    "finetune__augment": {"shift": 2.0, "rotation_deg": 10.0},
}
_SKEWED: Mapping[str, Any] = {
    "simulation__partition": "label_skew",
    "simulation__concentration": 0.5,
}


def imaging(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """AUC of student (and ``teacher_``) on the published test part, over seeds that also draw the
    ten hospitals anew: patients dealt out at random and (``_skewed``) by label, Dirichlet 0.5."""
    folder = find_folder(data_folder, "images", "pneumoniamnist.npz")
    if folder is None:
        return None
    study = load_study(EXAMPLES / "pneumonia.toml")
    arms = {
        "eps3": study,
        "nonprivate": study.revised(**_FREE),
        "eps3_skewed": study.revised(**_SKEWED),
        "nonprivate_skewed": study.revised(**_FREE, **_SKEWED),
    }
    score = partial(_score, folder=folder)
    return figures(over_seeds(score, arms, _SEEDS, jobs=jobs), _SEEDS)


def _score(study: Study, seed: int, *, folder: Path) -> Mapping[str, float]:
    done = trained(study.revised(seed=seed), folder)
    test = published(study, folder, "test")
    return {
        "teacher_{}_auc": auc_on(test, study, done.teacher, done),
        "{}_auc": auc_on(test, study, done.student, done),
    }


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
    found = predictions(task, model, run.features.encode(table))
    return task.figures(table.labels, found)["auc"]
