"""Every kind of model that can be trained privately, and some records for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

from common.models.lora import add_lora
from common.modelspec import LoraSpec

ROWS = 6


def loss(answers: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(answers, targets, reduction="none")


class Mean(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(dim=1)


class Attention(nn.Module):
    """Plain self-attention from Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        scores = self.query(inputs) @ self.key(inputs).mT / 8**0.5
        return self.head((torch.softmax(scores, dim=-1) @ self.value(inputs)).mean(dim=1))


class OpacusAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = DPMultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.attention(inputs, inputs, inputs, need_weights=False)[0].mean(dim=1))


class Recurrent(nn.Module):
    """One layer used three times in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(3):
            inputs = torch.tanh(self.cell(inputs))
        return self.head(inputs)


class PartlyUsed(nn.Module):
    """One trainable layer is never used, another's answer is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.idle = nn.Linear(8, 3)
        self.ignored = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        self.ignored(inputs)
        return self.head(inputs)


class PositionTable(nn.Module):
    """A frozen table in a buffer, which never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 5 * 8).reshape(5, 8))
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(inputs + self.table)).mean(dim=1))


def lora() -> nn.Module:
    model = Attention()
    add_lora(model, LoraSpec(kind="lora", rank=2), seed=0)
    nn.init.normal_(model.query.up.weight)  # type: ignore[union-attr, arg-type]
    nn.init.normal_(model.value.up.weight)  # type: ignore[union-attr, arg-type]
    return model


def frozen_encoder() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    model[0].requires_grad_(False)
    return model


def bias_only() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    for module in (model[0], model[2]):
        module.weight.requires_grad_(False)
    return model


def vectors() -> Tensor:
    return torch.randn(ROWS, 8)


def sequences() -> Tensor:
    return torch.randn(ROWS, 5, 8)


def images() -> Tensor:
    return torch.randn(ROWS, 2, 8, 8)


def words() -> Tensor:
    return torch.tensor([[1, 2, 2, 0, 0], [3, 3, 3, 3, 3], [0, 0, 0, 0, 0]] * 2)


def pooled(*first: nn.Module) -> nn.Module:
    return nn.Sequential(*first, Mean(), nn.Linear(8, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)), vectors),
    "linear without bias": (lambda: nn.Linear(8, 3, bias=False), vectors),
    "bias only": (bias_only, vectors),
    "frozen encoder": (frozen_encoder, vectors),
    "linear on sequences": (lambda: pooled(nn.Linear(8, 8), nn.Tanh()), sequences),
    "wide linear on sequences": (
        lambda: nn.Sequential(
            nn.Linear(8, 96), nn.Tanh(), nn.Linear(96, 96), Mean(), nn.Linear(96, 3)
        ),
        sequences,
    ),
    "linear on grids": (
        lambda: nn.Sequential(nn.Linear(8, 4), nn.Flatten(), nn.Linear(2 * 8 * 4, 3)),
        images,
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=(1, 2), padding=(1, 2)),
            nn.GELU(),
            nn.Conv2d(4, 4, 3, groups=2, dilation=2, bias=False),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        images,
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(5, 4, 3, padding="same"), nn.Flatten(), nn.Linear(32, 3)),
        sequences,
    ),
    "conv1d padded by name": (
        lambda: nn.Sequential(
            nn.Conv1d(5, 4, 4, padding="same", dilation=2),
            nn.Conv1d(4, 3, 2, padding="valid"),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        sequences,
    ),
    "groupnorm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.LazyLinear(3)
        ),
        images,
    ),
    "instancenorm": (
        lambda: nn.Sequential(nn.InstanceNorm2d(2, affine=True), nn.Flatten(), nn.Linear(128, 3)),
        images,
    ),
    "layernorm": (lambda: pooled(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh()), sequences),
    "layernorm over two": (
        lambda: nn.Sequential(nn.LayerNorm((5, 8), bias=False), nn.Flatten(), nn.Linear(40, 3)),
        sequences,
    ),
    "layernorm without bias": (
        lambda: pooled(nn.Linear(8, 8), nn.LayerNorm(8, bias=False)),
        sequences,
    ),
    "rmsnorm": (lambda: pooled(nn.Linear(8, 8), nn.RMSNorm(8)), sequences),
    "embedding": (lambda: pooled(nn.Embedding(7, 8), nn.Tanh()), words),
    "embedding with padding": (lambda: pooled(nn.Embedding(7, 8, padding_idx=0)), words),
    "attention": (Attention, sequences),
    "opacus attention": (OpacusAttention, sequences),
    "lora": (lora, sequences),
    "layer used thrice": (Recurrent, vectors),
    "idle layers": (PartlyUsed, vectors),
    "constant buffer": (PositionTable, sequences),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    make, make_inputs = MODELS[name]
    model, inputs = make(), make_inputs()
    with torch.no_grad():
        model(inputs)  # lazy layers learn their width
    return model, inputs, torch.arange(ROWS) % 3
