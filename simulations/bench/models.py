"""Three small models on random public data, for timing one private step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.models.attention import Block
from common.models.lora import add_lora
from common.models.networks import image_student
from common.modelspec import LoraSpec
from common.privacy.plan import StepPlan
from common.privacy.units import PrivacyUnit, Relation

VOCABULARY = 512
TOKENS = 64
WIDTH = 128
CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.0


@dataclass(frozen=True)
class Workload:
    """A model maker and one batch for it: ``inputs`` [rows, …], ``targets`` [rows]."""

    make: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor


def workloads() -> dict[str, Workload]:
    """MLP 30-64-64-2 on 64 records, a CNN on 64 images, a LoRA transformer on 32 texts."""
    generator = torch.Generator().manual_seed(0)

    def labels(rows: int) -> Tensor:
        return torch.randint(0, 2, (rows,), generator=generator)

    return {
        "mlp": Workload(mlp, torch.randn(64, 30, generator=generator), labels(64)),
        "cnn": Workload(cnn, torch.randn(64, 1, 28, 28, generator=generator), labels(64)),
        "lora": Workload(
            lora_transformer,
            torch.randint(0, VOCABULARY, (32, TOKENS), generator=generator),
            labels(32),
        ),
    }


def mlp() -> nn.Module:
    """6,274 parameters."""
    return nn.Sequential(
        nn.Linear(30, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)
    )


def cnn() -> nn.Module:
    """About 30,000 parameters, GroupNorm, no BatchNorm."""
    return image_student((28, 28), (16, 32, 80), 2)


class Transformer(nn.Module):
    """Words in, one answer a record out: [rows, T] → [rows, outputs]."""

    def __init__(self, *, width: int = WIDTH, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        """The mean over positions decides."""
        code = self.words(inputs)
        for block in self.blocks:
            code = block(code)
        return self.head(code.mean(dim=1))  # type: ignore[no-any-return]


def lora_transformer(width: int = WIDTH, *, layers: int = 2, heads: int = 4) -> nn.Module:
    """LoRA of rank 8 on every attention and MLP layer, and the head."""
    model = Transformer(width=width, layers=layers, heads=heads)
    adapted = ("query", "key", "value", "out", "up", "down")
    add_lora(model, LoraSpec(kind="lora", layers=adapted), seed=0)
    model.head.requires_grad_(True)
    return model


def in_mid_training(model: nn.Module) -> nn.Module:
    """The model, with corrections that are no longer zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("up.weight") and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model


def loss(answers: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each record [rows]."""
    return nn.functional.cross_entropy(answers, targets, reduction="none")


def plan() -> StepPlan:
    """A step over all records, each a unit of its own."""
    return StepPlan(
        unit=PrivacyUnit.RECORD,
        relation=Relation.ADD_REMOVE,
        sampling_rate=1.0,
        clip_norm=CLIP_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        records_per_unit=1,
    )
