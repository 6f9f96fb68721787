"""Self-supervised pre-training on the public corpus: hide part of a record, reconstruct it.

Masked modelling is a sum over records. Contrastive losses are not (one record moves the others'
gradients), so they could never be carried over to patients' data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.features import FeatureMap
from common.learning.gradients import batch_gradient
from common.learning.loop import run
from common.models import Teacher, initialise
from common.modelspec import VitSpec
from common.study import Study
from common.tensors import get_vector, set_vector

_PATCH = 4  # pixels on a side, as in small masked autoencoders (He et al. 2022)
_WATCHED_SHARE = 8  # one in so many public records is kept to watch the loss on


def pretrain(study: Study, teacher: Teacher, features: FeatureMap, corpus: Tensor) -> float:
    """Train ``teacher``'s encoder in place on ``corpus`` [rows, …]; the final loss on held rows.

    The decoder serves only here and is thrown away.
    """
    spec = study.pretrain
    decoder = nn.Linear(teacher.width, corpus[0].numel())
    initialise(decoder, seed=study.seed + 2)
    pair = nn.Sequential(teacher.encoder, decoder)
    generator = torch.Generator().manual_seed(study.seed)
    held = max(1, len(corpus) // _WATCHED_SHARE)
    watched, training = corpus[:held], corpus[held:] if len(corpus) > held else corpus
    # A patch that a transformer sees as one is hidden as one.
    patch = study.teacher.patch if isinstance(study.teacher, VitSpec) else _PATCH

    def mask(batch: Tensor, source: torch.Generator) -> Tensor:
        return mask_for(features, batch, spec.mask_rate, source, patch=patch)

    watched_mask = mask(watched, torch.Generator().manual_seed(0))

    def objective() -> Tensor:
        rows = torch.randint(len(training), (spec.batch,), generator=generator)
        batch = training[rows]
        return _hidden_error(pair, batch, mask(batch, generator))

    def watch(weights: Tensor) -> float:
        set_vector(pair, weights)
        with torch.no_grad():
            return float(_hidden_error(pair, watched, watched_mask))

    start = get_vector(pair)
    weights = (
        start
        if spec.steps == 0
        else run(
            start, batch_gradient(pair, objective), spec.optimiser, steps=spec.steps, watch=watch
        )
    )
    return watch(weights)


def mask_for(
    features: FeatureMap,
    batch: Tensor,
    rate: float,
    generator: torch.Generator,
    *,
    patch: int = _PATCH,
) -> Tensor:
    """True where an input is hidden: whole columns of a table, whole patches of an image,
    ``patch`` pixels on a side."""
    rows = len(batch)
    if features.image_shape is None:
        mask = torch.zeros(batch.shape, dtype=torch.bool)
        groups = features.groups()
        hidden = torch.rand(rows, len(groups), generator=generator) < rate
        widths = torch.tensor([group.stop - group.start for group in groups])
        column = torch.repeat_interleave(torch.arange(len(groups)), widths)
        mask[:, : len(column)] = hidden[:, column]
        return mask
    height, width = features.image_shape
    patches = (
        torch.rand(rows, 1, -(-height // patch), -(-width // patch), generator=generator) < rate
    )
    grown = patches.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return grown[:, :, :height, :width]


def _hidden_error(pair: nn.Module, batch: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error on the hidden inputs."""
    guessed: Tensor = pair(batch.masked_fill(mask, 0.0)).view_as(batch)
    return ((guessed - batch)[mask]).square().mean() if mask.any() else guessed.sum() * 0.0
