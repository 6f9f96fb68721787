"""Has a model learned a secret by heart? The exposure of a canary (Carlini et al. 2019, "The Secret
Sharer", USENIX Security, section 4).

A canary is a sentence with a random secret in it, put among one patient's texts. The model says how
likely it finds every secret that could have stood there. One that it learned comes first among
them, log₂|R| bits of exposure; one that it never met comes anywhere, 1.44 bits on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.learning.evaluate import answer
from common.models.sizes import record_numbers, rows_at_once
from common.place import device_of
from common.tasks.task import Task
from common.text import Tokeniser


@dataclass(frozen=True)
class Canary:
    """``sentence`` with a ``{}`` where a secret of so many decimal ``digits`` stands."""

    sentence: str = "Patient number {}."
    digits: int = 3

    @property
    def secrets(self) -> int:
        """|R|: how many there could have been."""
        return int(10**self.digits)

    def text(self, secret: int) -> str:
        """The sentence with this secret."""
        return self.sentence.format(f"{secret:0{self.digits}d}")

    def ids(self, tokeniser: Tokeniser, secrets: Sequence[int], length: int) -> Tensor:
        """Token ids [secrets, length]."""
        texts = [self.text(one) for one in secrets]
        return torch.from_numpy(tokeniser.encode(texts, length).astype(np.int64))


def exposures(
    model: nn.Module,
    task: Task,
    tokeniser: Tokeniser,
    canary: Canary,
    secrets: Sequence[int],
    *,
    length: int,
) -> NDArray[np.float64]:
    """log₂|R| − log₂ rank of each of ``secrets`` [secrets], among all by the model's loss.

    Secrets that the model finds equally likely share their middle rank: a model that knows nothing
    exposes nothing.
    """
    candidates = canary.ids(tokeniser, range(canary.secrets), length)
    at_once = rows_at_once(record_numbers(model), device_of(model))
    each = torch.cat(
        [task.loss(answer(model, part), part) for part in torch.split(candidates, at_once)]
    ).numpy()
    own = each[list(secrets)][:, None]
    rank = (each[None] < own).sum(axis=1) + ((each[None] == own).sum(axis=1) + 1) / 2
    found: NDArray[np.float64] = math.log2(canary.secrets) - np.log2(rank)
    return found
