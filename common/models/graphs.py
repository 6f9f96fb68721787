"""Networks over a molecule's atoms and bonds.

A record holds its own bonds, so that products with them stay within the record, and everything that
is learned is a Linear layer over its atoms: per-record gradients exist by the usual rules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.molecules import ATOM_NUMBERS, Layout


class GraphEncoder(nn.Module):
    """A few rounds of messages between bonded atoms, then one code a molecule.

    ``hidden``: the width of the atoms after each round and, last, of the code.
    """

    def __init__(self, layout: Layout, hidden: tuple[int, ...]) -> None:
        super().__init__()
        *widths, code = hidden
        self.layout = layout
        self.first = nn.Linear(ATOM_NUMBERS, widths[0])
        self.own = nn.ModuleList(map(nn.Linear, [widths[0], *widths[:-1]], widths))
        self.heard = nn.ModuleList(
            map(nn.Linear, [2 * one for one in [widths[0], *widths[:-1]]], widths)
        )
        self.read = nn.Linear(2 * widths[-1], code)

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, layout.width] → [rows, hidden[-1]], within ±1."""
        most, start = self.layout.atoms, self.layout.numbers
        middle = start + most * ATOM_NUMBERS
        atoms = inputs[:, start:middle].reshape(-1, most, ATOM_NUMBERS)
        order = inputs[:, middle : middle + most * most].reshape(-1, most, most)
        there = atoms[:, :, :1].clamp(0, 1)
        bonded = order.clamp(0, 1)
        # Means over the neighbours, by bond and by how much each bond is more than a single one.
        neighbours = bonded.sum(dim=2, keepdim=True).clamp(min=1)
        bonds, more = bonded / neighbours, (order - bonded) / neighbours
        state = nn.functional.gelu(self.first(atoms)) * there
        for own, heard in zip(self.own, self.heard, strict=True):
            messages = torch.cat([bonds @ state, more @ state], dim=2)
            step = nn.functional.gelu(own(state) + heard(messages)) * there
            state = state + step if step.shape == state.shape else step
        count = there.sum(dim=1).clamp(min=1)
        # The sum, which grows with the molecule, and the mean, which does not.
        total = state.sum(dim=1)
        return torch.tanh(self.read(torch.cat([total / most, total / count], dim=1)))
