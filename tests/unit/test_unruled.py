"""Layers without a gradient rule: each record by weights of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from common.errors import PrivacyError
from common.learning import capture, layers, unruled
from common.learning.gradients import GhostNorms, PerRecordGradients, clipped_sum
from common.models import checks
from common.models.checks import check_records_apart, learners
from common.tensors import get_vector
from tests.unit.zoo import MODELS, ROWS, a_plan, build, loss

WITH_RULES = [name for name in MODELS if not learners(build(name)[0])[1]]


plan = partial(a_plan, clip_norm=0.3)


@pytest.mark.parametrize("name", WITH_RULES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_without_a_rule_the_sums_are_those_of_the_rule(
    name: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, targets = build(name)
    owners = torch.tensor([0, 0, 0, 1, 3, 3]) if several else torch.arange(ROWS)
    units = 4 if several else ROWS

    def total() -> Tensor:
        made = GhostNorms(model, loss)
        return clipped_sum(made, get_vector(model), inputs, targets, owners, units, plan())

    expected = total()
    for module in (checks, layers):
        monkeypatch.setattr(module, "has_rule", lambda _: False)
    assert not learners(model)[0]
    torch.testing.assert_close(total(), expected, rtol=1e-4, atol=1e-5)


class Own(nn.Module):
    """``answer`` of the inputs times a weight of its own."""

    def __init__(self, answer: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("seen", torch.zeros(4))
        self.answer = answer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(self, inputs * self.weight)


def remember(layer: nn.Module, inputs: Tensor) -> Tensor:
    layer.seen.add_(inputs.detach().mean(dim=0))  # type: ignore[operator, union-attr]
    return inputs


def replace(layer: nn.Module, inputs: Tensor) -> Tensor:
    layer.seen = inputs.detach().mean(dim=0)
    return inputs


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _, inputs: inputs - inputs.mean(dim=0), "depends on the other records"),
        (
            lambda layer, inputs: inputs - inputs.mean(dim=0) if layer.training else inputs,
            "depends on the other records",
        ),
        (
            lambda layer, inputs: nn.functional.batch_norm(
                inputs, layer.seen, layer.seen + 1, training=layer.training, momentum=0.0
            ),
            "depends on the other records|expected more than 1 value",
        ),
        (remember, "a buffer changed"),
        (replace, "a buffer changed"),
    ],
    ids=["mixes", "mixes in training", "batch norm in training", "remembers", "replaces a buffer"],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_mixes_or_remembers_is_refused(
    answer: Callable[[nn.Module, Tensor], Tensor], message: str, rows: int
) -> None:
    model = nn.Sequential(Own(answer), nn.Linear(4, 2))
    targets = torch.zeros(rows, dtype=torch.int64)
    with pytest.raises((PrivacyError, ValueError), match=f"(?i){message}"):
        PerRecordGradients(model, loss)(get_vector(model), torch.randn(rows, 4), targets)


def test_a_frozen_encoder_is_asked_in_the_mode_that_it_answers_in() -> None:
    model = Own(lambda layer, inputs: inputs - inputs.mean(dim=0) if layer.training else inputs)
    like = torch.ones(2, 4)
    check_records_apart(model.eval(), like, learning=False)
    with pytest.raises(PrivacyError, match="depends on the other records"):
        check_records_apart(model, like)
    assert not model.training


def test_dropout_is_not_taken_for_mixing_and_draws_for_each_record_by_itself() -> None:
    drop = nn.functional.dropout
    model = Own(lambda layer, inputs: drop(inputs.repeat(1, 16), 0.5, layer.training)[:, :32])
    each = PerRecordGradients(model, loss)(
        get_vector(model), torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    )
    assert not torch.allclose(each[0], each[1])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_records_must_come_first_in_all_that_such_a_layer_is_given(rows: int) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, inputs: Tensor) -> Tensor:
            mask = torch.zeros(inputs.shape[1], inputs.shape[1])
            code, _ = self.attention(inputs, inputs, inputs, attn_mask=mask)
            return code[:, 0]

    model, targets = Masked(), torch.zeros(rows, dtype=torch.int64)
    with pytest.raises(PrivacyError, match="keep records first"):
        PerRecordGradients(model, loss)(get_vector(model), torch.randn(rows, 3, 4), targets)


def test_what_vmap_cannot_do_is_done_record_by_record_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def by_value(_: nn.Module, inputs: Tensor) -> Tensor:
        return inputs * 2 if inputs.detach()[0, 0] > 0 else inputs  # vmap knows no such branch

    monkeypatch.setattr(unruled, "_BY_RECORD", set())
    capture._say_once.cache_clear()
    model, inputs = Own(by_value), torch.tensor([[1.0, 2, 3, 4], [-1.0, 2, 3, 4]])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            each = PerRecordGradients(model, lambda answers, _: answers.sum(dim=1))
            monkeypatch.setattr(each.capture, "check", lambda _: None)  # a batch has one branch
            found = each(get_vector(model), inputs, torch.zeros(2))
    torch.testing.assert_close(found, inputs * torch.tensor([[2.0], [1.0]]))
    said = [one.message for one in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("Own: no gradient rule")
    assert said[1].startswith("Own: torch.func.vmap cannot take its records together")
