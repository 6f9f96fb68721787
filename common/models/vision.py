"""A vision transformer, made of layers that have per-record gradient rules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.attention import Block


class VisionTransformer(nn.Module):
    """An image as a sequence of its patches (Dosovitskiy et al. 2021, arXiv 2010.11929).

    [rows, 1, h, w] → [rows, width]. A patch's place is told by sines and cosines, which are not
    learned (as in He et al. 2022, arXiv 2111.06377): no noise ever falls on them. The code is the
    mean over patches, normalised: a bounded code bounds a head's gradient. An image is filled up
    with zeros to whole patches.
    """

    places: Tensor

    def __init__(
        self, shape: tuple[int, int], *, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.patch = patch
        down, across = (-(-size // patch) for size in shape)
        self.embed = nn.Linear(patch * patch, width)
        self.register_buffer("places", place_codes(down, across, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """A code of each record."""
        tokens = self.embed(patches(images, self.patch)) + self.places
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens.mean(dim=1))  # type: ignore[no-any-return]


def patches(images: Tensor, size: int) -> Tensor:
    """Square patches of ``size`` pixels, row by row: [rows, 1, h, w] → [rows, T, size²].

    >>> patches(torch.arange(8.0).view(1, 1, 2, 4), 2)
    tensor([[[0., 1., 4., 5.],
             [2., 3., 6., 7.]]])
    """
    height, width = images.shape[-2:]
    whole = functional.pad(images, (0, -width % size, 0, -height % size))
    return functional.unfold(whole, size, stride=size).mT


def place_codes(down: int, across: int, width: int) -> Tensor:
    """Sines and cosines of each place of a grid [down · across, width] (Vaswani et al. 2017,
    section 3.5): one half of the numbers for the row, the other for the column."""
    half = width // 2
    rows = _waves(down, half)[:, None].expand(-1, across, -1)
    columns = _waves(across, width - half)[None].expand(down, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(down * across, width)


def _waves(places: int, width: int) -> Tensor:
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(places)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
