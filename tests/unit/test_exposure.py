"""Secrets that a model learned by heart, and that it does not learn under differential privacy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from common.randomness import SeededNoise
from common.tasks.language import Language
from common.text import Bytes
from simulations.bench.exposure import measured
from simulations.exposure import Canary, exposures

LENGTH, VOCABULARY = 24, 258
TASK = Language("language", VOCABULARY, "byte")
CANARY = Canary()
BITS = math.log2(CANARY.secrets)


class Told(nn.Module):
    """A model that knows one sentence and nothing else."""

    def __init__(self, text: str | None) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        answers = torch.zeros(*tokens.shape, VOCABULARY)
        if self.text is not None:
            known = torch.from_numpy(Bytes().encode([self.text], LENGTH)[0].astype(np.int64))
            answers[:, torch.arange(LENGTH), known] = 5.0
        return answers


def exposed(model: nn.Module, secrets: list[int]) -> list[float]:
    return exposures(model, TASK, Bytes(), CANARY, secrets, length=LENGTH).tolist()


def test_a_secret_that_is_known_is_first_of_all() -> None:
    assert exposed(Told(CANARY.text(321)), [321])[0] == pytest.approx(BITS)
    # Those that share two of its digits come next, all alike: places 2 to 28.
    assert exposed(Told(CANARY.text(321)), [320])[0] == pytest.approx(BITS - math.log2(15))


def test_a_model_that_knows_nothing_exposes_nothing() -> None:
    middle = (CANARY.secrets + 1) / 2
    assert exposed(Told(None), [0, 999]) == pytest.approx([BITS - math.log2(middle)] * 2)


@pytest.fixture(scope="module")
def free() -> dict[str, float]:
    return measured(None, 0, noise=SeededNoise(0, "hospital"))


def test_without_privacy_canaries_are_learned_by_heart(free: dict[str, float]) -> None:
    assert free["{}_exposure"] > 6.5
    assert free["{}_exposure_unknown"] < 3


def test_with_privacy_they_are_like_those_of_nobody(free: dict[str, float]) -> None:
    """ε = 8, in as many steps; and the model has learned what the other patients say."""
    found = measured(8.0, 0, noise=SeededNoise(0, "hospital"))
    assert found["{}_exposure"] < 4
    assert found["{}_exposure_unknown"] < 3
    assert found["{}_bits"] < free["{}_bits"] + 0.5
