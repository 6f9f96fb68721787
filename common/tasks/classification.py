"""One of two or more classes, for records of any kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.dictionary import Dictionary
from common.labels import ClassLabel
from common.learning.metrics import (
    accuracy,
    accuracy_from_histogram,
    auc,
    auc_from_histogram,
    histogram_shape,
    score_histogram,
)
from common.tasks.task import Floats, Measure

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Classification:
    """Two classes use one logit (of class 1), more use one logit each."""

    name: str
    classes: int

    measures = (
        Measure("auc", "AUC", chance=0.5, needs="test patients of at least two classes"),
        Measure("accuracy", "accuracy"),
    )

    @property
    def outputs(self) -> int:
        """1 for two classes, else the number of classes."""
        return 1 if self.classes == 2 else self.classes

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """Class indices [rows]."""
        import torch

        return torch.from_numpy(labels)

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each record [rows]."""
        from torch.nn import functional

        if answers.shape[1] == 1:
            return functional.binary_cross_entropy_with_logits(
                answers[:, 0], targets.to(answers.dtype), reduction="none"
            )
        return functional.cross_entropy(answers, targets, reduction="none")

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Softened cross-entropy × T², so that gradients keep their size (Hinton et al. 2015)."""
        import torch
        from torch.nn import functional

        soft = answers / temperature
        if answers.shape[1] == 1:
            wanted = torch.sigmoid(taught[:, 0] / temperature)
            each = functional.binary_cross_entropy_with_logits(soft[:, 0], wanted, reduction="none")
        else:
            wanted = torch.softmax(taught / temperature, dim=1)
            each = functional.cross_entropy(soft, wanted, reduction="none")
        return each * temperature**2

    def predictions(self, answers: Tensor, inputs: Tensor) -> Tensor:  # noqa: ARG002
        """Class probabilities [rows, classes]."""
        import torch

        if answers.shape[1] == 1:
            positive = torch.sigmoid(answers)
            return torch.cat([1 - positive, positive], dim=1)
        return torch.softmax(answers, dim=1)

    def figures(self, labels: NDArray[Any], predictions: Floats) -> dict[str, float]:
        """Area under the ROC curve (NaN with a single class) and accuracy."""
        return {"auc": auc(labels, predictions), "accuracy": accuracy(labels, predictions)}

    def contributions(
        self, labels: NDArray[Any], predictions: Floats, owners: NDArray[np.int64], bins: int
    ) -> Floats:
        """A histogram of scores by label; see ``score_histogram``."""
        return score_histogram(labels, predictions, owners, bins)

    def release_shape(self, bins: int) -> tuple[int, int]:
        """Labels × bins of the score."""
        return histogram_shape(self.classes, bins)

    def released_figures(self, counts: Floats) -> dict[str, float]:
        """Accuracy, and with two classes the AUC: neither is held within [0, 1]."""
        return {
            "auc": auc_from_histogram(counts) if len(counts) == 2 else math.nan,
            "accuracy": accuracy_from_histogram(counts),
        }


def classification(name: str, dictionary: Dictionary) -> Classification:
    """A task of classes."""
    assert isinstance(dictionary.label, ClassLabel)  # noqa: S101  (what it needs)
    return Classification(name, len(dictionary.label.classes))
