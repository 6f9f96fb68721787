"""How many records fit into memory together."""

from __future__ import annotations

import torch
from torch import nn

# So many numbers are held at once (float32: 128 MiB).
_NUMBERS = 32 * 2**20
# More records than this gain no speed from being taken together, and their activations cost memory.
_MOST_ROWS = 4096
_GPU_SHARE = 8  # of a GPU's memory


def rows_at_once(numbers_per_row: int, device: torch.device) -> int:
    """Records to take together when each needs so many numbers on ``device``."""
    numbers = _NUMBERS if device.type == "cpu" else _gpu_numbers(device)
    return max(1, min(_MOST_ROWS, numbers // max(1, numbers_per_row)))


def _gpu_numbers(device: torch.device) -> int:
    """A share of all its memory, not of what is free: batches must not differ from day to day."""
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return memory // _GPU_SHARE // 4


def record_numbers(model: nn.Module) -> int:
    """What a step holds for one record, as the parts of ``model`` for which it is much say."""
    return sum(int(getattr(part, "record_numbers", 0)) for part in model.modules())
