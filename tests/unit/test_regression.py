"""A number as outcome: learned, measured, and released within one patient's bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_squared_error, r2_score

from common.dictionary import Dictionary
from common.study import Study, parse_study
from common.tasks import task_named
from common.tasks.regression import Regression
from server.store import RunFolder
from simulations.simulate import simulate
from simulations.summary import summarise

TASK = Regression("regression", range=(0.0, 100.0), middle=40.0, spread=10.0)


def test_targets_and_predictions_are_inverse_and_within_the_range() -> None:
    labels = np.array([[40.0], [55.0]], dtype=np.float32)
    targets = TASK.targets(labels)
    assert targets.tolist() == [[0.0], [1.5]]
    torch.testing.assert_close(TASK.predictions(targets, targets), torch.from_numpy(labels))
    assert TASK.predictions(torch.tensor([[-50.0], [50.0]]), targets).tolist() == [[0.0], [100.0]]


def test_the_loss_is_per_record_half_the_squared_error() -> None:
    answers = torch.tensor([[1.0], [0.0]])
    assert TASK.loss(answers, torch.tensor([[3.0], [0.0]])).tolist() == [2.0, 0.0]
    assert TASK.distill_loss(answers, torch.tensor([[3.0], [0.0]]), 2.0).tolist() == [2.0, 0.0]


def test_figures_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    true = generator.uniform(0, 100, (60, 1)).astype(np.float32)
    guessed = true.astype(np.float64) + generator.normal(0, 9, (60, 1))
    found = TASK.figures(true, guessed)
    assert found["rmse"] == pytest.approx(mean_squared_error(true, guessed) ** 0.5)
    assert found["r2"] == pytest.approx(r2_score(true, guessed))
    assert np.isnan(TASK.figures(true[:1], guessed[:1])["r2"])


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(-1e6, 1e6), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_a_patient_moves_the_release_by_at_most_1(rows: list[tuple[float, float, int]]) -> None:
    labels = np.array([[one[0]] for one in rows], dtype=np.float32)
    _, owners = np.unique([one[2] for one in rows], return_inverse=True)
    each = TASK.contributions(labels, np.array([[one[1]] for one in rows]), owners, 20)
    assert each.shape == (owners.max() + 1, 4)
    assert (np.linalg.norm(each, axis=1) <= 1 + 1e-12).all()


def test_what_is_released_shows_the_figures() -> None:
    """Without noise, and no error above two spreads, exactly."""
    generator = np.random.default_rng(1)
    true = generator.uniform(0, 100, (300, 1)).astype(np.float32)
    guessed = true.astype(np.float64) + generator.uniform(-15, 15, (300, 1))
    each = TASK.contributions(true, guessed, np.arange(300), 20)
    released = TASK.released_figures(each.sum(axis=0).reshape(TASK.release_shape(20)))
    exact = TASK.figures(true, guessed)
    assert released["rmse"] == pytest.approx(exact["rmse"], rel=1e-6)
    assert released["r2"] == pytest.approx(exact["r2"], rel=1e-6)
    nothing = TASK.released_figures(np.array([[-3.0, 1.0, 0.0, 0.0]]))
    assert all(np.isnan(one) for one in nothing.values())


COLUMNS = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


@pytest.fixture
def progression(tmp_path: Path, tree: dict[str, Any]) -> Study:
    """Diabetes of Efron et al. 2004: 442 patients, how far the disease came in a year."""
    found = load_diabetes(as_frame=True, scaled=False).frame
    found.to_csv(tmp_path / "diabetes.csv", index=False)
    ranges = found[list(COLUMNS)].agg(["min", "max"])  # public data
    tree |= {
        "task": "regression",
        "simulation": {
            "hospitals": 3,
            "source": {"kind": "csv", "path": "diabetes.csv"},
        },
        "finetune": {"rounds": 60, "optimiser": {"kind": "sgd", "learning_rate": 0.1}},
        "distill": {
            "steps": 300,
            "temperature": 1.0,
            "optimiser": {"kind": "adam", "learning_rate": 1e-2},
        },
        "privacy": {"trust": "none"},
    }
    tree["dictionary"] = {
        "label": {"kind": "number", "name": "target", "range": [25, 350], "typical": [152, 77]},
        "columns": [
            {"name": one, "kind": "numeric", "range": ranges[one].tolist(), "optional": False}
            for one in COLUMNS
        ],
    }
    return parse_study(tree, origin="test")


def test_a_number_is_learned_from_a_table(progression: Study, tmp_path: Path) -> None:
    """As well as least squares on the same inputs, within what 110 test patients tell."""
    run = simulate(progression, tmp_path / "run", tmp_path, lambda _: None, noise_seed=0)
    found = summarise(RunFolder(run.path))["all"]["teacher"]
    frame = load_diabetes(as_frame=True, scaled=False).frame
    fitted = LinearRegression().fit(frame[list(COLUMNS)], frame["target"])
    best = mean_squared_error(frame["target"], fitted.predict(frame[list(COLUMNS)])) ** 0.5
    assert best - 4 < found["rmse"] < best + 8  # least squares: 53.5; guessing the mean: 77
    assert found["r2"] > 0.3


def test_a_released_evaluation_of_numbers_leaves_with_noise(
    progression: Study, tmp_path: Path
) -> None:
    study = progression.revised(
        privacy={"trust": "local", "epsilon": 8.0, "delta": 1e-3}, evaluation__epsilon=50.0
    )
    run = simulate(study, tmp_path / "run", tmp_path, lambda _: None, noise_seed=0)
    released = RunFolder(run.path).read_json("result.json")["evaluation"]
    assert len(released) == 3
    assert all(np.array(one["counts"]).shape == (1, 4) for one in released)


def test_a_task_of_numbers_wants_a_number() -> None:
    dictionary = Dictionary.model_validate_json(
        """{"label": {"name": "y", "classes": [[0], [1]]},
            "columns": [{"name": "x", "kind": "numeric", "range": [0, 1]}]}"""
    )
    with pytest.raises(ValueError, match=r"expected dictionary.label.kind number, found classes"):
        task_named("regression", dictionary)
