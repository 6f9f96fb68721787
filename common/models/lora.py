"""Low-rank adaptation: a frozen layer plus a small trainable correction (Hu et al. 2021).

Noise grows with the number of trained parameters; rank ``r`` trains ``r·(in + out)`` of
``in·out``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.errors import StudyError
from common.modelspec import LoraSpec


class LoraLinear(nn.Module):
    """``base(x) + (scale / rank) · up(down(x))``, with ``base`` frozen.

    ``up`` starts at zero, so that the adapted layer starts as the original one (arXiv 2106.09685,
    section 4.1). Both corrections are plain Linear layers, for which per-record gradients exist.
    """

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise StudyError(
                f"LoRA rank: expected 1 to {min(base.in_features, base.out_features)} for a layer "
                f"of {base.in_features} × {base.out_features}, found {rank}"
            )
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.factor = scale / rank
        bound = 1 / math.sqrt(base.in_features)
        nn.init.uniform_(self.down.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Answers of the layer's own shape."""
        correction: Tensor = self.up(self.down(inputs))
        return torch.add(self.base(inputs), correction, alpha=self.factor)

    def merged(self) -> nn.Linear:
        """One plain layer with the same answers, for export."""
        base = self.base
        layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        with torch.no_grad():
            layer.weight.copy_(base.weight + self.factor * self.up.weight @ self.down.weight)
            if base.bias is not None:
                layer.bias.copy_(base.bias)
        return layer


def add_lora(model: nn.Module, spec: LoraSpec, *, seed: int) -> list[str]:
    """Freeze ``model`` and correct every Linear whose last name is in ``spec.layers``; in place.

    Returns the full names of the corrected layers. With ``kind = "ffa"`` only ``up`` learns, and
    ``down`` is public; both are the same for everyone with the same ``seed``. Raises StudyError
    when no layer has such a name, or one of them is of another kind.
    """
    wanted = set(spec.layers)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    named = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in wanted and not isinstance(module, nn.ModuleList)
    ]
    for name, module in named:
        if isinstance(module, nn.Embedding):
            raise StudyError(
                f"lora.layers: {name!r} is an Embedding, whose rows are looked up: which of them a "
                f"correction changes would tell a record's tokens; name Linear layers"
            )
    found = [(name, module) for name, module in named if isinstance(module, nn.Linear)]
    if not found:
        have = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear)
            }
        )
        raise StudyError(
            f"LoRA: expected Linear layers named {', '.join(sorted(wanted))}; "
            f"the model has {', '.join(have) or 'none'}"
        )
    for name, module in found:
        parent, _, last = name.rpartition(".")
        layer = LoraLinear(module, rank=spec.rank, scale=spec.scale, generator=generator)
        layer.down.requires_grad_(spec.kind == "lora")
        setattr(model.get_submodule(parent), last, layer)
    return [name for name, _ in found]


@contextmanager
def uncorrected(model: nn.Module) -> Iterator[None]:
    """Within, the frozen layers learn and the corrections, still zero, do not: pre-training."""
    corrections = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, LoraLinear)
        for part in (layer.down, layer.up)
        for parameter in part.parameters()
    }
    before = [(one, one.requires_grad) for one in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) not in corrections)
    try:
        yield
    finally:
        for parameter, learnt in before:
            parameter.requires_grad_(learnt)
