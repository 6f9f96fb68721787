"""Exact scores of a model at every hospital.

Only a simulation may read them all: its researcher stands in every hospital at once. In a
deployment exact scores stay where they are, and a noised histogram leaves instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.hospital import Hospital
from client.training import load_student, load_teacher
from common.features import FeatureMap, Scaling
from common.learning.evaluate import predictions
from common.models import Student, Teacher, learner
from common.study import Study
from common.tasks import Floats, task_of
from common.tensors import load_tensors, set_vector
from server.store import RunFolder
from simulations.measures import leading


@dataclass(frozen=True)
class Scores:
    """Labels [rows, …] of one hospital's test records, and predictions [rows, …] of them.

    ``study``: whose task says what the figures are.
    """

    study: Study
    hospital: str
    labels: NDArray[Any]
    predictions: Floats

    @cached_property
    def figures(self) -> Mapping[str, float]:
        """Every measure of the task by its key; NaN where it does not exist."""
        return task_of(self.study).figures(self.labels, self.predictions)


def score(
    model: nn.Module, study: Study, features: FeatureMap, hospitals: Sequence[Hospital]
) -> list[Scores]:
    """The model's scores on every hospital's test records."""
    task = task_of(study)
    return [
        Scores(
            study,
            hospital.name,
            hospital.test.labels,
            predictions(task, model, features.encode(hospital.test)),
        )
        for hospital in hospitals
    ]


def together(scores: Sequence[Scores]) -> Scores:
    """All hospitals' test records as one set."""
    return Scores(
        scores[0].study,
        "all",
        np.concatenate([one.labels for one in scores]),
        np.concatenate([one.predictions for one in scores]),
    )


def finished_models(run: RunFolder, study: Study) -> tuple[Teacher, Student, FeatureMap]:
    """Teacher, student and feature map of a finished run."""
    result = run.read_json("result.json")
    features = FeatureMap(study.dictionary, Scaling.from_dict(result["scaling"]))
    teacher = load_teacher(study, features, load_tensors(run.path / "teacher.safetensors"))
    student = load_student(study, features, load_tensors(run.path / "student.safetensors"))
    return teacher, student, features


def round_curve(
    run: RunFolder, study: Study, hospitals: Sequence[Hospital], stage: str = "finetune"
) -> list[tuple[int, float]]:
    """(round, leading measure over all hospitals' test records) after each round of ``stage``."""
    teacher, student, features = finished_models(run, study)
    model: nn.Module = teacher if stage == "finetune" else student
    learning = learner(study, teacher) if stage == "finetune" else student
    measure, points, number = leading(study), [], 1
    while (path := run.round_path(stage, number)).exists():
        set_vector(learning, load_tensors(path)["weights"])
        scored = together(score(model, study, features, hospitals))
        points.append((number, scored.figures[measure.key]))
        number += 1
    return points
