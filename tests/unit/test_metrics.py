"""Figures of merit against brute force, and the histogram a hospital may release."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from common.learning.metrics import (
    accuracy,
    accuracy_from_histogram,
    auc,
    auc_from_histogram,
    mean_interval,
    noise_interval,
    score_histogram,
)


def two(positive: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([1 - positive, positive], axis=1)


def by_pairs(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    """The definition: how often an ill patient scores above a healthy one; a tie is a half."""
    wins = [
        1.0 if ill > well else 0.5 if ill == well else 0.0
        for ill in scores[labels == 1]
        for well in scores[labels == 0]
    ]
    return float(np.mean(wins))


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])),
        min_size=2,
        max_size=30,
    )
)
def test_auc_is_its_definition(pairs: list[tuple[int, float]]) -> None:
    labels = np.array([label for label, _ in pairs])
    scores = np.array([score for _, score in pairs])
    if len(set(labels)) < 2:
        assert math.isnan(auc(labels, two(scores)))
    else:
        assert auc(labels, two(scores)) == pytest.approx(by_pairs(labels, scores))


def test_auc_is_scikit_learns() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 500)
    scores = np.round(generator.normal(size=500) + labels, 1)  # with ties
    assert auc(labels, two(scores)) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert math.isnan(auc(labels, two(np.where(labels == 1, np.nan, scores))))


def test_auc_of_several_classes_is_the_mean_of_one_against_the_rest() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 60)
    probabilities = generator.dirichlet([1, 1, 1], 60)
    each = [by_pairs((labels == one).astype(np.int64), probabilities[:, one]) for one in range(3)]
    assert auc(labels, probabilities) == pytest.approx(np.mean(each))


def test_accuracy() -> None:
    assert accuracy(np.array([0, 1, 1, 0]), two(np.array([0.2, 0.9, 0.4, 0.1]))) == 0.75


def test_a_mean_has_students_interval() -> None:
    """t(.975, 2) = 4.3027 (any table); s of .90, .92, .94 is .02."""
    found = mean_interval([0.90, math.nan, 0.92, 0.94])
    assert (found.mean, found.count) == (pytest.approx(0.92), 3)
    assert found.high - found.mean == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert math.isnan(mean_interval([]).mean)
    assert math.isnan(mean_interval([0.5]).low)


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 3),
            st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5]),
        ),
        min_size=1,
        max_size=25,
    ),
    classes=st.integers(2, 3),
    bins=st.integers(2, 20),
)
def test_a_patient_moves_the_histogram_by_at_most_1(
    rows: list[tuple[int, int, float]], classes: int, bins: int
) -> None:
    labels = np.array([label % classes for label, _, _ in rows])
    owners = np.unique(np.array([owner for _, owner, _ in rows]), return_inverse=True)[1]
    positive = np.array([score for _, _, score in rows])
    probabilities = (
        two(positive)
        if classes == 2
        else np.stack([1 - positive, positive / 2, positive / 2], axis=1)
    )
    each = score_histogram(labels, probabilities, owners, bins)
    assert each.shape == (owners.max() + 1, classes * (bins if classes == 2 else classes))
    np.testing.assert_allclose(each.sum(axis=1), 1.0)
    assert each.min() >= 0
    assert np.linalg.norm(each, axis=1).max() <= 1 + 1e-12


def test_figures_from_a_histogram_approach_the_exact_ones() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 3000)
    scores = 1 / (1 + np.exp(-generator.normal(2.0 * labels - 1, 1.0)))
    histogram = score_histogram(labels, two(scores), np.arange(3000), 20).sum(axis=0).reshape(2, 20)
    assert auc_from_histogram(histogram) == pytest.approx(auc(labels, two(scores)), abs=0.005)
    assert accuracy_from_histogram(histogram) == pytest.approx(accuracy(labels, two(scores)))


def test_accuracy_from_a_table_of_several_classes() -> None:
    table = np.array([[5.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 10.0]])
    assert accuracy_from_histogram(table) == pytest.approx(17 / 20)


def test_noise_alone_has_no_figure_or_one_within_bounds() -> None:
    assert math.isnan(auc_from_histogram(np.array([[-1.0, 0.5], [2.0, 2.0]])))
    assert math.isnan(accuracy_from_histogram(-np.ones((2, 4))))
    extreme = np.array([[9.0, -8.0], [-3.0, 5.0]])
    for figure in (auc_from_histogram, accuracy_from_histogram):
        shown = noise_interval(extreme, 2.0, figure, bounds=(0.0, 1.0))
        assert 0 <= shown.low <= shown.mean <= shown.high <= 1


def test_the_noise_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(2)
    truth = np.array([[40.0, 30, 10, 5], [5.0, 12, 30, 60]])
    exact, covered = auc_from_histogram(truth), 0
    for _ in range(60):
        noised = truth + generator.normal(0, 2.0, truth.shape)
        interval = noise_interval(noised, 2.0, auc_from_histogram, bounds=(0.0, 1.0))
        covered += interval.low <= exact <= interval.high
    assert covered >= 51  # 95 % of 60 is 57; a binomial falls below 51 once in a thousand
