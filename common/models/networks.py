"""Small networks without BatchNorm: normalising over a batch mixes patients, so that no
per-patient gradient exists. GroupNorm normalises each record by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from common.models.pretrained import PinnedEncoder


class Teacher(nn.Module):
    """An encoder, pre-trained on public data, and a linear head for the study's question.

    ``skip`` > 0: the head also sees the first ``skip`` raw inputs ("wide and deep", Cheng et al.
    2016): under strong noise the linear part learns first. ``bias``: the head has one. ``shared``:
    so many numbers follow each answer that are everybody's (``SharedHead``).
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        width: int,
        skip: int,
        outputs: int,
        bias: bool = True,
        shared: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = width
        self.skip = skip
        linear = nn.Linear(width + skip, outputs, bias=bias)
        self.head = SharedHead(linear, shared) if shared else linear

    def forward(self, inputs: Tensor) -> Tensor:
        """Answers [rows, outputs + shared]."""
        return self.head(self.represent(inputs))  # type: ignore[no-any-return]

    def represent(self, inputs: Tensor) -> Tensor:
        """What the head sees of each record: [rows, width + skip]."""
        answers = self.encoder.recall if isinstance(self.encoder, PinnedEncoder) else self.encoder
        code: Tensor = answers(inputs)
        return torch.cat([code, inputs[:, : self.skip]], dim=1) if self.skip else code


class SharedHead(nn.Module):
    """A linear head and, behind each of its answers, ``shared`` numbers that no input changes.

    They are the weights of a layer that sees a 1 of every record, so that a record's gradient of
    them is one of a Linear layer like others.
    """

    def __init__(self, linear: nn.Linear, shared: int) -> None:
        super().__init__()
        self.linear = linear
        self.shared = nn.Linear(1, shared, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        """[rows, width] → [rows, outputs + shared]."""
        ones = codes.new_ones(len(codes), 1)
        return torch.cat([self.linear(codes), self.shared(ones)], dim=1)


class Student(nn.Module):
    """One plain network, small enough to run and explain anywhere."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Answers [rows, outputs]."""
        return self.network(inputs)  # type: ignore[no-any-return]


class First(nn.Module):
    """Only the first ``count`` inputs of each record."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, width] → [rows, count]."""
        return inputs[:, : self.count]


def table_encoder(width: int, hidden: tuple[int, ...]) -> nn.Sequential:
    """Linear and GELU layers: [rows, width] → [rows, hidden[-1]].

    The last layer is followed by tanh: a bounded code bounds a head's gradient.
    """
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [
            nn.Linear(width, size),
            nn.GELU() if len(layers) < 2 * len(hidden) - 2 else nn.Tanh(),
        ]
        width = size
    return nn.Sequential(*layers)


def _stages(channels: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    incoming = 1
    for outgoing in channels:
        layers += [
            nn.Conv2d(incoming, outgoing, kernel_size=3, stride=2, padding=1),
            nn.GroupNorm(math.gcd(4, outgoing), outgoing),
            nn.GELU(),
        ]
        incoming = outgoing
    return layers


def image_encoder(shape: tuple[int, int], hidden: tuple[int, ...]) -> nn.Sequential:
    """Strided convolutions, then a code: [rows, 1, h, w] → [rows, hidden[-1]].

    ``hidden`` lists the channels of each halving stage and, last, the width of the code.
    """
    *channels, code = hidden
    cells = _cells(shape, len(channels)) * (channels[-1] if channels else 1)
    return nn.Sequential(*_stages(tuple(channels)), nn.Flatten(), nn.Linear(cells, code), nn.Tanh())


def image_student(shape: tuple[int, int], hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """A few strided convolutions and one linear layer."""
    cells = _cells(shape, len(hidden)) * hidden[-1]
    return nn.Sequential(*_stages(hidden), nn.Flatten(), nn.Linear(cells, outputs))


def _cells(shape: tuple[int, int], halvings: int) -> int:
    height, width = shape
    for _ in range(halvings):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height * width
