"""Answers of a finished model, and the one noised histogram evaluation may release."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.learning.metrics import Floats, score_histogram
from common.privacy.accounting import GaussianEvent, calibrate
from common.privacy.mechanisms import add_gaussian, clip_sum
from common.privacy.units import Trust
from common.randomness import Stream
from common.study import Study

_ROWS_AT_ONCE = 4096


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Answers [rows, outputs] in evaluation mode, without gradients, in bounded memory."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(chunk) for chunk in torch.split(inputs, _ROWS_AT_ONCE)])


def evaluation_noise(study: Study) -> float:
    """Noise standard deviation of the histogram for the study's evaluation ε; sensitivity 1."""
    if study.evaluation.epsilon is None or study.privacy.delta is None:
        raise ValueError("this study grants evaluation no budget")
    return calibrate(
        lambda noise: [GaussianEvent(noise_multiplier=noise)],
        epsilon=study.evaluation.epsilon,
        delta=study.privacy.delta,
        relation=study.privacy.relation,
    )


def charged_histogram(
    study: Study,
    labels: NDArray[np.int64],
    probabilities: Floats,
    owners: NDArray[np.int64],
    stream: Stream,
) -> Tensor:
    """Noised counts [classes, bins] of test patients by label and score."""
    classes = probabilities.shape[1]
    each = torch.from_numpy(score_histogram(labels, probabilities, owners, study.evaluation.bins))
    if study.privacy.trust is Trust.NONE:
        total = each.sum(dim=0)
    else:
        total = add_gaussian(clip_sum(each, 1.0), stream, evaluation_noise(study))
    return total.reshape(classes, -1).float()
