"""How many records fit into memory together."""

from __future__ import annotations

from torch import nn

# So many numbers are held at once (float32: 128 MiB).
_NUMBERS = 32 * 2**20
# More records than this gain no speed from being taken together, and their activations cost memory.
_MOST_ROWS = 4096


def rows_at_once(numbers_per_row: int) -> int:
    """Records to take together when each needs so many numbers."""
    return max(1, min(_MOST_ROWS, _NUMBERS // max(1, numbers_per_row)))


def record_numbers(model: nn.Module) -> int:
    """What a step holds for one record, as the parts of ``model`` for which it is much say."""
    return sum(int(getattr(part, "record_numbers", 0)) for part in model.modules())
