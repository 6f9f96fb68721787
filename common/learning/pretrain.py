"""Self-supervised pre-training on the public corpus: hide part of a record, reconstruct it.

A model of language learns on public texts what it learns on patients' ones: the next token.

Masked modelling is a sum over records. Contrastive losses are not (one record moves the others'
gradients), so they could never be carried over to patients' data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.dictionary import PADDING
from common.features import FeatureMap
from common.learning.gradients import batch_gradient
from common.learning.loop import run
from common.models import Teacher, initialise
from common.models.components import Components
from common.models.lora import uncorrected
from common.models.pretrained import PinnedEncoder
from common.models.transformer import TokenEncoder, longest
from common.modelspec import VitSpec
from common.place import at_work, beside, here, wide
from common.study import Study
from common.tasks import Task, task_of
from common.tensors import get_vector, set_vector

_PATCH = 4  # pixels on a side, as in small masked autoencoders (He et al. 2022)
_WATCHED_SHARE = 8  # one in so many public records is kept to watch the loss on


def pretrain(study: Study, teacher: Teacher, features: FeatureMap, corpus: Tensor) -> float:
    """Train ``teacher``'s encoder in place on ``corpus`` [rows, …]; the final loss on held rows.

    The decoder serves only here and is thrown away. An encoder that comes trained only takes the
    centre of the corpus, components are worked out: their loss is NaN.
    """
    with at_work(teacher):
        if isinstance(teacher.encoder, PinnedEncoder):
            teacher.encoder.centre_on(*beside(teacher, corpus))
            return math.nan
        if isinstance(teacher.encoder, Components):
            teacher.encoder.fit(corpus)
            return math.nan
        with uncorrected(teacher):
            return _pretrain(study, teacher, features, corpus)


def _pretrain(study: Study, teacher: Teacher, features: FeatureMap, corpus: Tensor) -> float:
    spec = study.pretrain
    if isinstance(teacher.encoder, TokenEncoder):
        corpus = teacher.encoder.tokens(corpus)
    pair, loss = _question(study, teacher, corpus)
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
        return loss(pair, *beside(pair, batch, mask(batch, generator)))

    def watch(weights: Tensor) -> float:
        set_vector(pair, weights)
        with torch.no_grad():
            return float(loss(pair, *beside(pair, watched, watched_mask)))

    start = get_vector(pair)
    weights = (
        start
        if spec.steps == 0
        else run(
            start, batch_gradient(pair, objective), spec.optimiser, steps=spec.steps, watch=watch
        )
    )
    return watch(weights)


def _question(
    study: Study, teacher: Teacher, corpus: Tensor
) -> tuple[nn.Module, Callable[[Any, Tensor, Tensor], Tensor]]:
    """What learns, and its loss on a batch and what is hidden of it."""
    if study.dictionary.asks == "language":
        return teacher, partial(_next_tokens, task_of(study))
    encoder = teacher.encoder
    if isinstance(encoder, TokenEncoder):
        width, outputs, loss = encoder.width, encoder.hidden_id, _hidden_tokens
    else:
        width, outputs, loss = teacher.width, corpus[0].numel(), _hidden_error
    decoder = nn.Linear(width, outputs)
    initialise(decoder, seed=study.seed + 2)
    return nn.Sequential(encoder, decoder).to(here().device), loss


def mask_for(
    features: FeatureMap,
    batch: Tensor,
    rate: float,
    generator: torch.Generator,
    *,
    patch: int = _PATCH,
) -> Tensor:
    """True where an input is hidden: whole columns of a table, tokens, whole patches of an image,
    ``patch`` pixels on a side."""
    rows = len(batch)
    if not batch.is_floating_point():
        return (torch.rand(batch.shape, generator=generator) < rate) & (batch != PADDING)
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


def _next_tokens(task: Task, teacher: nn.Module, batch: Tensor, _: Tensor) -> Tensor:
    """The task's own loss; nothing is hidden but what comes after."""
    with here().passing():
        answers = teacher(batch)
    return task.loss(wide(answers), batch).mean()


def _hidden_error(pair: nn.Sequential, batch: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error on the hidden inputs."""
    with here().passing():
        guessed: Tensor = wide(pair(batch.masked_fill(mask, 0.0))).view_as(batch)
    return ((guessed - batch)[mask]).square().mean() if mask.any() else guessed.sum() * 0.0


def _hidden_tokens(pair: nn.Sequential, batch: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the hidden tokens (Devlin et al. 2019), each a part of its record's."""
    encoder, decoder = pair
    assert isinstance(encoder, TokenEncoder)  # noqa: S101  (who else is asked about tokens)
    end = longest(batch)
    batch, mask = batch[:, :end], mask[:, :end]
    with here().passing():
        states = encoder.states(batch.masked_fill(mask, encoder.hidden_id))
        if not mask.any():
            return states.sum() * 0.0
        guessed = decoder(states[mask])
    return functional.cross_entropy(wide(guessed), batch[mask])
