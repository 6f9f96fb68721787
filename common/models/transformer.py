"""A small transformer over tokens, made of layers that have per-record gradient rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.dictionary import PADDING
from common.models.attention import Block


class TokenEncoder(nn.Module):
    """Records [rows, …], whose last inputs are ``length`` token ids → code [rows, code_width]:
    embeddings, blocks, and the mean over tokens.

    ``layers = 0`` is a bag of words, whose code [rows, 2 · width] is the mean of their learned
    embeddings, as they are, and beside it the largest of each number: in it one telling word of a
    long text is not lost (Shen et al. 2018, arXiv 1805.09843). Ids run from 0 (padding) to
    ``vocabulary - 1``; ``hidden_id``, one beyond, stands for a token hidden in pre-training.
    """

    def __init__(self, *, vocabulary: int, length: int, width: int, layers: int, heads: int):
        super().__init__()
        self.hidden_id = vocabulary
        self.width = width
        self.code_width = width if layers else 2 * width
        self.length = length
        self.record_numbers = activations(length=length, width=width, layers=layers, heads=heads)
        self.words = nn.Embedding(vocabulary + 1, width, padding_idx=PADDING)
        # A bag has no order; and the lengths of its words' embeddings say how much each counts.
        self.places = nn.Embedding(length, width) if layers else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width) if layers else nn.Identity()

    def tokens(self, inputs: Tensor) -> Tensor:
        """The ids of records [rows, T]: all of a text's inputs, a molecule's last ones."""
        return inputs[:, -self.length :].long()

    def states(self, tokens: Tensor) -> Tensor:
        """What each position holds after the last block: [rows, T, width]."""
        states: Tensor = self.words(tokens)
        if self.places is not None:
            # Records come first in every trainable layer's input, or they have no own gradient.
            places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
            states = states + self.places(places)
        present = tokens != PADDING
        for block in self.blocks:
            states = block(states, present)
        return self.norm(states)  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor) -> Tensor:
        """What the record's own tokens hold; with ``layers`` the mean, of length about 1: it bounds
        a head's gradient."""
        tokens = self.tokens(inputs)
        tokens = tokens[:, : longest(tokens)]
        states = self.states(tokens)
        mean = mean_of_tokens(states, tokens)
        if len(self.blocks):
            return mean / math.sqrt(self.width)
        return torch.cat([mean, largest_of_tokens(states, tokens)], dim=1)


def longest(tokens: Tensor) -> int:
    """Positions up to the last token of any row; 1 at least."""
    used = (tokens != PADDING).any(dim=0).nonzero()
    return int(used.max()) + 1 if len(used) else 1


def mean_of_tokens(states: Tensor, tokens: Tensor) -> Tensor:
    """Mean of ``states`` [rows, T, width] over the positions that hold a token; 0 for none."""
    present = (tokens != PADDING).to(states.dtype)[..., None]
    return (states * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)


def largest_of_tokens(states: Tensor, tokens: Tensor) -> Tensor:
    """The largest of each number of ``states`` [rows, T, width] over the positions that hold a
    token; 0 for none."""
    absent = (tokens == PADDING)[..., None]
    largest = states.masked_fill(absent, -math.inf).amax(dim=1)
    return largest.masked_fill(absent.all(dim=1), 0.0)


def activations(*, length: int, width: int, layers: int, heads: int) -> int:
    """Numbers that a step holds for one record, about: values and derivatives of every layer."""
    # Per position: two norms, four projections, two residuals and twice a hidden layer of 4 widths.
    return 2 * length * (layers * (16 * width + 2 * heads * length) + 2 * width)
