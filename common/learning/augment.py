"""Random views of images: turned, moved, mirrored.

Each view is made of one record and of draws that no record enters, by public settings: it is
that record's own, as far as privacy goes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from common.stages import AugmentSpec

DRAWS = 4
"""Uniforms that one view takes."""


def augmented(images: Tensor, draws: Tensor, spec: AugmentSpec) -> Tensor:
    """A view of each image [rows, channels, h, w], in the same shape.

    ``draws`` [rows, DRAWS]: uniforms in [0, 1). Beyond its edge an image goes on as at its edge.
    """
    if not len(images):
        return images
    height, width = images.shape[-2:]
    around = (2 * draws - 1).to(images.dtype)
    angle = around[:, 0] * math.radians(spec.rotation_deg)
    across, down = (2 * spec.shift * around[:, 1] / width, 2 * spec.shift * around[:, 2] / height)
    mirrored = draws[:, 3] < 0.5 if spec.flip else torch.zeros(len(images), dtype=torch.bool)
    side = torch.where(mirrored, -1.0, 1.0).to(images.dtype)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # Coordinates run from -1 to 1 along both edges, however long these are.
    rows = [
        torch.stack([side * cosine, -sine * (height / width), across], dim=1),
        torch.stack([side * sine * (width / height), cosine, down], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
