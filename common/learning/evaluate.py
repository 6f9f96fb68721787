"""Answers of a finished model, and the one noised histogram evaluation may release."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.learning.metrics import Floats, score_histogram
from common.privacy.plan import StepPlan
from common.randomness import Stream
from common.study import Study

_ROWS_AT_ONCE = 4096


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Answers [rows, outputs] in evaluation mode, without gradients, in bounded memory."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(chunk) for chunk in torch.split(inputs, _ROWS_AT_ONCE)])


def charged_histogram(
    study: Study,
    plan: StepPlan,
    labels: NDArray[np.int64],
    probabilities: Floats,
    owners: NDArray[np.int64],
    stream: Stream,
) -> Tensor:
    """Noised counts [classes · bins] of test patients by label and score."""
    each = torch.from_numpy(score_histogram(labels, probabilities, owners, study.evaluation.bins))
    if not plan.private:
        return each.sum(dim=0).float()
    return plan.noised(plan.clipped_sum(each), stream).float()
