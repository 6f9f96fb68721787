"""One of two or more classes, for records of any kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.dictionary import Dictionary


@dataclass(frozen=True)
class Classification:
    """Two classes use one logit (of class 1), more use one logit each."""

    name: str

    def outputs(self, dictionary: Dictionary) -> int:
        """1 for two classes, else the number of classes."""
        classes = len(dictionary.label.classes)
        return 1 if classes == 2 else classes

    def loss(self, answers: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each record [rows]."""
        if answers.shape[1] == 1:
            return functional.binary_cross_entropy_with_logits(
                answers[:, 0], labels.to(answers.dtype), reduction="none"
            )
        return functional.cross_entropy(answers, labels, reduction="none")

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Softened cross-entropy × T², so that gradients keep their size (Hinton et al. 2015)."""
        soft = answers / temperature
        if answers.shape[1] == 1:
            targets = torch.sigmoid(taught[:, 0] / temperature)
            each = functional.binary_cross_entropy_with_logits(
                soft[:, 0], targets, reduction="none"
            )
        else:
            targets = torch.softmax(taught / temperature, dim=1)
            each = functional.cross_entropy(soft, targets, reduction="none")
        return each * temperature**2

    def probabilities(self, answers: Tensor) -> Tensor:
        """Class probabilities [rows, classes]."""
        if answers.shape[1] == 1:
            positive = torch.sigmoid(answers)
            return torch.cat([1 - positive, positive], dim=1)
        return torch.softmax(answers, dim=1)
