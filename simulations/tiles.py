"""How many hospitals a batch holds: enough to keep the processor busy, few enough for its cache."""

from __future__ import annotations

from collections.abc import Sequence

from client.training import Assignment
from common.learning.records import Records


def tile_size(
    assignment: Assignment, records: Sequence[Records], *, memory_bytes: int | None
) -> int:
    """Hospitals taken together."""
    return 64
