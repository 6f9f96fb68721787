"""A number, for records of any kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.dictionary import Dictionary
from common.labels import NumberLabel
from common.tasks.task import Floats, Measure, means_of_units

if TYPE_CHECKING:
    from torch import Tensor

# The released moments of a unit are four numbers within ±1: their L2 norm is at most 2.
_NORM = 2.0


@dataclass(frozen=True)
class Regression:
    """Half the squared error in units of the label's public scale.

    ``range``: lowest and highest value; no prediction leaves it. ``middle``, ``spread``: the
    public mean and standard deviation by which a model sees the number.
    """

    name: str
    range: tuple[float, float]
    middle: float
    spread: float

    outputs = 1
    measures = (
        Measure("rmse", "RMSE", higher_is_better=False, bounds=(0.0, None)),
        Measure("r2", "R²", bounds=(None, 1.0), needs="test patients with different outcomes"),
    )

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """Scaled numbers [rows, 1]."""
        import torch

        return torch.from_numpy((labels - self.middle) / self.spread).float()

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error of each record [rows]."""
        return (answers - targets).square().sum(dim=1) / 2

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """The same, to the teacher's number; there is nothing to soften."""
        return self.loss(answers, taught)

    def predictions(self, answers: Tensor, inputs: Tensor) -> Tensor:  # noqa: ARG002
        """Numbers in the label's unit, held within its range [rows, 1]."""
        return (answers * self.spread + self.middle).clamp(*self.range)

    def figures(self, labels: NDArray[Any], predictions: Floats) -> dict[str, float]:
        """Root mean squared error, and the share of the variance explained (NaN without any)."""
        true = labels[:, 0].astype(np.float64)
        squared = float(np.square(predictions[:, 0] - true).mean())
        return {"rmse": math.sqrt(squared), "r2": _explained(squared, float(true.var()))}

    def contributions(
        self,
        labels: NDArray[Any],
        predictions: Floats,
        owners: NDArray[np.int64],
        bins: int,  # noqa: ARG002
    ) -> Floats:
        """Each unit's mean of (1, squared error, outcome, squared outcome), halved: [units, 4].

        Errors in units of two ``spread``, at most 1; outcomes scaled to [-1, 1] by the range. Each
        of the four is within ±1, so that the half has an L2 norm of at most 1.
        """
        true = labels[:, 0].astype(np.float64)
        error = np.clip((predictions[:, 0] - true) / (2 * self.spread), -1, 1)
        low, high = self.range
        outcome = np.clip((2 * true - low - high) / (high - low), -1, 1)
        each = np.stack([np.ones_like(true), error**2, outcome, outcome**2], axis=1)
        return means_of_units(each, owners) / _NORM

    def release_shape(self, bins: int) -> tuple[int, int]:  # noqa: ARG002
        """One line of four moments."""
        return 1, 4

    def released_figures(self, counts: Floats) -> dict[str, float]:
        """Both measures from the (noised) moments; errors beyond two ``spread`` count as two."""
        units, squared, outcome, square = counts[0].tolist()
        if units <= 0 or squared < 0:
            return {"rmse": math.nan, "r2": math.nan}
        low, high = self.range
        error = squared / units * (2 * self.spread) ** 2
        variance = (square / units - (outcome / units) ** 2) * ((high - low) / 2) ** 2
        return {"rmse": math.sqrt(error), "r2": _explained(error, variance)}


def regression(name: str, dictionary: Dictionary) -> Regression:
    """A task of one number."""
    label = dictionary.label
    assert isinstance(label, NumberLabel)  # noqa: S101  (what it needs)
    return Regression(name, label.range, *label.scale)


def _explained(squared: float, variance: float) -> float:
    return 1 - squared / variance if variance > 0 else math.nan
