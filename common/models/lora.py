"""Low-rank adaptation: a frozen layer plus a small trainable correction (Hu et al. 2021).

Noise grows with the number of trained parameters; rank ``r`` trains ``r·(in + out)`` of
``in·out``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.errors import StudyError


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


def add_lora(
    model: nn.Module, names: Iterable[str], *, rank: int, scale: float = 16.0, seed: int
) -> list[str]:
    """Freeze ``model`` and adapt every Linear whose last name is in ``names``; in place.

    Returns the full names of the adapted layers; the corrections are the same for everyone with
    the same ``seed``. Raises StudyError when no layer has such a name.
    """
    wanted = set(names)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    ]
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
        setattr(
            model.get_submodule(parent),
            last,
            LoraLinear(module, rank=rank, scale=scale, generator=generator),
        )
    return [name for name, _ in found]
