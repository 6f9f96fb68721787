"""Several yes-or-no outcomes at once, some of them unknown, for records of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.dictionary import Dictionary
from common.labels import SeveralLabel
from common.learning.metrics import auc, auc_from_histogram
from common.tasks.task import Floats, Measure

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Several:
    """One logit an outcome. A record's loss is the mean over those of its outcomes that are known:
    an outcome that was not looked at teaches nothing."""

    name: str
    outputs: int

    measures = (
        Measure("auc", "mean AUC", chance=0.5, needs="test patients of both kinds in an outcome"),
    )

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """1, 0 or NaN [rows, outcomes]."""
        import torch

        return torch.from_numpy(labels).float()

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over each record's known outcomes [rows]; 0 where none is."""
        import torch
        from torch.nn import functional

        known = ~torch.isnan(targets)
        each = functional.binary_cross_entropy_with_logits(
            answers, torch.where(known, targets, 0.0), reduction="none"
        )
        return torch.where(known, each, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Softened cross-entropy × T², over all outcomes: a teacher answers every one."""
        import torch

        wanted = torch.sigmoid(taught / temperature)
        return self.loss(answers / temperature, wanted) * temperature**2

    def predictions(self, answers: Tensor, inputs: Tensor) -> Tensor:  # noqa: ARG002
        """Probabilities [rows, outcomes]."""
        import torch

        return torch.sigmoid(answers)

    def figures(self, labels: NDArray[Any], predictions: Floats) -> dict[str, float]:
        """Mean area under the ROC curve over the outcomes that have both kinds of records."""
        return {"auc": _mean([_auc(labels[:, k], predictions[:, k]) for k in range(self.outputs)])}

    def contributions(
        self, labels: NDArray[Any], predictions: Floats, owners: NDArray[np.int64], bins: int
    ) -> Floats:
        """A histogram of scores by label for each outcome, of units: [units, outcomes · 2 · bins].

        A record adds 1 / √outcomes at each known outcome: an L2 norm of at most 1, and so has the
        mean over a unit's records.
        """
        counts = np.bincount(owners)
        table = np.zeros((len(counts), self.outputs, 2, bins))
        rows, outcomes = np.nonzero(~np.isnan(labels))
        score = predictions[rows, outcomes]
        position = np.clip((score * bins).astype(np.int64), 0, bins - 1)
        label = labels[rows, outcomes].astype(np.int64)
        weight = 1 / (counts[owners[rows]] * math.sqrt(self.outputs))
        np.add.at(table, (owners[rows], outcomes, label, position), weight)
        return table.reshape(len(counts), -1)

    def release_shape(self, bins: int) -> tuple[int, int]:
        """Two lines an outcome, negatives first."""
        return 2 * self.outputs, bins

    def released_figures(self, counts: Floats) -> dict[str, float]:
        """The mean AUC; an outcome whose noised counts are none is left out."""
        each = counts.reshape(self.outputs, 2, -1)
        return {"auc": _mean([auc_from_histogram(one) for one in each])}


def several(name: str, dictionary: Dictionary) -> Several:
    """A task of several outcomes."""
    label = dictionary.label
    assert isinstance(label, SeveralLabel)  # noqa: S101  (what it needs)
    return Several(name, len(label.names))


def _auc(labels: NDArray[Any], scores: Floats) -> float:
    known = ~np.isnan(labels)
    wanted = labels[known].astype(np.int64)
    return auc(wanted, np.stack([1 - scores[known], scores[known]], axis=1))


def _mean(each: Sequence[float]) -> float:
    known = [one for one in each if not math.isnan(one)]
    return float(np.mean(known)) if known else math.nan
