"""Transformers whose every weight lies in a layer with a rule for its records' gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SelfAttention(nn.Module):
    """Attention over all positions, made of Linear layers: [rows, T, width] → the same.

    ``causal``: of each position over itself and those before it. Then no ``present`` is needed:
    padding lies behind all that a text's own positions look at.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, inputs: Tensor, present: Tensor | None = None) -> Tensor:
        """Mix positions of each record by itself; of those ``present`` [rows, T], if given."""
        rows, positions, width = inputs.shape

        def split(layer: nn.Module) -> Tensor:
            answer: Tensor = layer(inputs)
            return answer.reshape(rows, positions, self.heads, -1).transpose(1, 2)

        query, key, value = split(self.query), split(self.key), split(self.value)
        # Finite, so that a record without any token has an answer, and gradients.
        least = torch.finfo(inputs.dtype).min
        mask = None if present is None else (~present[:, None, None]).to(inputs.dtype) * least
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal
        )
        return self.out(mixed.transpose(1, 2).reshape(rows, positions, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm transformer layer; its MLP is ``wider`` times as wide."""

    def __init__(self, width: int, heads: int, *, wider: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.first_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal)
        self.second_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, wider * width)
        self.down = nn.Linear(wider * width, width)

    def forward(self, inputs: Tensor, present: Tensor | None = None) -> Tensor:
        """[rows, T, width] → the same."""
        inputs = inputs + self.attention(self.first_norm(inputs), present)
        wide = functional.gelu(self.up(self.second_norm(inputs)))
        return inputs + self.down(wide)  # type: ignore[no-any-return]
