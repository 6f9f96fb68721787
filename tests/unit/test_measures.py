"""A task whose only figure is better the lower, and has no end, reads right everywhere."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from common import tasks
from common.learning.metrics import Interval, mean_interval, noise_interval
from common.study import Study, load_study
from common.tasks import Measure
from common.tasks.classification import Classification
from server.store import RunFolder
from simulations.combinations import Setting
from simulations.comparison import SeedFigures, over_seeds, paired, shown, worst_first
from simulations.display import closing_lines, run_table
from simulations.drawing import canvas, frame
from simulations.evaluation import Scores
from simulations.measures import cut, existing, in_words, number
from simulations.plots import _range, epsilon_plot, hospital_plot, round_plot
from simulations.report import _verdict
from simulations.selection import _score
from simulations.summary import released
from simulations.sweep import Sweep, results_csv
from simulations.sweep_plots import rounds_plot, setting_plot, traffic_plot
from simulations.sweep_report import _headline
from simulations.sweep_tables import sweep_rows
from simulations.tables import arm_rows, difference_rows, hospital_rows, render_table
from tests.unit.made_up import DOSE, ERROR, EXAMPLES, NASTY, a_comparison, a_point
from tests.unit.test_plots_report import Page, written

AUC = Classification("diagnosis", 2).measures[0]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setitem(tasks.TASKS, "dose", DOSE)
    return load_study(EXAMPLES / "wisconsin.toml").revised(task="dose")


def seed(together: float, **hospitals: float) -> SeedFigures:
    return SeedFigures(
        together={"error": together},
        hospitals={name: {"error": value} for name, value in hospitals.items()},
    )


def test_scores_are_what_the_task_says_of_labels_of_any_shape(study: Study) -> None:
    labels, predictions = np.array([0, 1]), np.array([[0.75, 0.25], [0.5, 0.5]])
    assert Scores(study, "a", labels, predictions).figures == {"error": 375.0}


def test_the_worst_hospital_is_the_highest() -> None:
    seeds = [seed(3.0, a=2.0, b=9.0, c=math.nan), seed(3.0, a=2.0, b=7.0, c=math.nan)]
    figures = over_seeds(seeds, [ERROR])
    assert (figures.worst["error"].hospital, figures.worst["error"].value.mean) == ("b", 8.0)
    assert worst_first(figures, ERROR) == ["b", "a", "c"]
    assert figures.mean_of_hospitals["error"].mean == 5.0
    assert over_seeds([seed(1.0, c=math.nan)], [ERROR]).worst["error"].hospital is None


def test_a_difference_stays_the_first_minus_the_second() -> None:
    found = paired(
        "federated", "alone", {"federated": [seed(2.0, a=1.0)], "alone": [seed(5.0, a=5.0)]}
    )
    assert found.together["error"].mean == -3.0
    assert found.hospitals["a"]["error"].mean == -4.0


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        ((-0.3, -0.1), "training together improves it: −0.200 (−0.300 to −0.100)"),
        ((0.1, 0.3), "training together worsens it: +0.200 (+0.100 to +0.300)"),
        ((-0.1, 0.3), "the difference of +0.100 (−0.100 to +0.300) is not distinguishable"),
    ],
)
def test_a_verdict_knows_which_way_is_better(gap: tuple[float, float], words: str) -> None:
    low, high = gap
    found = Interval((low + high) / 2, low, high, 3)
    assert _verdict(found, ERROR).startswith(words)
    other = _verdict(found, AUC)
    assert ("adds" in other, "costs" in other) == (low > 0, high < 0)


def test_large_figures_have_fewer_decimals_and_share_them_with_their_interval() -> None:
    assert shown(mean_interval([1500.0, 1523.4]), seeds=2) == "1511.7 ±148.7"
    assert shown(mean_interval([42.0]), seeds=1) == "42.00"
    assert number(0.02, beside=30.0) == "0.02"
    assert number(math.nan) == "—"


def test_intervals_are_cut_to_what_the_measure_can_be() -> None:
    wide = Interval(0.5, -0.5, 1.5, 3)
    assert cut(wide, AUC) == (0.0, 1.0)
    assert cut(wide, ERROR) == (-0.5, 1.5)
    assert in_words(wide, ERROR) == "0.500 (95 % interval −0.500 to 1.500)"
    half_open = Measure("mae", "MAE", higher_is_better=False, bounds=(0.0, None))
    assert cut(wide, half_open) == (0.0, 1.5)


def test_the_first_measure_that_exists_speaks() -> None:
    none, some = mean_interval([]), mean_interval([0.5])
    assert existing([AUC, ERROR], {"auc": none, "error": some}) is ERROR
    assert existing([AUC, ERROR], {"auc": none, "error": none}) is AUC


def test_noise_is_held_within_the_bounds_and_no_others() -> None:
    counts = np.array([[5.0]])

    def figure(found: Any) -> float:
        return float(found.sum())

    free = noise_interval(counts, 4.0, figure, bounds=(None, None))
    assert free.low < 0 and free.mean == 5.0 and free.high > 10
    shut = noise_interval(counts, 4.0, figure, bounds=(0.0, 1.0))
    assert (shut.low, shut.mean, shut.high) == (0.0, 1.0, 1.0)


def test_a_summary_releases_what_the_task_reads_from_the_sum(study: Study) -> None:
    each = [{"counts": [[1.0, 2.0]], "noise_std": 0.0}, {"counts": [[3.0, 5.0]], "noise_std": 0.0}]
    assert released(each, study) == {"error": [11.0, 11.0, 11.0]}
    assert released([], study) is None


def test_tables_name_the_measure_its_direction_and_the_worst_first(study: Study) -> None:
    comparison = a_comparison(Path(), study=study)
    assert arm_rows(comparison).headings[2:] == ("dose error", "worst hospital, dose error")
    rows = hospital_rows(comparison, ERROR)
    assert rows.title.endswith("worst first; below 0 is a gain in dose error")
    assert rows.headings[-1] == "federated − alone"
    errors = [float(row[2].split()[0]) for row in rows.rows[:2]]
    assert errors == sorted(errors, reverse=True)
    assert rows.rows[2][0] == "tiny"
    assert all(row[-1].startswith("−") for row in rows.rows[:2])  # federated has the lower error
    assert "below 0 is a gain" in difference_rows(comparison).title
    console = Console(width=110, file=io.StringIO())
    console.print(render_table(comparison))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Lower is better for dose error." in text
    assert "AUC" not in text and "accuracy" not in text


def test_a_usual_table_says_nothing_of_directions() -> None:
    comparison = a_comparison(Path())
    assert hospital_rows(comparison, AUC).headings[-1] == "gain over alone"
    console = Console(width=110, file=io.StringIO())
    console.print(render_table(comparison))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ower is better" not in text and "below 0" not in text
    assert "AUC needs test patients of at least two classes" in " ".join(text.split())


def test_json_has_the_tasks_keys_down_to_the_curves(study: Study) -> None:
    tree = a_comparison(Path(), study=study).to_json()
    federated = tree["arms"]["federated"]["student"]
    assert set(federated["together"]) == set(federated["worst"]) == {"error"}
    assert set(tree["curves"]["finetune"][0]) == {"round", "error"}
    assert tree["measures"][0]["higher_is_better"] is False
    usual = a_comparison(Path()).to_json()
    assert set(usual["curves"]["finetune"][0]) == {"round", "auc"}
    assert set(usual["arms"]["federated"]["student"]["together"]) == {"auc", "accuracy"}


def test_a_report_reads_right(study: Study, tmp_path: Path) -> None:
    page = Page(written(tmp_path, study=study))
    text = " ".join(page.text.split())
    answer = text[: text.index("What was asked")]
    error = a_comparison(tmp_path, study=study).arms["federated"].student.together["error"]
    assert f"reaches dose error {in_words(error, ERROR)}, where lower is better, on" in answer
    assert "training together improves it: −" in answer
    assert "dose error: 2 better, 0 worse, 1 without one" in answer
    assert "The worst hospital is the one with the highest mean" in text
    alts = " ".join(attributes["alt"] or "" for tag, attributes in page.elements if tag == "img")
    assert "Dose error after each federated round" in alts
    for words in (text, alts):
        assert "AUC" not in words and "accuracy" not in words


def test_pictures_are_drawn_within_what_the_measure_can_be(study: Study) -> None:
    comparison = a_comparison(Path(), study=study)
    for one in (
        epsilon_plot(comparison),
        round_plot(comparison.curves, ERROR),
        hospital_plot(comparison),
    ):
        assert one is not None and b"<svg" in one.svg
    _, axes = canvas(3.0)
    frame(axes, [Interval(-5.0, -9.0, 3.0, 3)], ERROR)
    low, high = axes.get_ylim()
    assert low < -9 and high > 3
    assert not axes.lines and not axes.texts  # guessing has no figure here
    _, axes = canvas(3.0)
    frame(axes, [Interval(0.6, 0.5, 1.2, 3)], AUC)
    assert 1.0 <= axes.get_ylim()[1] < 1.02
    assert axes.lines  # chance


def test_the_range_reaches_the_best_a_figure_can_be() -> None:
    bounded = replace(ERROR, bounds=(0.0, None))
    left, right = _range([20.0, 30.0], bounded)
    assert -1 < left < 0 and right > 30
    left, right = _range([0.8, 0.9], AUC)
    assert 0.7 < left < 0.8 and 1 < right < 1.02
    left, right = _range([20.0, 30.0], ERROR)
    assert 19 < left < 20 and 30 < right < 31
    assert _range([], ERROR)[0] < _range([], ERROR)[1]


def a_sweep(study: Study) -> Sweep:
    """Two combinations; the second has the lower error."""
    points = tuple(
        a_point(
            {"privacy.epsilon": epsilon},
            over_seeds([seed(error, a=error, b=2 * error)], [ERROR]),
            kilobytes=100 * epsilon,
        )
        for epsilon, error in ((1.0, 30.0), (3.0, 20.0))
    )
    curves = a_comparison(Path(), study=study).curves
    return Sweep(
        study=study,
        folder=Path(),
        settings=(Setting("privacy.epsilon", (1.0, 3.0)),),
        seeds=(0,),
        hospitals={"a": 10, "b": 10},
        points=points,
        curves={"first": curves["finetune"]},
        price=None,
    )


def test_a_sweep_shows_the_tasks_measures(study: Study) -> None:
    found = a_sweep(study)
    assert "dose error" in sweep_rows(found).headings
    assert sweep_rows(found).rows[0][-2] == "60.00 b"
    (row, _) = csv.DictReader(io.StringIO(results_csv(found)))
    assert (row["error"], row["teacher_error"], row["worst_error"]) == ("30.0", "30.0", "60.0")
    assert row["released_error"] == "" and row["worst_hospital"] == "b"
    assert set(found.to_json()["curves"]["first"][0]) == {"round", "error"}
    said = "".join(str(one) for one in _headline(found))
    assert "dose error lies between 20.00 and 30.00" in said and "Lower is better" in said
    drawn = (
        setting_plot(found.points, "privacy.epsilon", measure=ERROR, unit="patient", title="t"),
        traffic_plot(found.points, ERROR),
        rounds_plot(found.curves, ERROR),
    )
    assert all(one is not None for one in drawn)


def test_a_selection_prefers_the_lowest_and_any_figure_to_none(
    study: Study, tmp_path: Path
) -> None:
    def score(name: str, counts: list[list[float]], of: Study = study) -> tuple[int, float]:
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        run.write_json("result.json", {"evaluation": [{"counts": counts, "noise_std": 1.0}]})
        return _score(run, of)

    low, high, none = score("low", [[2.0]]), score("high", [[7.0]]), score("none", [[0.0]])
    assert low > high > none
    # Two classes: a trial with an AUC, however low, before one that shows its accuracy alone.
    usual = study.revised(task="diagnosis")
    with_auc = score("auc", [[0.0, 5.0], [5.0, 0.0]], usual)
    without = score("accuracy", [[9.0, 0.0], [0.0, 0.0]], usual)
    assert with_auc > without > (-2, -math.inf)


def test_a_run_in_words() -> None:
    row = {"declared_patients": 20, "test_patients": 6}
    rows = [
        row | {"hospital": name, "teacher": {"error": 1500.0}, "student": {"error": value}}
        for name, value in (("a", 12.5), (NASTY, None))
    ]
    summary = {
        "study": "s",
        "measures": [asdict(ERROR)],
        "hospitals": rows,
        "all": rows[0] | {"hospital": "all"},
        "teacher_parameters": 20,
        "student_parameters": 2,
        "guaranteed": False,
        "released": {"error": [3.0, -1.0, 7.0]},
        "released_from": "each hospital's noised histogram",
    }
    console = Console(width=110, file=io.StringIO())
    console.print(run_table(summary))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("dose error", "all (teacher)", "1500.0", "12.50", "—"):
        assert words in text
    lines = closing_lines(summary)
    assert any("dose error 3.000 (−1.000 to 7.000)" in line for line in lines)
    assert "Lower is better for dose error." in lines
    assert json.dumps(summary)
