"""A small transformer that reads a text from its beginning and knows at each token those before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.dictionary import PADDING
from common.models.attention import Block
from common.models.transformer import activations


class CausalEncoder(nn.Module):
    """Token ids [rows, T] → codes [rows, T, width]: at each token, of those *before* it.

    The code at a token is what a head tells the token itself from; the first one is told from a
    start that stands before every text. A code is 0 where there is no token, so that a head without
    a bias has no opinion there. Embeddings are not tied to the head's weights: each use of a tied
    weight would be clipped as if it were alone.
    """

    def __init__(self, *, vocabulary: int, length: int, width: int, layers: int, heads: int):
        super().__init__()
        self.start_id = vocabulary
        self.code_width = width
        # A head's answers, their logarithms and their derivatives, beside the layers' own.
        self.record_numbers = 3 * length * vocabulary + activations(
            length=length, width=width, layers=layers, heads=heads
        )
        self.words = nn.Embedding(vocabulary + 1, width, padding_idx=PADDING)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        tokens = inputs.long()
        before = torch.cat([torch.full_like(tokens[:, :1], self.start_id), tokens[:, :-1]], dim=1)
        # Records come first in every trainable layer's input, or they have no own gradient.
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        states: Tensor = self.words(before) + self.places(places)
        for block in self.blocks:
            states = block(states)
        return self.norm(states) * (tokens != PADDING)[..., None]  # type: ignore[no-any-return]
