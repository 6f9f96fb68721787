"""A whole comparison, small: interrupted, continued, repeated, reported."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from common import tasks
from common.errors import RunError
from common.study import Study, load_study
from server.store import RunFolder
from simulations.arms import CompareProgress
from simulations.compare import compare
from simulations.comparison import Comparison
from simulations.evaluation import finished_models, score, together
from simulations.report import write_report
from simulations.run_report import write_run_report
from simulations.simulate import load_hospitals, resume, simulate
from tests.e2e.interruptions import stop_in_the_third_run
from tests.unit.made_up import DOSE, ERROR

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
NOISE_SEED = 7
RUNS = 2 * (1 + 3 + 1 + 2 + 1)  # seeds × (federated, alone, pooled, no privacy, one more ε)


def small(**changes: object) -> Study:
    return load_study(EXAMPLES / "wisconsin.toml").revised(
        simulation__hospitals=3,
        federation__minimum_hospitals=2,
        pretrain__steps=10,
        finetune__rounds=3,
        distill__steps=60,
        **changes,
    )


def run(folder: Path, watch, **settings) -> Comparison:
    return compare(
        small(),
        folder,
        Path(),
        seeds=2,
        epsilons=[1.0],
        noise_seed=NOISE_SEED,
        watch=watch,
        **settings,
    )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list]:
    """Stopped in the middle of a round of the third run, then continued to the end."""
    folder = tmp_path_factory.mktemp("comparison") / "c"

    stop_in_the_third_run(lambda stop: run(folder, stop))
    assert not (folder / "comparison.json").exists()
    steps: list[CompareProgress] = []
    return run(folder, steps.append), steps


@pytest.fixture(scope="module")
def done(interrupted: tuple[Comparison, list]) -> Comparison:
    return interrupted[0]


def begun(steps: list[CompareProgress]) -> list[CompareProgress]:
    return [step for step in steps if step.progress is None]


def test_continuing_reuses_what_was_finished(interrupted: tuple[Comparison, list]) -> None:
    starts = begun(interrupted[1])
    assert [step.reused for step in starts] == [True] * 2 + [False] * (RUNS - 2)
    assert [step.number for step in starts] == list(range(1, RUNS + 1))


def test_an_interrupted_arm_ends_as_if_it_had_not_been(done: Comparison, tmp_path: Path) -> None:
    # The third run is hospital-2 alone; the same comparison with nothing in its way:
    again = compare(
        small(),
        tmp_path / "c",
        Path(),
        seeds=1,
        epsilons=[],
        noise_seed=NOISE_SEED,
        watch=lambda _: None,
    )
    for place in ("alone/hospital-2/seed-0", "federated/seed-0", "pooled/seed-0"):
        for name in ("student.safetensors", "teacher.safetensors"):
            assert (done.folder / place / name).read_bytes() == (
                again.folder / place / name
            ).read_bytes()
    assert again.sweep[0].student == again.arms["federated"].student.together


def test_a_second_call_trains_nothing_and_finds_the_same(done: Comparison) -> None:
    steps: list[CompareProgress] = []
    results = sorted(done.folder.rglob("result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    again = run(done.folder, steps.append)
    assert len(results) == RUNS
    assert [path.stat().st_mtime_ns for path in results] == before
    assert all(step.reused for step in begun(steps)) and len(steps) == RUNS
    assert again.to_json() == done.to_json()
    assert json.loads((done.folder / "comparison.json").read_text("utf-8")) == json.loads(
        json.dumps(done.to_json())
    )


def test_the_federated_arm_is_an_ordinary_run(done: Comparison, tmp_path: Path) -> None:
    place = done.folder / "federated" / "seed-0"
    single = simulate(small(), tmp_path / "r", Path(), lambda _: None, noise_seed=NOISE_SEED)
    assert (place / "student.safetensors").read_bytes() == (
        single.path / "student.safetensors"
    ).read_bytes()
    assert resume(place, lambda _: None).path == place


def test_one_roof_cannot_be_continued_as_if_it_were_all_hospitals(done: Comparison) -> None:
    place = done.folder / "alone" / "hospital-1" / "seed-0"
    (place / "result.json").rename(place / "away")
    try:
        with pytest.raises(RunError, match=r"simulation\.json"):
            resume(place, lambda _: None)
    finally:
        (place / "away").rename(place / "result.json")


def test_every_arm_is_scored_on_the_same_test_patients(done: Comparison) -> None:
    study, hospitals = load_hospitals(done.folder / "federated" / "seed-0")
    aucs = {}
    for arm in ("federated", "pooled", "privacy.epsilon=1"):
        folder, own = RunFolder.open(done.folder / arm / "seed-0")
        _, student, features = finished_models(folder, own)
        aucs[arm] = together(score(student, own, features, hospitals)).figures["auc"]
    _, second = load_hospitals(done.folder / "federated" / "seed-1")
    folder, own = RunFolder.open(done.folder / "federated" / "seed-1")
    _, student, features = finished_models(folder, own)
    other = together(score(student, own, features, second)).figures["auc"]
    found = done.arms["federated"].student.together["auc"]
    assert found.mean == pytest.approx((aucs["federated"] + other) / 2)
    assert study.seed == 0
    facts = {one.name: len(one.test.patients) for one in hospitals}
    assert facts.keys() == done.hospitals.keys()
    assert all(
        low <= facts[name] <= high
        for name, low, high in ((name, *one.test_patients) for name, one in done.hospitals.items())
    )


def test_alone_is_each_hospitals_own_model_at_home_and_the_mean_of_all_elsewhere(
    done: Comparison,
) -> None:
    aucs: list[float] = []
    at_home: dict[str, list[float]] = {name: [] for name in done.hospitals}
    for seed in done.seeds:
        _, hospitals = load_hospitals(done.folder / "federated" / f"seed-{seed}")
        for name in done.hospitals:
            folder, own = RunFolder.open(done.folder / "alone" / name / f"seed-{seed}")
            _, student, features = finished_models(folder, own)
            scored = score(student, own, features, hospitals)
            aucs.append(together(scored).figures["auc"])
            at_home[name] += [one.figures["auc"] for one in scored if one.hospital == name]
    alone = done.arms["alone"].student
    assert alone.together["auc"].mean == pytest.approx(sum(aucs) / len(aucs))
    for name, values in at_home.items():
        assert alone.hospitals[name]["auc"].mean == pytest.approx(sum(values) / len(values))


def test_figures_are_shares_with_both_seeds_behind_them(done: Comparison) -> None:
    assert done.seeds == (0, 1)
    assert list(done.arms) == [
        "federated",
        "alone",
        "pooled",
        "pooled-no-privacy",
        "federated-no-privacy",
    ]
    for arm in done.arms.values():
        assert arm.student.together["auc"].count == 2
        assert 0.5 < arm.student.together["auc"].mean <= 1
        assert set(arm.student.hospitals) == set(done.hospitals)
    assert [one.epsilon for one in done.sweep] == [1.0, 3.0]
    assert [one.round for one in done.curves["finetune"]] == [1, 2, 3]
    assert done.arms["federated"].released is not None
    assert done.arms["alone"].released is None  # histograms of different models
    assert done.arms["pooled-no-privacy"].released is None


def test_arms_without_privacy_say_so_in_their_own_statement(done: Comparison) -> None:
    for arm, epsilon in (("federated-no-privacy", None), ("privacy.epsilon=1", 1.0)):
        statement = RunFolder(done.folder / arm / "seed-0").read_json("privacy.json")
        assert statement["epsilon_target"] == epsilon
        assert not statement["guaranteed"]  # none of them: the noise is test noise


def test_another_study_or_other_noise_may_not_share_the_folder(done: Comparison) -> None:
    with pytest.raises(RunError, match="another study or other noise"):
        compare(small(privacy__epsilon=2.0), done.folder, Path(), seeds=1, watch=lambda _: None)
    with pytest.raises(RunError, match="another study or other noise"):
        compare(small(), done.folder, Path(), seeds=1, watch=lambda _: None)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(RunError, match="not empty and not a comparison"):
        compare(small(), tmp_path, Path(), seeds=1, watch=lambda _: None, replace_existing=True)
    assert (tmp_path / "thesis.txt").read_text("utf-8") == "precious"


def test_reports_of_comparison_and_run_name_every_hospital(done: Comparison) -> None:
    for path in (write_report(done), write_run_report(done.folder / "federated" / "seed-0")):
        text = path.read_text("utf-8")
        assert all(name in text for name in done.hospitals)
        assert "No privacy is guaranteed" in text  # test noise
        assert str(done.folder) not in text  # nothing of this machine's paths
        assert text.count('src="data:image/png;base64,') == text.count("<img")


def test_a_study_without_privacy_compares_three_arms(tmp_path: Path) -> None:
    study = small(
        privacy__trust="none",
        privacy__epsilon=None,
        privacy__delta=None,
        evaluation__epsilon=None,
    )
    found = compare(study, tmp_path / "c", Path(), seeds=1, watch=lambda _: None)
    assert list(found.arms) == ["federated", "alone", "pooled"]
    assert found.sweep == ()
    assert "No privacy is guaranteed for any of it" in write_report(found).read_text("utf-8")


def test_a_task_whose_figure_is_better_the_lower_is_compared_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.TASKS, "dose", DOSE)
    study = small(
        task="dose",
        privacy__trust="none",
        privacy__epsilon=None,
        privacy__delta=None,
        evaluation__epsilon=None,
    )
    found = compare(study, tmp_path / "c", Path(), seeds=1, watch=lambda _: None)
    student = found.arms["federated"].student
    errors = {name: one["error"].mean for name, one in student.hospitals.items()}
    assert student.worst["error"].hospital == max(errors, key=lambda name: errors[name])
    tree = json.loads((tmp_path / "c" / "comparison.json").read_text("utf-8"))
    assert set(tree["arms"]["pooled"]["teacher"]["together"]) == {"error"}
    assert tree["measures"] == [asdict(ERROR) | {"bounds": [None, None]}]
    place = tmp_path / "c" / "federated" / "seed-0"
    for path in (write_report(found), write_run_report(place)):
        text = path.read_text("utf-8")
        assert "reaches dose error " in text and ", where lower is better, on" in text
        assert "Lower is better for dose error." in text and " AUC" not in text
    summary = RunFolder(place).read_json("evaluation.json")
    assert summary["all"]["student"]["error"] == student.together["error"].mean
