"""A hospital's records as tensors, grouped by privacy unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from common.randomness import Stream


@dataclass(frozen=True)
class Records:
    """Inputs, targets and the unit each record belongs to.

    ``inputs`` [rows, …]; ``targets`` [rows, …]: labels or a teacher's answers;
    ``owners`` [rows]: the unit of each row, ``0..units-1``.
    """

    inputs: Tensor
    targets: Tensor
    owners: Tensor
    units: int

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
    def one_each(self) -> bool:
        """Whether every unit has exactly one record."""
        return bool((self._counts == 1).all())

    def rows_of(self, units: Tensor, at_most: int, stream: Stream) -> tuple[Tensor, Tensor]:
        """Rows of these units, ``at_most`` random ones of each, and their place in ``units``.

        Returns rows [r] and owners [r] with ``owners[i]`` indexing ``units``, in ascending order.
        """
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
