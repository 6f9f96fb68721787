"""Teachers and students, built from a study's specification."""

from __future__ import annotations

import math

import torch
from torch import nn

from common.features import FeatureMap
from common.models.networks import Student, Teacher, image_encoder, image_student, table_encoder
from common.study import ModelSpec, Study
from common.tasks import task_named

__all__ = ["Student", "Teacher", "build_student", "build_teacher", "count_parameters"]


def build_teacher(study: Study, features: FeatureMap) -> Teacher:
    """The teacher at its random start, the same for everyone with the study's seed."""
    spec, outputs = study.teacher, task_named(study.task).outputs(study.dictionary)
    if features.image_shape is None:
        encoder = table_encoder(features.width, spec.hidden)
        skip = features.width if spec.skip else 0
    else:
        encoder, skip = image_encoder(features.image_shape, spec.hidden), 0
    teacher = Teacher(encoder, width=spec.hidden[-1], skip=skip, outputs=outputs)
    initialise(teacher, seed=study.seed)
    nn.init.zeros_(teacher.head.weight)  # before the first patient, no opinion
    return teacher


def build_student(study: Study, features: FeatureMap) -> Student:
    """The student at its random start."""
    spec: ModelSpec = study.student
    outputs = task_named(study.task).outputs(study.dictionary)
    if features.image_shape is None:
        student = Student(
            nn.Sequential(
                table_encoder(features.width, spec.hidden), nn.Linear(spec.hidden[-1], outputs)
            )
        )
    else:
        student = image_student(features.image_shape, spec.hidden, outputs)
    initialise(student, seed=study.seed + 1)
    return student


def initialise(module: nn.Module, *, seed: int) -> None:
    """Draw all weights anew from ``seed``: public randomness, equal everywhere.

    Uniform in ±1/√fan_in, as ``torch`` itself does for linear and convolution layers; normalisation
    layers start as the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) or weight is None:
            continue
        bound = 1 / math.sqrt(weight[0].numel())
        for parameter in (weight, layer.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


def count_parameters(module: nn.Module) -> int:
    """All parameters, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())
