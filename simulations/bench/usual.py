"""Private steps in the usual way: an Opacus engine over a Poisson loader, made anew each round."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from common.learning.capture import Loss
from common.privacy.budget import budget_of
from common.study import Study
from common.tensors import trainable

LEARNING_RATE = 0.1


def opacus_steps(
    study: Study, model: nn.Module, inputs: Tensor, wanted: Tensor, loss: Loss
) -> nn.Module:
    """``model`` after the local steps that ``study`` asks of a round, on one hospital's records."""
    spec = study.finetune
    optimiser: Any = torch.optim.SGD(trainable(model), lr=LEARNING_RATE)
    loader: Any = DataLoader(
        TensorDataset(inputs, wanted), batch_size=round(spec.sampling_rate * len(inputs))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        private, optimiser, loader = PrivacyEngine().make_private(
            module=model.train(),
            optimizer=optimiser,
            data_loader=loader,
            noise_multiplier=budget_of(study).noise_multiplier,
            max_grad_norm=study.privacy.clip_norm,
        )
        # A loader holds as many batches as an epoch has steps: those of a round, here.
        for _, (batch, answers) in zip(range(spec.local_steps), loader, strict=False):
            optimiser.zero_grad()
            loss(private(batch), answers).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return private._module  # type: ignore[no-any-return]
