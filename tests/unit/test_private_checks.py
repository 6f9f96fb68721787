"""Models that cannot be trained privately are refused before training, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

from common.errors import PrivacyError
from common.learning.gradients import GhostNorms, PerRecordGradients
from common.models.checks import check_private, check_records_apart
from common.models.networks import image_encoder, image_student, table_encoder
from common.tensors import get_vector


def loss(answers: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(answers, targets, reduction="none")


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def tied_by_storage() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    return model


def frozen_batch_norm() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(4).requires_grad_(False), nn.Linear(4, 2))


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


class MyLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) ** 2


def with_buffer() -> nn.Module:
    layer = nn.Linear(4, 2)
    layer.register_buffer("seen", torch.zeros(4))
    return nn.Sequential(layer)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
        r"layer '1' \(BatchNorm2d\).*use GroupNorm",
    ),
    "frozen batch norm": (frozen_batch_norm, r"layer '0' \(BatchNorm1d\).*use GroupNorm"),
    "sync batch norm": (lambda: nn.Sequential(nn.SyncBatchNorm(4)), "use GroupNorm"),
    "running statistics": (
        lambda: nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True)),
        "track_running_stats=False",
    ),
    "tied weights": (tied, "weights '0.weight' and '2.weight' are tied"),
    "tied by storage": (tied_by_storage, "are tied"),
    "attention with bias records": (
        lambda: DPMultiheadAttention(4, 2, add_bias_kv=True, batch_first=True),
        "without add_bias_kv",
    ),
    "buffer": (with_buffer, r"layer '0' \(Linear\): a trainable layer with buffers"),
    "in place": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
        r"layer '1' \(ReLU\).*inplace=False",
    ),
    "embedding that rescales": (
        lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)),
        "max_norm",
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
        "0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    for refuse in (
        check_private,
        lambda model: PerRecordGradients(model, loss),
        lambda model: GhostNorms(model, loss),
    ):
        with pytest.raises(PrivacyError, match=message) as caught:
            refuse(make())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model",
    [
        table_encoder(8, (16, 8)),
        image_encoder((8, 8), (4, 8, 16)),
        image_student((8, 8), (4, 8), 2),
        DPMultiheadAttention(8, 2, batch_first=True),
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)),
        nn.Sequential(nn.MultiheadAttention(4, 2).requires_grad_(False), nn.Linear(4, 2)),
        nn.Sequential(nn.MultiheadAttention(4, 2), nn.LSTM(4, 4)),
        nn.Sequential(OwnParameter(), MyLinear(4, 2)),
    ],
)
def test_accepted(model: nn.Module) -> None:
    check_private(model)


class Centred(nn.Module):
    """Batch normalisation by hand: no list of layers finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs - inputs.mean(dim=0))


class Remembering(nn.Module):
    """Keeps a running mean of what it sees in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * inputs.detach().mean(dim=0))
        return self.head(inputs)


class Overwriting(nn.Module):
    """Changes a layer's input after the layer has seen it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        shifted = inputs + 1
        answer = self.head(shifted)
        shifted.mul_(2)
        return answer + shifted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Centred, "depends on the other records"),
        (Remembering, "a buffer changed"),
        (Overwriting, "overwritten later"),
    ],
)
def test_what_only_shows_when_run_is_refused_before_any_release(
    make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    with pytest.raises(PrivacyError, match=message):
        PerRecordGradients(model, loss)(
            get_vector(model), torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
        )


def test_the_check_of_records_sees_made_up_values_only() -> None:
    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, inputs: Tensor) -> Tensor:
            self.seen.append(inputs.clone())
            return inputs

    spy, records = Spy(), torch.full((4, 3), 12345.0)
    check_records_apart(spy, records)
    assert all((one.abs() <= 1).all() for one in spy.seen)
    assert spy.training


def test_dropout_draws_for_each_record_by_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    each = PerRecordGradients(model, loss)(
        get_vector(model), torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    )
    assert not torch.allclose(each[0], each[1])
