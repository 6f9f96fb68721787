"""What is learned. A task says what an answer is, how wrong it is, and how good a model is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from common.dictionary import Dictionary
from common.errors import StudyError, nearest
from common.tasks.classification import Classification


class Task(Protocol):
    """Everything the pipeline needs to know of a medical question.

    Losses are per record, never averaged: privacy clips each patient before any sum.
    """

    @property
    def name(self) -> str:
        """The name a study file uses."""
        ...

    def outputs(self, dictionary: Dictionary) -> int:
        """Width of a model's answer."""
        ...

    def loss(self, answers: Tensor, labels: Tensor) -> Tensor:
        """Loss of each record [rows] from answers [rows, outputs] and labels [rows]."""
        ...

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Distance of the student's answers to the teacher's, per record [rows]."""
        ...

    def probabilities(self, answers: Tensor) -> Tensor:
        """Class probabilities [rows, classes] from answers [rows, outputs]."""
        ...


TASKS: dict[str, Task] = {
    "diagnosis": Classification(name="diagnosis"),
    "imaging": Classification(name="imaging"),
}


def task_named(name: str) -> Task:
    """The registered task, or a StudyError that names the nearest one."""
    if name not in TASKS:
        raise StudyError(f"task: unknown task {name!r}; {nearest(name, TASKS)}")
    return TASKS[name]
