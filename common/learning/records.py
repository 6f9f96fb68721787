"""A hospital's records as tensors, grouped by privacy unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from common.learning.augment import DRAWS, augmented
from common.randomness import Stream
from common.stages import AugmentSpec


@dataclass(frozen=True)
class Records:
    """Inputs, targets and the unit each record belongs to.

    ``inputs`` [rows, …]; ``targets`` [rows, …]: labels or a teacher's answers;
    ``owners`` [rows]: the unit of each row, ``0..units-1``.
    ``augment``: inputs are images, seen as ``views`` random views of each in one step; None: as
    they are.
    """

    inputs: Tensor
    targets: Tensor
    owners: Tensor
    units: int
    augment: AugmentSpec | None = None
    views: int = 1

    @cached_property
    def _order(self) -> Tensor:
        return torch.argsort(self.owners, stable=True)

    @cached_property
    def _counts(self) -> Tensor:
        return torch.bincount(self.owners, minlength=self.units)

    @cached_property
    def _starts(self) -> Tensor:
        return torch.cumsum(self._counts, 0) - self._counts

    @cached_property
    def most(self) -> int:
        """Records of the unit that has most of them."""
        return int(self._counts.max()) if self.units else 0

    @cached_property
    def one_each(self) -> bool:
        """Whether every unit has exactly one record."""
        return bool((self._counts == 1).all())

    def rows_of(self, units: Tensor, at_most: int, stream: Stream) -> tuple[Tensor, Tensor]:
        """Rows of these units, ``at_most`` random ones of each, and their place in ``units``.

        Returns rows [r] and owners [r] with ``owners[i]`` indexing ``units``, in ascending order;
        a row that is seen as several views comes as often, one after another.
        """
        rows, owners = self._records_of(units, at_most, stream)
        if self.views == 1:
            return rows, owners
        return rows.repeat_interleave(self.views), owners.repeat_interleave(self.views)

    def look(self, rows: Tensor, stream: Stream) -> Tensor:
        """The inputs of ``rows``, as they were given by ``rows_of``: each a view of its own.

        Views are drawn row by row: taking rows in parts changes none.
        """
        inputs = self.inputs[rows]
        if self.augment is None:
            return inputs
        draws = torch.from_numpy(stream.uniform(len(rows) * DRAWS)).view(-1, DRAWS)
        return augmented(inputs, draws, self.augment)

    def _records_of(self, units: Tensor, at_most: int, stream: Stream) -> tuple[Tensor, Tensor]:
        if self.one_each:
            return self._order[units], torch.arange(len(units))
        counts = self._counts[units]
        owners = torch.repeat_interleave(torch.arange(len(units)), counts)
        within = torch.arange(len(owners)) - (torch.cumsum(counts, 0) - counts)[owners]
        rows = self._order[self._starts[units][owners] + within]
        if not len(counts) or int(counts.max()) <= at_most:
            return rows, owners
        # Random priority, then rank within the unit: a uniform choice without replacement.
        priority = torch.from_numpy(stream.uniform(len(rows)))
        shuffled = torch.argsort(priority)
        shuffled = shuffled[torch.argsort(owners[shuffled], stable=True)]
        kept = shuffled[within < at_most]
        return rows[kept], owners[kept]
