"""Every kind of model that can be trained privately, and some records for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

from common.models.causal import CausalEncoder
from common.models.lora import add_lora
from common.models.networks import SharedHead
from common.models.vision import VisionTransformer
from common.modelspec import LoraSpec
from common.privacy.plan import StepPlan
from common.privacy.units import PrivacyUnit, Relation

ROWS = 6


def loss(answers: Tensor, targets: Tensor) -> Tensor:
    if answers.dim() == 3:  # an answer at each position
        targets = targets[:, None].expand(answers.shape[:2])
        return nn.functional.cross_entropy(answers.mT, targets, reduction="none").mean(dim=1)
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


class OwnWeights(nn.Module):
    """Weights of its own outside any layer, twice used, between layers that have a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.gate = Gate()
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.gate(torch.tanh(self.gate(self.mix(inputs)))))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 8))
        self.turn = nn.Parameter(torch.randn(8, 8) / 3)
        self.inner = nn.Linear(8, 8)
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        gate = torch.sigmoid(inputs * self.shift + self.frozen)
        return gate * (inputs @ self.turn) + (1 - gate) * self.inner(inputs)


class TorchAttention(nn.Module):
    """PyTorch's own, which answers a pair, and which has a mask of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        missing = inputs[:, :, 0] > 1
        code, _ = self.attention(inputs, inputs, inputs, key_padding_mask=missing)
        return self.head(code.mean(dim=1))


class ClassToken(nn.Module):
    """A parameter at the top: the whole model has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = Attention()

    def forward(self, inputs: Tensor) -> Tensor:
        token = self.token.expand(len(inputs), -1, -1)
        return self.attention(torch.cat([token, inputs], dim=1))


class TorchRecurrent(nn.Module):
    """PyTorch's own recurrent layers; a state has its records in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(8, 6, batch_first=True)
        self.second = nn.GRU(6, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        code, _ = self.first(inputs)
        _, state = self.second(code)
        return self.head(torch.cat([state[0], state[1]], dim=1))


class Pairs(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs[:, :4], inputs[:, 4:])


def lora() -> nn.Module:
    model = Attention()
    add_lora(model, LoraSpec(kind="lora", rank=2), seed=0)
    nn.init.normal_(model.query.up.weight)  # type: ignore[union-attr, arg-type]
    nn.init.normal_(model.value.up.weight)  # type: ignore[union-attr, arg-type]
    return model


def causal() -> nn.Module:
    encoder = CausalEncoder(vocabulary=7, length=5, width=8, layers=2, heads=2)
    return nn.Sequential(encoder, nn.Linear(8, 7, bias=False))


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
    "shared head": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), SharedHead(nn.Linear(6, 2), 1)),
        vectors,
    ),
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
    "causal transformer": (causal, lambda: words().clamp(min=torch.tensor([1, 0, 0, 0, 0]))),
    "vision transformer": (
        lambda: nn.Sequential(
            VisionTransformer((6, 8), patch=4, width=8, depth=2, heads=2), nn.Linear(8, 3)
        ),
        lambda: torch.randn(ROWS, 1, 6, 8),
    ),
    "layer used thrice": (Recurrent, vectors),
    "idle layers": (PartlyUsed, vectors),
    "constant buffer": (PositionTable, sequences),
    "own weights": (OwnWeights, vectors),
    "torch attention": (TorchAttention, sequences),
    "class token": (ClassToken, sequences),
    "torch recurrent": (TorchRecurrent, sequences),
    "bilinear": (lambda: Pairs(nn.Bilinear(4, 4, 3)), vectors),
    "reflected padding": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(256, 3)
        ),
        images,
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    make, make_inputs = MODELS[name]
    model, inputs = make(), make_inputs()
    with torch.no_grad():
        model(inputs)  # lazy layers learn their width
    return model, inputs, torch.arange(ROWS) % 3


def a_plan(clip_norm: float = 1.0, **changes: object) -> StepPlan:
    """A step on all of every patient's records, with noise of the clip norm's size."""
    settings: dict[str, object] = {
        "unit": PrivacyUnit.PATIENT,
        "relation": Relation.ADD_REMOVE,
        "sampling_rate": 1.0,
        "clip_norm": clip_norm,
        "noise_multiplier": 1.0,
        "records_per_unit": 8,
    }
    return StepPlan(**(settings | changes))  # type: ignore[arg-type]
