"""A comparison's arithmetic, and who sees which patients, without training anything."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from client.hospital import Hospital
from common.errors import StudyError
from common.study import Study, load_study
from simulations import arms
from simulations.combinations import Setting, combine
from simulations.compare import compare, default_epsilons
from simulations.comparison import over_seeds, paired, seed_figures, shown, worst_first
from simulations.evaluation import Scores
from simulations.hospitals import World, build_world, open_world, seeded_noise
from simulations.measures import measures_of
from simulations.tables import hospital_rows, render_table
from simulations.worlds import Worlds
from tests.unit.made_up import a_comparison

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"


def wisconsin(**changes: object) -> Study:
    return load_study(EXAMPLES / "wisconsin.toml").revised(simulation__hospitals=3, **changes)


STUDY = wisconsin()
MEASURES = measures_of(STUDY)
AUC = MEASURES[0]


def scores(hospital: str, labels: list[int], positive: list[float]) -> Scores:
    second = np.array(positive)
    return Scores(STUDY, hospital, np.array(labels), np.stack([1 - second, second], axis=1))


def one_seed(*at: tuple[str, list[int], list[float]]):
    own = [scores(*one) for one in at]
    return seed_figures(own, own)


def test_intervals_are_students_t_over_the_seeds() -> None:
    values = [0.7, 0.9, 0.8, 0.95]
    seeds = [
        one_seed(("a", [0] * 20, [0.0] * round(20 * v) + [1.0] * round(20 * (1 - v))))
        for v in values
    ]
    found = over_seeds(seeds, MEASURES).together["accuracy"]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert found.count == 4


def test_an_auc_that_does_not_exist_is_left_out_and_counted() -> None:
    both, single = ("a", [0, 1], [0.1, 0.9]), ("a", [0, 0], [0.1, 0.9])
    figures = over_seeds([one_seed(both), one_seed(single)], MEASURES).hospitals["a"]
    assert (figures["auc"].mean, figures["auc"].count) == (1.0, 1)
    assert shown(figures["auc"], seeds=2) == "1.000 (1 of 2)"
    assert figures["accuracy"].count == 2


def test_one_model_a_hospital_is_averaged_as_figures_never_as_mixed_scores() -> None:
    # Each model ranks perfectly, on scales of its own: mixing their scores would spoil the AUC.
    low = scores("a", [0, 1], [0.01, 0.02])
    high = scores("b", [0, 1], [0.98, 0.99])
    assert seed_figures([low, high], [low, high]).together["auc"] == 1.0


def test_mean_of_hospitals_counts_small_ones_alike() -> None:
    large = ("large", [0, 1] * 50, [0.1, 0.9] * 50)
    small = ("small", [0, 1], [0.9, 0.1])
    figures = over_seeds([one_seed(large, small)], MEASURES)
    assert figures.mean_of_hospitals["auc"].mean == 0.5
    assert (figures.worst["auc"].hospital, figures.worst["auc"].value.mean) == ("small", 0.0)


def test_differences_are_taken_seed_by_seed() -> None:
    def at(accuracy: float):
        right = round(10 * accuracy)
        return one_seed(("a", [0] * 10, [0.0] * right + [1.0] * (10 - right)))

    # The seeds differ wildly, the arms by exactly 0.1 in each: the paired interval has no width.
    found = paired(
        "federated",
        "alone",
        {
            "federated": [at(0.5), at(0.7), at(1.0)],
            "alone": [at(0.4), at(0.6), at(0.9)],
        },
    ).together["accuracy"]
    assert found.mean == pytest.approx(0.1)
    assert found.high - found.low == pytest.approx(0, abs=1e-9)


def test_worst_hospital_comes_first_and_those_without_a_figure_last() -> None:
    figures = over_seeds(
        [
            one_seed(
                ("good", [0, 1], [0.1, 0.9]),
                ("none", [0, 0], [0.1, 0.2]),
                ("bad", [0, 1], [0.9, 0.1]),
            )
        ],
        MEASURES,
    )
    assert worst_first(figures, AUC) == ["bad", "good", "none"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([-0.0004, -0.0004], "+0.000 (equal)"),
        ([-0.02], "−0.020 (1 of 2)"),
        ([math.nan], "—"),
    ],
)
def test_signed_figures(values: list[float], text: str) -> None:
    from common.learning.metrics import mean_interval

    assert shown(mean_interval(values), seeds=2, signed=True) == text


def test_default_sweep_lies_around_the_studys_own_epsilon() -> None:
    study = wisconsin()
    assert default_epsilons(study) == (0.5, 1.0, 3.0, 8.0)
    own = default_epsilons(study.revised(privacy__epsilon=0.123))
    assert 0.123 in own and min(own) < 0.123 < max(own)


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({}, {"seeds": 0}, "seeds: expected at least 1, found 0"),
        ({}, {"seeds": 1, "epsilons": [-1.0]}, "expected numbers above 0"),
        (
            {
                "privacy__trust": "none",
                "privacy__epsilon": None,
                "privacy__delta": None,
                "evaluation__epsilon": None,
            },
            {"seeds": 1, "epsilons": [1.0]},
            "an ε sweep needs privacy",
        ),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict, asked: dict, message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        compare(wisconsin(**changes), tmp_path / "c", tmp_path, watch=lambda _: None, **asked)
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(wisconsin(), Path())


def cast_of(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Who takes part in every run of one seed; nothing is trained."""
    seen: dict[tuple[str, str | None], tuple[Study, list[Hospital]]] = {}
    told = []

    def note(study, run, hospitals, corpus, watch, *, debug):
        seen[told[-1].arm, told[-1].hospital] = (study, hospitals)

    monkeypatch.setattr(arms, "run_in_process", note)
    sweep = combine(world.study, [Setting("privacy.epsilon", (1.0,))])
    runs = arms.runs_of_seed(world.study, world, sweep)
    arms.train(
        runs,
        tmp_path,
        Worlds(tmp_path),
        noise_seed=None,
        watch=told.append,
        debug=True,
    )
    return seen


def test_alone_sees_its_own_rows_only_and_pooled_sees_all_training_rows(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [site.name for site in world.sites]
    truth = {one.name: one for one in open_world(world, seeded_noise(0, names))}
    seen = cast_of(world, tmp_path, monkeypatch)
    for name in names:
        _, (only,) = seen[arms.ALONE, name]
        assert set(only.train.patients) == set(truth[name].train.patients)
        assert set(only.test.patients) == set(truth[name].test.patients)
    everyone = {patient for one in truth.values() for patient in one.train.patients}
    tested = {patient for one in truth.values() for patient in one.test.patients}
    for arm in (arms.POOLED, arms.POOLED_NO_PRIVACY):
        _, (roof,) = seen[arm, None]
        assert set(roof.train.patients) == everyone
        assert not everyone & tested
    for arm in (arms.FEDERATED, arms.FEDERATED_NO_PRIVACY, "privacy.epsilon=1"):
        _, hospitals = seen[arm, None]
        assert [one.name for one in hospitals] == names


def test_arms_differ_in_privacy_and_minimum_only_and_never_share_noise(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = cast_of(world, tmp_path, monkeypatch)
    own = world.study
    assert seen[arms.FEDERATED, None][0] == own
    assert seen["privacy.epsilon=1", None][0] == own.revised(privacy__epsilon=1.0)
    assert seen[arms.POOLED, None][0] == own.revised(federation__minimum_hospitals=1)
    assert seen[arms.FEDERATED_NO_PRIVACY, None][0].privacy.trust == "none"
    first = [
        hospital.guard.noise.stream("x").normal(1)[0]
        for _, hospitals in seen.values()
        for hospital in hospitals
    ]
    assert len(set(first)) == len(first)
    assert all(hospital.guard.noise.is_secret for _, them in seen.values() for hospital in them)


def test_a_name_that_leaves_its_folder_is_refused(world: World) -> None:
    from dataclasses import replace

    bad = replace(world, sites=(replace(world.sites[0], name="../elsewhere"), *world.sites[1:]))
    with pytest.raises(StudyError, match="leave out slashes"):
        arms.runs_of_seed(bad.study, bad, ())


def test_json_writes_null_and_tables_a_dash_where_no_auc_exists() -> None:
    comparison = a_comparison(Path())
    tree = comparison.to_json()
    assert tree["arms"]["federated"]["student"]["hospitals"]["tiny"]["auc"] == {
        "mean": None,
        "low": None,
        "high": None,
        "count": 0,
    }
    last = next(row for row in hospital_rows(comparison, AUC).rows if row[0] == "tiny")
    assert last[2:] == ("—", "—", "—", "—")


def test_the_table_shows_every_arm_hospital_and_interval_in_a_plain_terminal() -> None:
    comparison = a_comparison(Path())
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render_table(comparison))
    text = console.export_text()
    console.file.close()
    for arm in comparison.arms.values():
        assert arm.title in text
    for name in comparison.hospitals:
        assert name in text
    assert "±" in text and "of the mean over 3 seeds" in text
