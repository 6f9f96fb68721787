"""The survival task: its likelihood by hand, in both forms, and what a study may say."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from common.dictionary import Dictionary
from common.tasks import task_named
from common.tasks.prognosis import Prognosis


def dictionary(**changes: Any) -> Dictionary:
    label = {
        "kind": "survival",
        "name": "days",
        "range": [0, 100],
        "event": "died",
        "cuts": [10.0, 20.0, 40.0],
    }
    column = {"name": "age", "kind": "numeric", "range": [0, 100]}
    return Dictionary.model_validate_json(
        json.dumps({"columns": [column], "label": label | changes})
    )


def task(name: str = "prognosis", **changes: Any) -> Prognosis:
    found = task_named(name, dictionary(**changes))
    assert isinstance(found, Prognosis)
    return found


def hazards(one: Prognosis, answers: torch.Tensor) -> np.ndarray:
    survival = one.predictions(answers, answers).numpy()
    return 1 - survival / np.concatenate([np.ones((len(survival), 1)), survival[:, :-1]], axis=1)


@pytest.mark.parametrize("name", ["prognosis", "prognosis-mass"])
def test_loss_is_the_likelihood_of_each_patient(name: str) -> None:
    """−log of the event's probability, or of the survival up to where the patient was seen."""
    one = task(name)
    answers = torch.randn(5, one.outputs, generator=torch.Generator().manual_seed(0))
    labels = np.array([[5, 1], [20, 1], [14, 0], [16, 0], [60, 1]], np.float32)
    found = one.loss(answers, one.targets(labels)).numpy()
    h, s = hazards(one, answers), one.predictions(answers, answers).numpy()
    wanted = [
        -math.log(h[0, 0]),
        -math.log(h[1, 1] * s[1, 0]),  # at a cut: the interval that ends there
        -math.log(s[2, 0]),  # censored before the middle of an interval
        -math.log(s[3, 1]),  # and after it
        -math.log(s[4, 2]),  # an event after the last cut: it was survived
    ]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_mass_form_is_a_softmax_over_when() -> None:
    one = task("prognosis-mass")
    answers = torch.tensor([[0.0, 5.0, 0.0, -5.0]])
    mass = torch.softmax(torch.tensor([1.0, 0.0, -1.0, 0.0]), 0).cumsum(0)[:3]
    assert one.predictions(answers, answers)[0].numpy() == pytest.approx(
        (1 - mass).numpy(), abs=1e-6
    )


@pytest.mark.parametrize("name", ["prognosis", "prognosis-mass"])
def test_answers_of_zero_say_what_is_published(name: str) -> None:
    one = task(name, typical=[0.9, 0.8, 0.5])
    zeros = torch.zeros(1, one.outputs)
    curve = one.predictions(zeros, zeros)[0].numpy()
    assert curve == pytest.approx([0.9, 0.8, 0.5], abs=1e-6)


def test_a_patient_of_time_zero_is_learned_from() -> None:
    one = task()
    known, event = one.targets(np.array([[0, 1], [0, 0]], np.float32)).unbind(1)
    assert known.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert event.tolist() == [[1, 0, 0], [0, 0, 0]]


def test_each_loss_depends_on_its_own_record_alone() -> None:
    one = task()
    labels = np.array([[5, 1], [25, 0]], np.float32)
    answers = torch.randn(2, one.outputs, requires_grad=True)
    one.loss(answers, one.targets(labels))[0].backward()
    assert answers.grad is not None
    assert answers.grad[1].abs().sum() == 0 and answers.grad[0].abs().sum() > 0


def test_a_student_that_answers_alike_has_nothing_to_learn() -> None:
    one = task()
    taught = torch.randn(3, one.outputs)
    answers = taught.clone().requires_grad_()
    one.distill_loss(answers, taught, 2.0).sum().backward()
    assert answers.grad is not None and answers.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"typical": [0.9, 0.8]}, "expected 3 shares"),
        ({"typical": [0.9, 0.95, 0.5]}, "fall from below 1"),
        ({"cuts": [10.0, 5.0]}, "cuts must ascend"),
    ],
)
def test_impossible_labels_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dictionary(**changes)


def test_figures_of_a_perfect_order() -> None:
    one = task()
    labels = np.array([[5, 1], [15, 1], [30, 1], [90, 0]], np.float32)
    survival = np.array([[0.1, 0.1, 0.1], [0.9, 0.2, 0.1], [0.9, 0.9, 0.2], [0.9, 0.9, 0.9]])
    figures = one.figures(labels, survival)
    assert figures["cindex"] == figures["uno"] == 1.0
    assert set(figures) == {measure.key for measure in one.measures}
    assert figures["calibration"] == pytest.approx((0.1 + 0.1 + 0.2 + 0.9) / 4 - 0.25, abs=1e-9)
    assert one.figures(labels, survival[::-1])["cindex"] == 0.0
