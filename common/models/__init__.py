"""Teachers and students, built from a study's specification."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from common.features import FeatureMap
from common.models.families import family_of
from common.models.lora import add_lora
from common.models.networks import Student, Teacher
from common.models.pretrained import PinnedEncoder
from common.modelspec import LoraSpec, MlpSpec
from common.study import Study
from common.tasks import shared_numbers, task_of

__all__ = [
    "Student",
    "Teacher",
    "build_student",
    "build_teacher",
    "count_parameters",
    "learner",
]


def build_teacher(study: Study, features: FeatureMap) -> Teacher:
    """The teacher at its random start, the same for everyone with the study's seed."""
    spec = study.teacher
    with _drawing(study.seed):
        encoder, width = family_of(spec).encoder(spec, features)
    skip = features.numbers if isinstance(spec, MlpSpec) and spec.skip else 0
    task, speaks = task_of(study), study.dictionary.asks == "language"
    teacher = Teacher(
        encoder,
        width=width,
        skip=skip,
        outputs=task.outputs,
        bias=not speaks,
        shared=shared_numbers(task),
    )
    initialise(teacher, seed=study.seed)
    if not speaks:
        for layer in teacher.head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)  # before the first patient, no opinion
    if study.finetune.lora is not None:
        # A head that learned on public texts is a layer like others: frozen, or corrected by name.
        _adapt(teacher if speaks else encoder, study.finetune.lora, seed=study.seed)
    return teacher


def build_student(study: Study, features: FeatureMap) -> Student:
    """The student at its random start."""
    with _drawing(study.seed + 1):
        network = family_of(study.student).student(study.student, features, task_of(study).outputs)
    student = Student(network)
    initialise(student, seed=study.seed + 1)
    return student


def learner(study: Study, teacher: Teacher) -> nn.Module:
    """The part of ``teacher`` that patients change in fine-tuning: its trainable numbers are what
    hospitals send. With ``trainable = "head"`` the encoder only turns records into codes, once."""
    return teacher.head if study.finetune.trainable == "head" else teacher


def _adapt(encoder: nn.Module, spec: LoraSpec, *, seed: int) -> None:
    if isinstance(encoder, PinnedEncoder):
        encoder.adapt(spec, seed=seed)
    else:
        add_lora(encoder, spec, seed=seed)


def initialise(module: nn.Module, *, seed: int) -> None:
    """Draw all weights anew from ``seed``: public randomness, equal everywhere.

    Uniform in ±1/√fan_in, as ``torch`` itself does for linear and convolution layers (of an
    embedding: ±1/√width); normalisation layers start as the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if (
            not isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding)
            or weight is None
        ):
            continue
        bound = 1 / math.sqrt(weight[0].numel())
        for parameter in (weight, getattr(layer, "bias", None)):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound, generator=generator)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """What a network draws for itself, for layers that ``initialise`` does not know."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def count_parameters(module: nn.Module) -> int:
    """All parameters, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())
