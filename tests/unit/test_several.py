"""Several outcomes at once: an unknown one teaches nothing and is measured nowhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from common.tasks.several import Several

NAN = math.nan
TASK = Several("several", outputs=3)


def test_the_loss_is_the_mean_over_known_outcomes() -> None:
    answers = torch.tensor([[0.3, -2.0, 1.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]])
    targets = torch.tensor([[1.0, NAN, 0.0], [NAN, 1.0, NAN], [NAN, NAN, NAN]])
    plain = functional.binary_cross_entropy_with_logits
    expected = [
        float(plain(answers[0, [0, 2]], torch.tensor([1.0, 0.0]))),
        float(plain(answers[1, 1], torch.tensor(1.0))),
        0.0,
    ]
    torch.testing.assert_close(TASK.loss(answers, targets), torch.tensor(expected))


def test_an_unknown_outcome_has_no_gradient() -> None:
    answers = torch.zeros(2, 3, requires_grad=True)
    targets = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, NAN]])
    (gradient,) = torch.autograd.grad(TASK.loss(answers, targets).sum(), answers)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1] == 0
    assert (gradient[1] == 0).all()
    assert (gradient[0, [0, 2]] != 0).all()


def test_distilling_asks_for_the_teachers_answers() -> None:
    taught = torch.tensor([[2.0, -1.0, 0.0]])
    answers = taught.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(TASK.distill_loss(answers, taught, 2.0).sum(), answers)
    torch.testing.assert_close(gradient, torch.zeros(1, 3))


def test_the_figure_is_the_mean_of_scikit_learns_over_outcomes_of_both_kinds() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((80, 3)) < 0.4).astype(np.float32)
    scores = np.clip(labels * 0.2 + generator.random((80, 3)) * 0.8, 0, 1)
    labels[generator.random((80, 3)) < 0.3] = np.nan
    labels[:, 2] = np.where(np.isnan(labels[:, 2]), np.nan, 1.0)  # no negatives: no AUC
    each = [
        roc_auc_score(labels[known, k], scores[known, k])
        for k in (0, 1)
        for known in [~np.isnan(labels[:, k])]
    ]
    assert TASK.figures(labels, scores)["auc"] == pytest.approx(np.mean(each))
    assert math.isnan(TASK.figures(labels[:, [2, 2, 2]], scores)["auc"])


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=3, max_size=3),
            st.lists(st.floats(0, 1), min_size=3, max_size=3),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_a_patient_moves_the_release_by_at_most_1(
    rows: list[tuple[list[float], list[float], int]],
) -> None:
    labels, scores = np.array([one[0] for one in rows]), np.array([one[1] for one in rows])
    _, owners = np.unique([one[2] for one in rows], return_inverse=True)
    each = TASK.contributions(labels, scores, owners, 5)
    assert each.shape == (owners.max() + 1, np.prod(TASK.release_shape(5)))
    assert (np.linalg.norm(each, axis=1) <= 1 + 1e-12).all()


def test_what_is_released_shows_the_figure() -> None:
    """Scores in the middle of 20 bins: ties apart, the histogram's AUC is the exact one."""
    generator = np.random.default_rng(2)
    labels = (generator.random((400, 3)) < 0.3).astype(np.float32)
    labels[generator.random((400, 3)) < 0.2] = np.nan
    scores = (generator.integers(0, 20, (400, 3)) + 0.5) / 20
    counts = TASK.contributions(labels, scores, np.arange(400), 20).sum(axis=0)
    released = TASK.released_figures(counts.reshape(TASK.release_shape(20)))
    assert released["auc"] == pytest.approx(TASK.figures(labels, scores)["auc"])
