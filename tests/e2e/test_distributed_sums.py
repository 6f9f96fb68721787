"""Statistics and the evaluation's histogram leave only inside a secure sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from client import aggregation, rounds
from client.guard import MemoryGuard, Release, refuse_beyond_study
from client.hospital import Hospital
from client.summands import summand_of
from common.errors import RefusalError, RunError, StudyError
from common.features import FeatureMap, moment_count, range_scaling, scaling_tensor
from common.learning.evaluate import answer
from common.models import build_student, build_teacher
from common.privacy.accounting import epsilon
from common.privacy.budget import budget_of, evaluation_budget_of, stage_charge
from common.privacy.units import Relation
from common.randomness import SeededNoise
from common.secagg import MemoryAttempts, encoding
from common.secagg.encoding import Encoding
from common.secagg.plan import STAGES, encoding_of, terms_of
from common.study import Study
from common.tables import Table
from common.wire import AggregateTask, EvaluateTask, StatisticsTask, TrainTask
from server.conduct import conduct
from server.store import RunFolder
from simulations.run_report import write_run_report
from simulations.simulate import load_hospitals, simulate
from simulations.summary import summarise
from tests.e2e.secure_link import Direct, opened, panel_of

HOSPITALS, BINS = 6, 20
HONEST = 4  # of five survivors, less one colluder


@pytest.fixture
def study(wisconsin: Study) -> Study:
    return wisconsin.revised(
        scaling="private",
        privacy__trust="distributed",
        federation__hospitals=HOSPITALS,
        federation__minimum_hospitals=2,
        federation__tolerated_dropouts=1,
        federation__tolerated_colluders=1,
        simulation__hospitals=HOSPITALS,
        finetune__rounds=2,
        finetune__local_steps=1,
        finetune__optimiser={"kind": "sgd", "learning_rate": 0.5},
        pretrain__steps=5,
        distill__steps=5,
        evaluation__epsilon=1.0,
        evaluation__bins=BINS,
    )


def evaluate_task(study: Study) -> EvaluateTask:
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    return EvaluateTask(
        study_digest=study.digest(),
        student=dict(build_student(study, features).state_dict()),
        scaling=scaling_tensor(study.dictionary, features.scaling),
    )


def task_of(study: Study, stage: str) -> AggregateTask:
    """As the panel sends it."""
    asked = evaluate_task(study)
    evaluating = stage == "evaluate"
    return AggregateTask(
        study_digest=study.digest(),
        stage=stage,
        round=0,
        attempt=0,
        teacher={},
        student=asked.student if evaluating else {},
        scaling=asked.scaling if evaluating else torch.zeros(0, 2),
    )


def length_of(study: Study, stage: str) -> int:
    return 2 * study.evaluation.bins if stage == "evaluate" else moment_count(study.dictionary)


def summed(study: Study, stage: str, link: Direct) -> tuple[np.ndarray, float, int]:
    """The decoded sum, its noise, and how many hospitals are in it, through the panel."""
    panel = panel_of(study, link)
    if stage == "statistics":
        found = panel.moments()
        return found.sums.double().numpy().ravel(), found.noise_std, found.hospitals
    (one,) = panel.histograms(evaluate_task(study))
    return one.counts.double().numpy().ravel(), one.noise_std, len(one.hospitals)


def plain(study: Study, stage: str, hospitals: list[Hospital]) -> np.ndarray:
    """The same sum, patient by patient, by other means."""
    total = np.zeros(length_of(study, stage))
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    for hospital in hospitals:
        if stage == "evaluate":
            student = build_student(study, features)
            logits = answer(student, features.encode(hospital.test))
            for logit, label in zip(logits, hospital.test.labels, strict=True):
                score = float(torch.sigmoid(logit.double()))
                total[label * BINS + min(int(score * BINS), BINS - 1)] += 1
        else:
            for row in range(len(hospital.train)):
                for at, column in enumerate(study.dictionary.columns):
                    low, high = column.range or (0.0, 0.0)
                    value = hospital.train.values[column.name][row]
                    if not np.isnan(value):
                        scaled = 2 * (min(max(value, low), high) - low) / (high - low) - 1
                        total[3 * at : 3 * at + 3] += (scaled, scaled**2, 1)
    return total


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hospital adds noise."""
    monkeypatch.setattr(
        encoding, "skellam", lambda _stream, count, _variance: np.zeros(count, dtype=np.int64)
    )


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("stage", ["statistics", "evaluate"])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gone=st.none() | st.tuples(st.integers(0, HOSPITALS - 1), st.integers(0, 4)))
def test_without_noise_the_sum_is_the_plain_sum(
    study: Study, stage: str, gone: tuple[int, int] | None
) -> None:
    """Whoever vanishes, at whichever step, the sum is exactly that of the vectors that arrived."""
    _, hospitals = opened(study)
    names = [one.name for one in hospitals]
    link = Direct(hospitals, lambda name, _, step: gone == (names.index(name), step))
    found, _, count = summed(study, stage, link)
    # Whoever masked its vector before it vanished is in the sum.
    inside = [
        one for at, one in enumerate(hospitals) if not (gone and gone[0] == at and gone[1] < 3)
    ]
    assert count == len(inside)
    expected = plain(study, stage, inside)
    if stage == "evaluate":
        np.testing.assert_array_equal(found, expected)
    else:
        scale = encoding_of(study, stage, len(found)).scale
        patients = sum(len(one.train) for one in inside)
        np.testing.assert_allclose(found, expected, atol=patients / scale, rtol=1e-6)


@pytest.mark.parametrize("stage", ["statistics", "evaluate"])
@pytest.mark.parametrize("lost", [False, True])
def test_the_sum_carries_the_planned_noise(study: Study, stage: str, lost: bool) -> None:
    """χ² on what is left when the plain sum is taken away; a tenth more or less is rejected."""
    drawn: list[np.ndarray] = []
    stated = set()
    for seed in range(2000 // length_of(study, stage)):
        _, hospitals = opened(study, seed)
        gone = hospitals[seed % HOSPITALS].name if lost else ""
        inside = [one for one in hospitals if one.name != gone]
        link = Direct(hospitals, lambda name, _, step, gone=gone: name == gone and step == 2)
        found, noise_std, count = summed(study, stage, link)
        assert count == len(inside)
        stated.add(noise_std)
        drawn.append((found - plain(study, stage, inside)) / noise_std)
    (noise_std,) = stated
    # The honest few that must survive carry all that the patients were promised.
    plan = stage_charge(study, stage).plan
    honest = HONEST if lost else HONEST + 1
    assert noise_std / ((honest + 1) / HONEST) ** 0.5 >= plan.noise_std

    def is_planned(factor: float) -> bool:
        values = np.concatenate(drawn) / factor**0.5
        low, high = stats.chi2.ppf([5e-5, 1 - 5e-5], len(values))
        return bool(low < (values**2).sum() < high)

    assert is_planned(1.0)
    for wrong in (0.8, 1.25):
        assert not is_planned(wrong)


def integers(hospital: Hospital, stage: str, rows: Table) -> np.ndarray:
    """A hospital's integers before noise, of these rows."""
    study = hospital.study
    made = summand_of(hospital, task_of(study, stage))
    how = encoding_of(study, stage, made.length)
    return made.integers(rows, how, SeededNoise(0, "none").stream("unused"))


@pytest.mark.parametrize("stage", ["statistics", "evaluate"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.sampled_from([0.0, 1.0, -4.0, 4.0, 1e300, -1e300, np.nan, 0.333]),
    records=st.integers(1, 30), label=st.integers(0, 1), others=st.integers(0, 30),
)  # fmt: skip
def test_one_patient_moves_the_integers_by_no_more_than_is_charged(
    study: Study, stage: str, value: float, records: int, label: int, others: int
) -> None:  # fmt: skip
    """Added or removed: the encoding's sensitivity. Exchanged for another: twice that."""
    _, hospitals = opened(study)
    hospital = hospitals[0]
    source = hospital.test if stage == "evaluate" else hospital.train
    base = source.take(np.arange(others))
    intruder = replace(
        source.take(np.zeros(records, np.int64)),
        values={name: np.full(records, value) for name in source.values},
        labels=np.full(records, label),
        patients=np.array(["intruder"] * records, dtype=object),
    )
    joined = replace(
        base,
        values={name: np.append(base.values[name], intruder.values[name]) for name in base.values},
        labels=np.append(base.labels, intruder.labels),
        patients=np.append(base.patients, intruder.patients),
    )
    bound = encoding_of(study, stage, length_of(study, stage)).l2_sensitivity
    without, within = integers(hospital, stage, base), integers(hospital, stage, joined)
    assert np.linalg.norm(within - without) <= bound
    exchanged = integers(hospital, stage, source.take(np.arange(others + 1)))
    assert np.linalg.norm(within - exchanged) <= 2 * bound


@pytest.mark.parametrize("stage", ["statistics", "evaluate"])
@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("spare", [0, 2])
def test_what_is_charged_covers_the_integers(
    study: Study, stage: str, relation: Relation, spare: int
) -> None:
    """The Gaussian behind the integers is at least the plan's, and all attempts keep the ε."""
    study = study.revised(privacy__relation=relation, privacy__spare_attempts=spare)
    how = encoding_of(study, stage, length_of(study, stage))
    charge = stage_charge(study, stage)
    event, distance = how.charge()
    assert event.noise_multiplier >= charge.plan.noise_multiplier
    assert how.clip_norm == charge.plan.clip_norm
    assert how.noise_std(HONEST) == pytest.approx(how.variance**0.5 / how.scale)
    budget = evaluation_budget_of(study) if stage == "evaluate" else budget_of(study)
    assert budget is not None
    assert budget.epsilon is not None
    assert budget.delta is not None
    # Every round, and every failed attempt, of every stage that these patients pay for.
    releases = sum(one.rounds for one in budget.charges) + spare * len(budget.spare)
    assert budget.distance >= (1 + np.exp(budget.epsilon)) * distance * releases
    whole = [event for one in budget.charges for event in one.events()]
    for failed in budget.charges:
        events = whole + list(failed.events(spare))
        spent = epsilon(events, delta=budget.delta - budget.distance, relation=relation)
        assert spent <= budget.epsilon


def test_spare_attempts_are_budgeted_for_whichever_sum_fails(study: Study) -> None:
    """The statistics may cost more than a training step: a spare step would not pay for them."""
    spare = study.revised(privacy__spare_attempts=3, privacy__statistics_share=0.9)
    budget = budget_of(spare)
    assert budget.charge("statistics").plan.noise_multiplier < budget.noise_multiplier
    assert [one.stage for one in budget.spare] == [
        "failed attempts (finetune)",
        "failed attempts (statistics)",
    ]
    for charge, one in zip((budget.charges[1], budget.charges[0]), budget.spare, strict=True):
        assert one.plan == charge.plan
        assert one.rounds == 3
    graded, fine = evaluation_budget_of(spare), evaluation_budget_of(study)
    assert graded is not None
    assert fine is not None
    assert graded.charge("evaluate").plan.noise_multiplier == pytest.approx(
        2 * fine.charge("evaluate").plan.noise_multiplier, rel=5e-3
    )


@pytest.mark.parametrize("stage", ["statistics", "evaluate"])
def test_every_attempt_is_charged_to_its_patients_and_no_more_than_budgeted(
    study: Study, stage: str
) -> None:
    spare = study.revised(privacy__spare_attempts=1)
    _, hospitals = opened(spare)
    gone = {hospitals[0].name, hospitals[1].name}
    failed: list[int] = []

    def lose(name: str, action: str, step: int) -> bool:
        if action == "aggregate.begin" and name == hospitals[0].name:
            failed.append(1)
        return name in gone and len(failed) == 1 and step == 2

    _, _, count = summed(spare, stage, Direct(hospitals, lose))
    assert count == HOSPITALS
    guard = hospitals[4].guard
    assert isinstance(guard, MemoryGuard)
    pools = [pool for _, pool, _ in guard._charged]
    assert pools == ["test" if stage == "evaluate" else "train"] * 2
    assert set(guard._charged.values()) == {stage_charge(spare, stage).events(1)}
    # A further attempt is refused by every hospital's own gate.
    aggregator = hospitals[4].aggregator
    assert aggregator is not None
    if stage == "evaluate":
        made = summand_of(hospitals[4], task_of(spare, stage))
        how = encoding_of(spare, stage, made.length)
        with pytest.raises(RefusalError, match="the study promised"):
            aggregation._vector(hospitals[4], replace(task_of(spare, stage), attempt=2), made, how)


@pytest.mark.parametrize("stage", ["statistics", "evaluate"])
def test_the_gate_counts_at_the_delta_that_is_left(
    study: Study, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is set aside for Skellam noise cannot be spent a second time."""
    asked: list[Release] = []
    real = MemoryGuard.release

    def heard(guard: MemoryGuard, one: Release, compute: Any) -> torch.Tensor:
        asked.append(one)
        return real(guard, one, compute)

    monkeypatch.setattr(MemoryGuard, "release", heard)
    _, hospitals = opened(study)
    summed(study, stage, Direct(hospitals))
    budget = evaluation_budget_of(study) if stage == "evaluate" else budget_of(study)
    assert budget is not None
    for one in asked:
        assert (one.epsilon, one.delta) == (budget.epsilon, budget.delta)
        assert one.distance == budget.distance > 0
        refuse_beyond_study([], one)
        with pytest.raises(RefusalError, match="the study promised"):
            refuse_beyond_study(
                [event for charge in budget.charges for event in charge.events()],
                replace(one, events=(), distance=one.delta * (1 - 1e-6)),  # type: ignore[operator]
            )


@pytest.mark.parametrize("stage", ["statistics", "evaluate"])
def test_an_attempt_gets_no_second_vector(study: Study, stage: str) -> None:
    _, hospitals = opened(study)
    summed(study, stage, Direct(hospitals))
    for one in hospitals:
        assert one.aggregator is not None
        one.aggregator.attempts = MemoryAttempts()
    with pytest.raises(RunError, match=f"{stage} round 0: no secure sum"):
        summed(study, stage, Direct(hospitals))


def test_nothing_leaves_alone(study: Study) -> None:
    _, hospitals = opened(study)
    with pytest.raises(RefusalError, match="inside a secure sum only"):
        rounds.statistics(hospitals[0], StatisticsTask(study_digest=study.digest(), attempt=0))
    with pytest.raises(RefusalError, match="inside a secure sum only"):
        rounds.evaluate(hospitals[0], evaluate_task(study))


@pytest.mark.parametrize("trust", ["local", "distributed"])
@pytest.mark.parametrize("stage", ["statistics", "evaluate"])
def test_no_training_step_is_charged_as_another_stage(study: Study, stage: str, trust: str) -> None:
    """Its noise, its clip norm and its patients would be those of the other."""
    if trust == "local":
        study = study.revised(privacy__trust="local", federation__hospitals=None)
    _, hospitals = opened(study)
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    task = TrainTask(
        study_digest=study.digest(),
        stage=stage,
        round=0,
        attempt=0,
        teacher=dict(build_teacher(study, features).state_dict()),
        student=dict(build_student(study, features).state_dict()),
        scaling=scaling_tensor(study.dictionary, features.scaling),
    )
    with pytest.raises(RefusalError, match=f"no charged stage '{stage}' of training"):
        rounds.train(hospitals[0], task)


def test_sums_that_nobody_charged_are_refused(study: Study) -> None:
    bare = study.revised(scaling="ranges", evaluation__epsilon=None)
    _, hospitals = opened(bare)
    aggregator = hospitals[0].aggregator
    assert aggregator is not None
    for stage in ("statistics", "evaluate", "pretrain", "../finetune"):
        with pytest.raises(RefusalError, match="no charged stage|no secure sum"):
            aggregator.begin(hospitals[0], task_of(bare, stage))
    _, hospitals = opened(study)
    for changes in ({"round": 1}, {"round": -1}):
        with pytest.raises(RefusalError, match="rounds 0 to 0"):
            summand_of(hospitals[0], replace(task_of(study, "evaluate"), **changes))


def test_every_sum_has_terms_of_its_own(study: Study) -> None:
    task = task_of(study, "evaluate")
    how = Encoding(
        length=40, clip_norm=1.0, scale=2.0**12, hospitals=6, threshold=5, colluders=1,
        noise_multiplier=4.0,
    )  # fmt: skip
    name, tensor = next(iter(task.student.items()))
    others = [
        *(replace(task, stage=one) for one in STAGES if one != "evaluate"),
        replace(task, round=1),
        replace(task, attempt=1),
        replace(task, student=task.student | {name: tensor + 1e-6}),
        replace(task, scaling=task.scaling * (1 + 1e-6)),
    ]
    digests = {terms_of(study, one, how).digest for one in (task, *others)}
    digests.add(terms_of(study, task, replace(how, noise_multiplier=4.1)).digest)
    digests.add(terms_of(study.revised(evaluation__bins=10), task, how).digest)
    assert len(digests) == len(others) + 3


def test_a_hospital_that_was_sent_another_student_is_not_in_the_sum(study: Study) -> None:
    _, hospitals = opened(study)
    link, real = Direct(hospitals), Direct.ask_each

    def other(action: str, tasks: dict[str, object], kind: type) -> object:
        task = tasks.get(hospitals[0].name)
        if isinstance(task, AggregateTask):
            changed = {name: one + 1.0 for name, one in task.student.items()}
            tasks = tasks | {hospitals[0].name: replace(task, student=changed)}
        return real(link, action, tasks, kind)

    link.ask_each = other  # type: ignore[method-assign,assignment]
    _, _, count = summed(study, "evaluate", link)
    assert count == HOSPITALS - 1


def test_sums_that_cannot_be_encoded_are_refused_before_anything_is_spent(
    study: Study, tmp_path: Path
) -> None:
    loud = study.revised(
        privacy__epsilon=0.5,
        federation__hospitals=300,
        simulation__hospitals=300,
        evaluation__epsilon=8.0,
    )
    with pytest.raises(StudyError, match="evaluate: 300 hospitals' sums"):
        conduct(loud, Direct([]), RunFolder(tmp_path), None, lambda _: None)


def test_a_whole_study_says_what_it_released(study: Study, tmp_path: Path) -> None:
    """Result, statement, summary and report speak of one histogram, and of no hospital's own."""
    run = simulate(study, tmp_path / "run", Path(), lambda _: None, noise_seed=3)
    result = run.read_json("result.json")
    (one,) = result["evaluation"]
    assert one["hospitals"] == result["hospitals"]
    assert np.shape(one["counts"]) == (2, BINS)
    _, hospitals = load_hospitals(run.path)
    tested = sum(len(set(one.test.patients)) for one in hospitals)
    noise_std = one["noise_std"]
    assert abs(np.sum(one["counts"]) - tested) < 5 * noise_std * (2 * BINS) ** 0.5
    # Each hospital's noise alone would have been far more.
    alone = stage_charge(study, "evaluate").plan.noise_std * HOSPITALS**0.5
    assert noise_std == pytest.approx(alone / HONEST**0.5, rel=0.01)
    statement = run.read_json("privacy.json")
    assert [(row["stage"], row["patients"]) for row in statement["charges"]] == [
        ("statistics", "training"),
        ("finetune", "training"),
        ("evaluate", "testing"),
    ]
    assert statement["released"].startswith("The noised sums over all hospitals")
    summary = summarise(run)
    assert summary["released"]["auc"] is not None
    assert summary["released_from"].startswith("one noised histogram of all hospitals")
    page = write_run_report(run.path).read_text()
    assert "one noised histogram of all hospitals&#x27; test patients together" in page
    assert {line["stage"] for line in run.metrics()} >= {"statistics", "finetune"}
