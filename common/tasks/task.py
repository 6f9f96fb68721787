"""What a medical question is to the pipeline: what is learned, how it is judged and released."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """One figure by which models are compared.

    ``key``: its name in JSON; ``title``: its name in tables and plots.
    ``bounds``: what it can be, None where it has no end. ``chance``: what guessing gives, where
    that is the same for all patients. ``needs``: what it does not exist without, in words.
    """

    key: str
    title: str
    higher_is_better: bool = True
    bounds: tuple[float | None, float | None] = (0.0, 1.0)
    chance: float | None = None
    needs: str = ""


class Unreleased:
    """The part of a task whose evaluation never leaves a hospital: see the same in ``Task``."""

    def contributions(
        self,
        labels: NDArray[Any],  # noqa: ARG002
        predictions: Floats,  # noqa: ARG002
        owners: NDArray[np.int64],
        bins: int,  # noqa: ARG002
    ) -> Floats:
        """Nothing."""
        return np.zeros((int(owners.max()) + 1 if len(owners) else 0, 0))

    def release_shape(self, bins: int) -> tuple[int, int]:  # noqa: ARG002
        """Nothing."""
        return 0, 0

    def released_figures(self, counts: Floats) -> dict[str, float]:  # noqa: ARG002
        """None."""
        return {}


class Task(Protocol):
    """Everything the pipeline needs to know of a medical question, asked of one dictionary.

    Losses are per record, never averaged: privacy clips each patient before any sum.
    """

    @property
    def name(self) -> str:
        """The name a study file uses."""
        ...

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The figures of a model; the first decides which of two models is better."""
        ...

    @property
    def outputs(self) -> int:
        """Width of a model's answer, or of its answer at each token of a text."""
        ...

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """What a model learns from [rows, …], of a table's labels [rows, …]."""
        ...

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Loss of each record [rows] from answers [rows, …, outputs] and targets [rows, …]."""
        ...

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Distance of the student's answers to the teacher's, per record [rows]."""
        ...

    def predictions(self, answers: Tensor, inputs: Tensor) -> Tensor:
        """What an answer says to a reader [rows, …]: probabilities, a curve, an effect.

        ``inputs`` [rows, …]: the records that were answered, for a task that asks about them.
        """
        ...

    def figures(self, labels: NDArray[Any], predictions: Floats) -> dict[str, float]:
        """Every measure by its key, over these records; NaN where it does not exist."""
        ...

    def contributions(
        self, labels: NDArray[Any], predictions: Floats, owners: NDArray[np.int64], bins: int
    ) -> Floats:
        """What each unit adds to the released evaluation: [units, length], L2 norm at most 1.

        ``owners`` [rows] names each record's unit.
        """
        ...

    def release_shape(self, bins: int) -> tuple[int, int]:
        """Shape of the sum of contributions; its product is their length."""
        ...

    def released_figures(self, counts: Floats) -> dict[str, float]:
        """The measures that a (noised) sum of contributions shows; NaN for the others."""
        ...


def shared_numbers(task: Task) -> int:
    """How many numbers that are the same for all records follow each of a teacher's answers: what a
    task calls ``shared``, and most do not have. A student, which only answers, has none."""
    return int(getattr(task, "shared", 0))


def means_of_units(each: Floats, owners: NDArray[np.int64]) -> Floats:
    """Mean of every unit's records [units, k], from ``each`` record [rows, k] and whose it is
    [rows]: a unit of many records weighs no more than one of one."""
    counts = np.bincount(owners)
    sums = np.zeros((len(counts), each.shape[1]))
    np.add.at(sums, owners, each / counts[owners][:, None])
    return sums
