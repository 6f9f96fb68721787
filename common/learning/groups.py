"""Which rows belong to whom: K groups of consecutive rows, each of a size of its own.

Records of many hospitals travel through one model as one batch. Layers without weights of their
own need not know; those with a weight for each hospital see the rows as K blocks of equal length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from common.place import CPU, device_of


class Groups:
    """``sizes`` [K]: how many rows each group has, in the order of the rows; 0 is a size too."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device = CPU) -> None:
        self.sizes = sizes
        self.device = device
        self.rows = sum(sizes)
        self.longest = max(sizes, default=0)
        self._even = self.rows == self.longest * len(sizes)

    def __len__(self) -> int:
        """K."""
        return len(self.sizes)

    def beside(self, model: nn.Module) -> Groups:
        """The same of rows that are where ``model`` is."""
        device = device_of(model)
        return self if device == self.device else Groups(self.sizes, device)

    @cached_property
    def of_rows(self) -> Tensor:
        """The group of each row [rows]."""
        groups = torch.arange(len(self.sizes))
        return torch.repeat_interleave(groups, torch.tensor(self.sizes)).to(self.device)

    def bounds(self) -> Iterator[tuple[int, int]]:
        """First row and the one after the last, group by group."""
        start = 0
        for size in self.sizes:
            yield start, start + size
            start += size

    def blocks(self, values: Tensor) -> Tensor:
        """``values`` [rows, …] as [K, longest, …]: short groups are filled up with zeros.

        >>> Groups((1, 2)).blocks(torch.tensor([7.0, 8.0, 9.0]))
        tensor([[7., 0.],
                [8., 9.]])
        """
        shape = (len(self.sizes), self.longest, *values.shape[1:])
        if self._even:
            return values.reshape(shape)
        filled = values.new_zeros(len(self.sizes) * self.longest, *values.shape[1:])
        return filled.index_copy_(0, self._places, values).view(shape)

    def unblocked(self, blocks: Tensor) -> Tensor:
        """``blocks`` [K, longest, …] as rows [rows, …] again."""
        flat = blocks.reshape(len(self.sizes) * self.longest, *blocks.shape[2:])
        return flat if self._even else flat.index_select(0, self._places)

    def lines(self, values: Tensor) -> Tensor:
        """``values`` [rows, …, width] as [K, longest · …, width], for products of matrices."""
        return self.blocks(values).flatten(start_dim=1, end_dim=-2)

    def times(self, values: Tensor, matrices: Tensor) -> Tensor:
        """``values`` [rows, …, a] times the group's own of ``matrices`` [K, a, b]: [rows, …, b].

        Groups of different sizes are multiplied one by one: filling them up would move all rows
        twice, and multiply the empty ones.
        """
        if self._even:
            blocks = torch.bmm(self.lines(values), matrices)
            return blocks.view(*values.shape[:-1], matrices.shape[2])
        made = values.new_empty(*values.shape[:-1], matrices.shape[2])
        for one, (start, stop) in zip(matrices, self.bounds(), strict=True):
            torch.mm(
                values[start:stop].flatten(end_dim=-2),
                one,
                out=made[start:stop].flatten(end_dim=-2),
            )
        return made

    def outer(self, values: Tensor, others: Tensor) -> Tensor:
        """Σ over each group of ``values`` [rows, …, a] ⊗ ``others`` [rows, …, b]: [K, a, b]."""
        if self._even:
            return torch.bmm(self.lines(values).mT, self.lines(others))
        made = values.new_empty(len(self), values.shape[-1], others.shape[-1])
        for one, (start, stop) in zip(made, self.bounds(), strict=True):
            left, right = (part[start:stop].flatten(end_dim=-2) for part in (values, others))
            torch.mm(left.t(), right, out=one)
        return made

    @cached_property
    def _places(self) -> Tensor:
        """The place of each row among K · longest [rows]."""
        sizes = torch.tensor(self.sizes)
        skipped = torch.arange(len(self.sizes)) * self.longest - (torch.cumsum(sizes, 0) - sizes)
        return torch.arange(self.rows, device=self.device) + skipped.to(self.device)[self.of_rows]
