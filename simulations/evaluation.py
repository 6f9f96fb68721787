"""Exact scores of a model at every hospital.

Only a simulation may read them all: its researcher stands in every hospital at once. In a
deployment exact scores stay where they are, and a noised histogram leaves instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.hospital import Hospital
from client.training import load_student, load_teacher
from common.features import FeatureMap, Scaling
from common.learning.evaluate import answer
from common.learning.metrics import Floats, accuracy, auc
from common.models import Student, Teacher, learner
from common.study import Study
from common.tasks import task_of
from common.tensors import load_tensors, set_vector
from server.store import RunFolder


@dataclass(frozen=True)
class Scores:
    """Labels [rows] and class probabilities [rows, classes] of one hospital's test records."""

    hospital: str
    labels: NDArray[np.int64]
    probabilities: Floats

    @property
    def auc(self) -> float:
        """Area under the ROC curve; NaN with a single class."""
        return auc(self.labels, self.probabilities)

    @property
    def accuracy(self) -> float:
        """Share of records classified rightly."""
        return accuracy(self.labels, self.probabilities)


def score(
    model: nn.Module, study: Study, features: FeatureMap, hospitals: Sequence[Hospital]
) -> list[Scores]:
    """The model's scores on every hospital's test records."""
    task = task_of(study)
    return [
        Scores(
            hospital.name,
            hospital.test.labels,
            task.predictions(answer(model, features.encode(hospital.test))).double().numpy(),
        )
        for hospital in hospitals
    ]


def together(scores: Sequence[Scores]) -> Scores:
    """All hospitals' test records as one set."""
    return Scores(
        "all",
        np.concatenate([one.labels for one in scores]),
        np.concatenate([one.probabilities for one in scores]),
    )


def finished_models(run: RunFolder, study: Study) -> tuple[Teacher, Student, FeatureMap]:
    """Teacher, student and feature map of a finished run."""
    result = run.read_json("result.json")
    scaling = Scaling({name: (mean, std) for name, (mean, std) in result["scaling"].items()})
    features = FeatureMap(study.dictionary, scaling)
    teacher = load_teacher(study, features, load_tensors(run.path / "teacher.safetensors"))
    student = load_student(study, features, load_tensors(run.path / "student.safetensors"))
    return teacher, student, features


def round_curve(
    run: RunFolder, study: Study, hospitals: Sequence[Hospital], stage: str = "finetune"
) -> list[tuple[int, float]]:
    """(round, AUC over all hospitals' test records) after each round of ``stage``."""
    teacher, student, features = finished_models(run, study)
    model: nn.Module = teacher if stage == "finetune" else student
    learning = learner(study, teacher) if stage == "finetune" else student
    points = []
    number = 1
    while (path := run.round_path(stage, number)).exists():
        set_vector(learning, load_tensors(path)["weights"])
        points.append((number, together(score(model, study, features, hospitals)).auc))
        number += 1
    return points
