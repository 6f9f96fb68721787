"""A whole sweep, small: interrupted, continued, priced, reported; and a private selection."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import RunError, StudyError
from common.privacy.accounting import epsilon
from common.privacy.budget import budget_of
from common.privacy.selection import Trials
from common.study import Study, load_study
from server.store import RunFolder
from simulations import selection
from simulations.arms import CompareProgress
from simulations.combinations import parse_settings
from simulations.compare import compare
from simulations.price import price_of
from simulations.scoring import released_figures
from simulations.selection import select
from simulations.sweep import Sweep, checked_combinations, sweep
from simulations.sweep_report import write_sweep_report
from simulations.sweep_tables import nothing_chosen
from simulations.worlds import Worlds
from tests.e2e.interruptions import stop_in_the_third_run

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
NOISE_SEED = 7
SETTINGS = parse_settings(["privacy.epsilon=1,3", "finetune.rounds=2,4"])
RUNS = 2 * 4  # seeds × combinations


def small(**changes: object) -> Study:
    return load_study(EXAMPLES / "wisconsin.toml").revised(
        simulation__hospitals=3,
        federation__minimum_hospitals=2,
        pretrain__steps=10,
        finetune__rounds=3,
        distill__steps=40,
        **changes,
    )


def run(folder: Path, watch, settings=SETTINGS, **more) -> Sweep:
    asked = {"seeds": 2, "noise_seed": NOISE_SEED} | more
    return sweep(small(), settings, folder, Path(), watch=watch, **asked)


def nobody(_: object) -> None:
    return None


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Stopped in the middle of a round of the third run, then continued to the end."""
    folder = tmp_path_factory.mktemp("sweep") / "s"

    stop_in_the_third_run(lambda stop: run(folder, stop))
    assert not (folder / "results.json").exists()
    steps: list[CompareProgress] = []
    found = run(folder, steps.append)
    starts = [step for step in steps if step.progress is None]
    assert [step.reused for step in starts] == [True] * 2 + [False] * (RUNS - 2)
    return found


def test_every_combination_has_figures_over_all_seeds(done: Sweep) -> None:
    assert [one.settings for one in done.points] == [
        {"privacy.epsilon": epsilon, "finetune.rounds": rounds}
        for epsilon in (1, 3)
        for rounds in (2, 4)
    ]
    for one in done.points:
        assert one.student["auc"].count == 2
        assert 0.5 < one.student["auc"].mean <= 1
        assert one.released is not None
        assert one.rounds == one.settings["finetune.rounds"]
        curve = done.curves[f"privacy.epsilon = {one.epsilon:g}, finetune.rounds = {one.rounds}"]
        assert [point.round for point in curve] == list(range(1, one.rounds + 1))


def test_a_second_call_trains_nothing_and_more_values_cost_only_themselves(done: Sweep) -> None:
    results = sorted(done.folder.rglob("result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    assert run(done.folder, nobody).to_json() == done.to_json()
    assert [path.stat().st_mtime_ns for path in results] == before
    steps: list[CompareProgress] = []
    more = parse_settings(["privacy.epsilon=1,2,3", "finetune.rounds=2"])
    run(done.folder, steps.append, more, seeds=1)
    assert [step.reused for step in steps if step.progress is None] == [True, False, True]
    run(done.folder, nobody)  # the figures on disk are the fixture's again


def test_the_files_hold_the_figures(done: Sweep) -> None:
    tree = json.loads((done.folder / "results.json").read_text("utf-8"))
    assert tree == json.loads(json.dumps(done.to_json()))
    assert tree["chosen"] is None
    with (done.folder / "results.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == len(done.points)
    for row, one in zip(rows, done.points, strict=True):
        assert float(row["privacy.epsilon"]) == one.epsilon
        assert float(row["auc"]) == one.student["auc"].mean
        assert float(row["auc_low"]) == one.student["auc"].low
        assert float(row["bytes_per_hospital"]) == one.bytes_per_hospital.mean


def test_bytes_are_what_the_messages_hold(done: Sweep) -> None:
    size = {(one.epsilon, one.rounds): one.bytes_per_hospital.mean for one in done.points}
    # An interrupted round that was asked again counts once.
    assert size[3.0, 2] == size[1.0, 2]
    # Teacher and student go out each round, the head's update comes back, in four bytes a number.
    result = RunFolder(done.folder / done.points[0].arm / "seed-0").read_json("result.json")
    numbers = result["teacher_parameters"] + result["student_parameters"]
    each = (size[1.0, 4] - size[1.0, 2]) / 2
    assert 4 * numbers < each < 4 * numbers * 1.2


def test_another_study_or_other_noise_may_not_share_the_folder(done: Sweep) -> None:
    with pytest.raises(RunError, match="another study or other noise"):
        run(done.folder, nobody, noise_seed=8)
    with pytest.raises(RunError, match="another study or other noise"):
        sweep(small(privacy__clip_norm=2.0), SETTINGS, done.folder, Path(), seeds=1, watch=nobody)


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    impossible = parse_settings(["simulation.hospitals=3,3000"])
    with pytest.raises(StudyError, match="at most"):
        run(tmp_path / "s", nobody, impossible)
    with pytest.raises(StudyError, match="at least one setting"):
        run(tmp_path / "s", nobody, ())
    assert not (tmp_path / "s").exists()


def test_settings_that_make_other_hospitals_are_scored_on_their_own(tmp_path: Path) -> None:
    found = run(tmp_path / "s", nobody, parse_settings(["simulation.hospitals=2,4"]), seeds=1)
    counts = [
        len(RunFolder(tmp_path / "s" / one.arm / "seed-0").read_json("result.json")["hospitals"])
        for one in found.points
    ]
    assert counts == [2, 4]


def test_compares_epsilon_sweep_is_a_sweep(done: Sweep, tmp_path: Path) -> None:
    study = small().revised(finetune__rounds=2)
    arms = compare(
        study, tmp_path / "c", Path(), seeds=2, epsilons=[1.0], noise_seed=NOISE_SEED, watch=nobody
    )
    ours = next(one for one in done.points if (one.epsilon, one.rounds) == (1.0, 2))
    theirs = next(one for one in arms.sweep if one.epsilon == 1.0)
    assert theirs.student == ours.student
    assert theirs.arm == "privacy.epsilon=1"


def test_the_report_says_that_nothing_was_chosen_and_what_it_would_cost(done: Sweep) -> None:
    assert done.price is not None
    text = write_sweep_report(done).read_text("utf-8")
    for words in ("This sweep chose nothing", "No privacy is guaranteed", "Papernot", "--select"):
        assert words in text
    assert f"ε = {done.price.each_once.training:.2f}" in text
    assert str(done.folder) not in text
    for name in ("epsilon", "finetune-rounds", "bytes", "rounds"):
        for kind in ("png", "svg"):
            assert (done.folder / "plots" / f"{name}.{kind}").stat().st_size > 10_000


def test_the_price_composes_every_run(done: Sweep) -> None:
    study = small()
    combinations = checked_combinations(study, SETTINGS, [0], Worlds(Path()))
    price = price_of(study, combinations, 2)
    assert price is not None and price.runs == RUNS
    events = [event for one in combinations for event in budget_of(one.study).events()]
    relation = study.privacy.relation
    once = epsilon(events, delta=1e-5, relation=relation)
    assert price.each_once.training == pytest.approx(once)
    assert price.all_runs is not None
    assert price.all_runs >= epsilon(events * 2, delta=1e-5, relation=relation) > once > 3
    for cost in price.selected.values():
        assert cost.training is not None and cost.training > 3  # dearer than the dearest run


def test_without_a_bound_the_price_says_so() -> None:
    study = small(evaluation__epsilon=None)
    combinations = checked_combinations(
        study,
        parse_settings(["privacy.relation=add_or_remove_one,replace_one"]),
        [0],
        Worlds(Path()),
    )
    price = price_of(study, combinations, 1)
    assert price is not None
    assert price.all_runs is None and price.each_once.training is None
    public = small(
        privacy__trust="none", privacy__epsilon=None, privacy__delta=None, evaluation__epsilon=None
    )
    assert price_of(public, combinations, 1) is None


def test_a_sweep_without_privacy_has_nothing_to_charge(tmp_path: Path) -> None:
    study = small(
        privacy__trust="none", privacy__epsilon=None, privacy__delta=None, evaluation__epsilon=None
    )
    settings = parse_settings(["finetune.rounds=1,2"])
    found = sweep(study, settings, tmp_path / "s", Path(), seeds=1, watch=nobody)
    assert "breaks none" in nothing_chosen(found)
    assert write_sweep_report(found).is_file()


TRIALS = Trials(law="geometric", mean=3.0)


def chosen(folder: Path, **more):
    return select(small(), SETTINGS, folder, Path(), **({"trials": TRIALS} | more))


def test_a_selection_keeps_the_best_trial_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[tuple[int, float]] = []
    students: list[bytes] = []
    real = selection._score

    def note(run: RunFolder, study: Study) -> tuple[int, float]:
        scores.append(real(run, study))
        students.append((run.path / "student.safetensors").read_bytes())
        return scores[-1]

    monkeypatch.setattr(selection, "_score", note)
    monkeypatch.setattr(selection, "_drawn", lambda *_: [0, 3, 2, 3])
    found = chosen(tmp_path / "s")
    assert len(scores) == 4
    assert students[1] != students[3]  # the same settings twice, under fresh noise
    assert found.released == released_figures(*RunFolder.open(tmp_path / "s" / "winner"))
    assert found.released is not None and (0, found.released["auc"]) == max(scores)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "chosen.json",
        "selection.json",
        "winner",
    ]
    # What is told gives away neither how many trials there were nor which one won.
    assert json.loads((tmp_path / "s" / "chosen.json").read_text())["trial"] is None
    assert found.guaranteed and found.cost.training is not None and found.cost.training > 3
    assert not (tmp_path / "s" / "winner" / "privacy.json").exists()
    statement = (tmp_path / "s" / "winner" / "PRIVACY.md").read_text()
    assert f"ε = {found.cost.training:.3g}" in statement


def test_trials_under_test_noise_differ_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[tuple[int, float]] = []
    real = selection._score
    monkeypatch.setattr(selection, "_score", lambda *run: scores.append(real(*run)) or scores[-1])
    monkeypatch.setattr(selection, "_drawn", lambda *_: [0, 0])
    chosen(tmp_path / "s", noise_seed=5)
    assert scores[0] != scores[1]


def test_an_interrupted_selection_keeps_its_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    real = selection.train

    def stop(runs, *rest, **more):
        if runs[0].arm.endswith("/1"):
            raise StoppedError
        real(runs, *rest, **more)

    monkeypatch.setattr("common.privacy.selection.Trials.draw", lambda self, stream: 3)
    monkeypatch.setattr(selection, "train", stop)
    with pytest.raises(StoppedError):
        chosen(tmp_path / "s", noise_seed=5)
    drawn = (tmp_path / "s" / "trials.json").read_text()
    assert len(json.loads(drawn)) == 3
    first = tmp_path / "s" / "trials" / "0" / "seed-0" / "result.json"
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(selection, "train", real)
    seen: list[int] = []
    monkeypatch.setattr(
        selection,
        "_score",
        lambda run, _: seen.append((run.path / "result.json").stat().st_mtime_ns) or (0, 0.0),
    )
    found = chosen(tmp_path / "s", noise_seed=5)
    assert len(seen) == 3 and seen[0] == before
    assert not found.guaranteed
    assert "No privacy guarantee" in (tmp_path / "s" / "winner" / "PRIVACY.md").read_text()
    assert chosen(tmp_path / "s", noise_seed=5) == found  # and again, without any trial
    with pytest.raises(RunError, match="another study or other noise"):
        chosen(tmp_path / "s", noise_seed=5, trials=replace(TRIALS, mean=9.0))


def test_no_trial_leaves_the_study_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_drawn", lambda *_: [])
    found = chosen(tmp_path / "s", trials=Trials(law="poisson", mean=2.0))
    assert found.settings is None and found.released is None
    assert not (tmp_path / "s" / "winner").exists()
    assert "No trial was drawn" in selection.selection_lines(found)[0]


def test_a_choice_without_released_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="evaluation.epsilon"):
        select(small(evaluation__epsilon=None), SETTINGS, tmp_path / "s", Path(), trials=TRIALS)
    assert not (tmp_path / "s").exists()
