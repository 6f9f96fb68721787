"""Answers of a finished model, and codes of a frozen one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.checks import check_records_apart
from common.models.networks import Teacher

_ROWS_AT_ONCE = 4096


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Answers [rows, outputs] in evaluation mode, without gradients, in bounded memory."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(chunk) for chunk in torch.split(inputs, _ROWS_AT_ONCE)])


def codes(teacher: Teacher, inputs: Tensor) -> Tensor:
    """What the teacher's head sees of each record [rows, width + skip], in evaluation mode.

    Raises PrivacyError when the encoder mixes records: a record's code would then tell of others,
    however well its own gradient is clipped.
    """
    check_records_apart(teacher.encoder, inputs, learning=False)
    teacher.eval()
    with torch.no_grad():
        return torch.cat([teacher.represent(part) for part in torch.split(inputs, _ROWS_AT_ONCE)])
