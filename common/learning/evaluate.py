"""Answers of a finished model, and codes of a frozen one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.checks import check_records_apart
from common.models.networks import Teacher
from common.models.sizes import record_numbers, rows_at_once


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Answers [rows, outputs] in evaluation mode, without gradients, in bounded memory."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in _parts(model, inputs)])


def codes(teacher: Teacher, inputs: Tensor) -> Tensor:
    """What the teacher's head sees of each record [rows, width + skip], in evaluation mode.

    Raises PrivacyError when the encoder mixes records: a record's code would then tell of others,
    however well its own gradient is clipped.
    """
    check_records_apart(teacher.encoder, inputs, learning=False)
    teacher.eval()
    with torch.no_grad():
        return torch.cat([teacher.represent(part) for part in _parts(teacher, inputs)])


def _parts(model: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.split(inputs, rows_at_once(record_numbers(model)))
