"""Principal components of public records: an encoder that is worked out rather than trained.

Under noise a head pays for every number that it sees. Components say in few numbers how compounds
(or patients) differ, and centred numbers leave a record's clipped gradient to what is its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A direction in which public records hardly differ is not blown up further than this.
_LEAST = 1e-3


class Components(nn.Module):
    """The first ``count`` inputs of a record, along ``width`` principal components [rows, width].

    Each component is divided by the root of its standard deviation, half-way between leaving it
    and giving all the same weight; then each record has norm 1, which bounds a head's gradient.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.along = nn.Linear(count, width)

    def fit(self, corpus: Tensor) -> None:
        """Take centre and components from public records [rows, inputs]."""
        records = corpus[:, : self.count].double()
        centre = records.mean(dim=0)
        centred = records - centre
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(records))
        largest = slice(-self.along.out_features, None)
        spread = variances[largest].clamp(min=0).sqrt().flip(0)
        spread = spread.clamp(min=float(spread[0]) * _LEAST + torch.finfo(torch.float32).tiny)
        weight = directions[:, largest].flip(1).T / spread.sqrt()[:, None]
        with torch.no_grad():
            self.along.weight.copy_(weight)
            self.along.bias.copy_(-(weight @ centre))

    def forward(self, inputs: Tensor) -> Tensor:
        """Codes of norm 1 (of the centre itself: 0)."""
        found: Tensor = self.along(inputs[:, : self.count])
        norms = torch.linalg.vector_norm(found, dim=1, keepdim=True)
        codes: Tensor = found / norms.clamp(min=1e-6)
        return codes
