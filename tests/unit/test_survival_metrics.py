"""Measures of survival curves, against scikit-survival 0.28.0 and worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.learning.survival_metrics import (
    brier,
    calibration,
    concordance,
    concordance_from_histogram,
    integrated_brier,
    kaplan_meier,
    lost_share,
    risk_histogram,
)

WHEN = np.array([1.0, 2, 4, 6])


def forty_patients() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times, whether seen, risks and survival curves: 19 events, no ties of times."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=40)
    event = rng.exponential(np.exp(-x) * 5) + 0.1
    censored = rng.uniform(1, 12, 40)
    risk = np.round(x + rng.normal(size=40), 1)
    survival = np.exp(-WHEN[None] * np.exp(risk[:, None]) / 6)
    return np.minimum(event, censored), event <= censored, risk, survival


def test_measures_are_those_of_scikit_survival() -> None:
    """concordance_index_censored, concordance_index_ipcw(tau=6), brier_score and
    integrated_brier_score of scikit-survival 0.28.0 on the same patients."""
    times, seen, risk, survival = forty_patients()
    assert concordance(times, seen, risk) == pytest.approx(0.710989010989011)
    assert concordance(times, seen, risk, until=6, weighted=True) == pytest.approx(
        0.7092073476764175
    )
    assert brier(times, seen, survival, WHEN) == pytest.approx(
        [0.09733952931280838, 0.14919219338878417, 0.22031472404679872, 0.20346275947563525]
    )
    assert integrated_brier(times, seen, survival, WHEN) == pytest.approx(0.1833100524617622)


def test_kaplan_meier_and_its_interval_are_those_of_scikit_survival() -> None:
    """kaplan_meier_estimator(conf_type="log-log") of scikit-survival 0.28.0, at 2 and 6."""
    times, seen, _, _ = forty_patients()
    curve = kaplan_meier(times, seen)
    assert curve.at(np.array([2.0, 6])) == pytest.approx([0.7321247464503043, 0.42908410048369483])
    low, high = curve.interval(np.array([2.0, 6]))
    assert low == pytest.approx([0.5575226169997368, 0.2448509283317703], abs=1e-4)
    assert high == pytest.approx([0.8467040168125675, 0.6012363522008752], abs=1e-4)


def test_kaplan_meier_of_freireichs_treated_patients() -> None:
    """6-mercaptopurine against leukaemia: the published table (Kaplan & Meier in Cox & Oakes 1984,
    table 4.2): .857, .807, .753, .690, .627, .538, .448."""
    times = np.array(
        [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35.0]
    )
    seen = np.array([1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], bool)
    curve = kaplan_meier(times, seen)
    found = curve.at(np.array([6.0, 7, 10, 13, 16, 22, 23]))
    assert found == pytest.approx([0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448], abs=5e-4)


def test_what_cannot_be_measured_is_no_number() -> None:
    times, never = np.array([1.0, 2, 3]), np.zeros(3, bool)
    survival = np.full((3, 4), 0.5)
    assert math.isnan(concordance(times, never, np.arange(3.0)))
    assert math.isnan(calibration(times, never, survival[:, 0], 6.0))
    assert math.isnan(integrated_brier(times[:1], never[:1], survival[:1], WHEN))


def test_calibration_is_the_distance_to_kaplan_and_meier() -> None:
    times, seen = np.array([1.0, 2, 7, 8]), np.array([True, True, False, False])
    assert calibration(times, seen, np.array([0.6, 0.7, 0.7, 0.8]), 6.0) == pytest.approx(0.2)


def test_lost_time_is_the_area_above_the_curve() -> None:
    assert lost_share(np.array([[0.5, 0.0]]), np.array([1.0, 2])) == pytest.approx([0.5])
    assert lost_share(np.ones((1, 4)), WHEN) == pytest.approx([0.0])


def test_a_patient_moves_the_released_histogram_by_no_more_than_one() -> None:
    """Whatever the records: many of one patient, implausible times, curves at their ends."""
    rng = np.random.default_rng(0)
    labels = np.stack([rng.uniform(0, 20, 200), rng.integers(2, size=200)], axis=1)
    survival = np.sort(rng.uniform(size=(200, 4)), axis=1)[:, ::-1]
    survival[:2] = [[0.0] * 4, [1.0] * 4]
    owners = np.concatenate([np.arange(30), rng.integers(30, size=170)])
    each = risk_histogram(labels, survival, owners, WHEN, 10)
    assert each.shape == (30, 9 * 10)
    assert (np.linalg.norm(each, axis=1) <= 1 + 1e-12).all()
    assert each.sum(axis=1) == pytest.approx(np.ones(30))


def test_the_released_concordance_is_near_the_exact_one() -> None:
    """Large enough a sample, fine enough bins: only pairs within an interval are lost."""
    rng = np.random.default_rng(1)
    risk = rng.normal(size=4000)
    event, censored = rng.exponential(np.exp(-risk) * 5), rng.uniform(1, 12, 4000)
    times, seen = np.minimum(event, censored), event <= censored
    fine = np.linspace(0.25, 6, 24)
    survival = np.exp(-fine[None] * np.exp(risk[:, None]) / 5)
    labels = np.stack([times, seen], axis=1)
    counts = risk_histogram(labels, survival, np.arange(4000), fine, 50).sum(axis=0)
    exact = concordance(times, seen, risk, until=6)
    assert concordance_from_histogram(counts.reshape(49, 50)) == pytest.approx(exact, abs=0.01)


def test_the_released_concordance_of_four_patients() -> None:
    """Two intervals, three bins. Events in interval 1 (bins 2 and 0), one in interval 2 (bin 1),
    one who passed both (bin 0): pairs 1-3, 1-4 won, 2-3 lost, 2-4 tied, 3-4 won: 3.5 of 5."""
    counts = np.zeros((5, 3))
    counts[0, 2] = counts[0, 0] = counts[1, 1] = counts[4, 0] = 1
    assert concordance_from_histogram(counts) == pytest.approx(3.5 / 5)
