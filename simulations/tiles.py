"""Which hospitals share a batch: enough to keep the processor busy, few enough for its cache.

Batches follow from the study and the hospitals' data alone. A sum's last bits depend on the shape
of the batch it was made in, so that batches which followed the machine's free memory would give
another result on another day.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from common.learning.layers import held_numbers
from common.models.checks import learners
from common.place import beside
from common.privacy.plan import StepPlan

# Measured on one core (2 MiB of L2): a round of 1,000 hospitals of an MLP took 0.60, 0.51, 0.50,
# 0.49 s in batches of 6, 12, 24 and 48 MiB; one of 40 hospitals of a CNN 0.83, 0.55 and 0.53 s in
# batches of 2, 9 and 37 MiB; one of 50 hospitals of a LoRA transformer 4.1, 2.7, 2.1 and 1.9 s in
# batches of 16, 32, 64 and 128 MiB, on a busy machine.
BATCH_BYTES = 64 * 2**20
_COPIES = 6  # of a hospital's weights: weights, sums, noised, gradient, update, moments
_PASSES = 2  # an activation's value and its derivative


def hospital_bytes(weights: int, row: int, rows: int, plan: StepPlan) -> int:
    """What a hospital of ``rows`` records takes in a batch, for a model of so many ``weights``.

    ``row``: numbers of one record, see ``row_numbers``.
    """
    return 4 * (_COPIES * weights + math.ceil(plan.sampling_rate * rows) * row)


def row_numbers(model: nn.Module, like: Tensor) -> int:
    """Numbers that a step holds for one record; ``like`` [1, …] gives its shape alone."""
    ruled, unruled = learners(model)
    found = [_PASSES * like.numel(), *map(held_numbers, unruled)]

    def note(layer: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
        # Of a Linear layer that sees one vector a record no gradient is held.
        if layer in ruled and not (isinstance(layer, nn.Linear) and arguments[0].dim() == 2):
            found.append(held_numbers(layer))
        answers = [one for one in tree_leaves(output) if isinstance(one, Tensor)]
        found.append(_PASSES * sum(one.numel() for one in answers))

    leaves = [one for one in model.modules() if not any(one.children())]
    handles = [one.register_forward_hook(note) for one in leaves]
    try:
        with torch.no_grad():
            model(*beside(model, torch.zeros_like(like)))
    finally:
        for handle in handles:
            handle.remove()
    return sum(found)


def tiles(sizes: Sequence[int], at_most: int) -> Iterator[slice]:
    """Runs of neighbours whose ``sizes`` together are no more than ``at_most``; one at least.

    >>> list(tiles([3, 3, 3, 9, 1], 6))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    start, held = 0, 0
    for place, size in enumerate(sizes):
        if place > start and held + size > at_most:
            yield slice(start, place)
            start, held = place, 0
        held += size
    if sizes:
        yield slice(start, len(sizes))
