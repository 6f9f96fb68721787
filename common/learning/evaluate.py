"""Answers of a finished model, and codes of a frozen one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.checks import check_records_apart
from common.models.networks import Teacher
from common.models.sizes import record_numbers, rows_at_once
from common.place import beside, device_of
from common.tasks.task import Floats, Task


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """Answers [rows, outputs] in evaluation mode, without gradients, in bounded memory.

    Wherever the model is, inputs and answers are on the processor, and in float32.
    """
    model.eval()
    with torch.no_grad():
        return torch.cat([model(*beside(model, part)).cpu() for part in _parts(model, inputs)])


def predictions(task: Task, model: nn.Module, inputs: Tensor) -> Floats:
    """What the model says to a reader of each record [rows, …]; as ``answer``, and no more of the
    answers is held than of a part of the records."""
    model.eval()
    with torch.no_grad():
        parts = [
            task.predictions(model(*beside(model, part)).cpu(), part)
            for part in _parts(model, inputs)
        ]
    return torch.cat(parts).double().numpy()


def codes(teacher: Teacher, inputs: Tensor) -> Tensor:
    """What the teacher's head sees of each record [rows, width + skip], in evaluation mode.

    Raises PrivacyError when the encoder mixes records: a record's code would then tell of others,
    however well its own gradient is clipped.
    """
    check_records_apart(teacher.encoder, inputs, learning=False)
    teacher.eval()
    with torch.no_grad():
        parts = _parts(teacher, inputs)
        return torch.cat([teacher.represent(*beside(teacher, part)).cpu() for part in parts])


def _parts(model: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.split(inputs, rows_at_once(record_numbers(model), device_of(model)))
