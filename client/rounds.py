"""What a hospital does when asked. Each answer is public, or noised and charged."""

from __future__ import annotations

import torch
from torch import Tensor

from client.guard import Release, request_digest
from client.hospital import Hospital, units_of
from client.training import Assignment, charge_of, features_of, load_student, read_assignment
from common.errors import RefusalError
from common.features import FeatureMap, moment_contributions
from common.learning.evaluate import predictions
from common.models import Student
from common.privacy.budget import Charge, budget_of, evaluation_budget_of, evaluation_charge
from common.privacy.plan import StepPlan, combine_records
from common.privacy.units import Trust
from common.randomness import Stream
from common.study import Study
from common.tables import Table
from common.tasks import task_of
from common.tensors import digest_tensors
from common.wire import (
    EvaluateReply,
    EvaluateTask,
    Hello,
    HelloReply,
    StatisticsReply,
    StatisticsTask,
    TrainReply,
    TrainTask,
)


def hello(hospital: Hospital, task: Hello) -> HelloReply:
    """Public facts only. Refuses a study this hospital does not hold."""
    check_same_study(hospital, task.study_digest)
    guard = hospital.guard
    return HelloReply(
        hospital=hospital.name,
        study_digest=hospital.study.digest(),
        declared_patients=hospital.declared_patients,
        secret_noise=guard.noise.is_secret and guard.is_lasting,
        identity=hospital.aggregator.identity.public.text() if hospital.aggregator else "",
    )


def statistics(hospital: Hospital, task: StatisticsTask) -> StatisticsReply:
    """One noised sum of bounded moments and of codes' buckets, charged to the training patients."""
    check_same_study(hospital, task.study_digest)
    charge = charge_of(hospital.study, "statistics", 0)
    _check_leaves_alone(hospital.study)
    table = hospital.admitted(hospital.train, 0)
    _, units = units_of(table, hospital.study.privacy.unit)

    def compute(stream: Stream) -> Tensor:
        return _noised_sum(charge.plan, moments_by_unit(hospital, table), stream)

    request = request_digest("statistics", task.study_digest, task.attempt)
    asked = release_of(
        hospital, charge, table, units, round_number=0, request=request, attempt=task.attempt
    )
    sums = hospital.guard.release(asked, compute)
    return StatisticsReply(hospital=hospital.name, sums=sums)


def train(hospital: Hospital, task: TrainTask) -> TrainReply:
    """One round of local steps; the reply holds only how noised gradients moved the weights."""
    check_same_study(hospital, task.study_digest)
    assignment = training_round(hospital.study, task)
    table = hospital.admitted(hospital.train, task.round)
    records = assignment.records(table)
    asked = training_release(hospital, assignment, table, records.units, training_request(task))
    update = hospital.guard.release(
        asked, lambda stream: assignment.update(records, hospital.declared_patients, stream)
    )
    return TrainReply(hospital=hospital.name, stage=task.stage, round=task.round, update=update)


def training_round(study: Study, task: TrainTask) -> Assignment:
    """What ``task`` asks of every hospital; refused where only sums may be read."""
    assignment = read_assignment(study, task)
    _check_leaves_alone(study)
    return assignment


def training_request(task: TrainTask) -> str:
    """Digest of all that a round's releases depend on, their rows excepted."""
    return request_digest(
        "train",
        task.study_digest,
        task.stage,
        task.round,
        task.attempt,
        digest_tensors(task.teacher),
        digest_tensors(task.student),
        digest_tensors({"scaling": task.scaling}),
    )


def training_release(
    hospital: Hospital, assignment: Assignment, table: Table, units: int, request: str
) -> Release:
    """The facts on which the hospital's guard decides whether its update may leave."""
    return release_of(
        hospital,
        assignment.charge,
        table,
        units,
        round_number=assignment.round,
        request=request,
        attempt=assignment.attempt,
    )


def evaluate(hospital: Hospital, task: EvaluateTask) -> EvaluateReply:
    """Score the test patients. Leaves as a noised histogram, or not at all."""
    study = hospital.study
    check_same_study(hospital, task.study_digest)
    charge = evaluation_charge(study)
    if charge is None:
        return EvaluateReply(hospital=hospital.name, histogram=torch.zeros(0, 0))
    _check_leaves_alone(study)
    features = features_of(study, task.scaling)
    student = load_student(study, features, task.student)
    table = hospital.admitted(hospital.test, 0)
    _, units = units_of(table, study.privacy.unit)

    def compute(stream: Stream) -> Tensor:
        each = scores_by_unit(hospital, student, features, table)
        return _noised_sum(charge.plan, each, stream).float()

    request = request_digest(
        "evaluate",
        task.study_digest,
        digest_tensors(task.student),
        digest_tensors({"scaling": task.scaling}),
    )
    asked = release_of(hospital, charge, table, units, round_number=0, request=request)
    histogram = hospital.guard.release(asked, compute)
    shape = task_of(study).release_shape(study.evaluation.bins)
    return EvaluateReply(hospital=hospital.name, histogram=histogram.reshape(shape))


def moments_by_unit(hospital: Hospital, table: Table) -> Tensor:
    """What each unit adds to the scaling, the mean of its records [units, ``moment_count``]."""
    owners, units = units_of(table, hospital.study.privacy.unit)
    return combine_records(moment_contributions(table), torch.from_numpy(owners), units)


def scores_by_unit(
    hospital: Hospital, student: Student, features: FeatureMap, table: Table
) -> Tensor:
    """Each unit's part in what is released of the evaluation [units, length]."""
    study = hospital.study
    owners, _ = units_of(table, study.privacy.unit)
    task = task_of(study)
    found = predictions(task, student, features.encode(table))
    each = task.contributions(table.labels, found, owners, study.evaluation.bins)
    return torch.from_numpy(each)


def _noised_sum(plan: StepPlan, each: Tensor, stream: Stream) -> Tensor:
    """The releasable sum [d] of contributions [units, d]; without privacy the plain one."""
    return plan.noised(plan.clipped_sum(each), stream) if plan.private else each.sum(dim=0)


def _check_leaves_alone(study: Study) -> None:
    """Refuse to answer alone where only sums may be read."""
    if study.privacy.trust is Trust.DISTRIBUTED:
        raise RefusalError(
            "release.trust: what this study asks of patients leaves inside a secure sum only",
            rule="release.trust",
        )


def check_same_study(hospital: Hospital, digest: str) -> None:
    """Refuse a request about a study this hospital does not hold."""
    if digest != hospital.study.digest():
        raise RefusalError(
            f"{hospital.name} refuses: expected the study it holds "
            f"({hospital.study.digest()[:12]}…), found another ({digest[:12]}…)"
        )


def release_of(
    hospital: Hospital,
    charge: Charge,
    table: Table,
    units: int,
    *,
    round_number: int,
    request: str,
    attempt: int = 0,
) -> Release:
    """The facts on which the hospital's guard decides."""
    study, plan = hospital.study, charge.plan
    _sound_delta(hospital, units)
    testing = charge.stage == "evaluate"
    budget = evaluation_budget_of(study) if testing else budget_of(study)
    assert budget is not None  # noqa: S101  (its charge was found)
    return Release(
        study=study.name,
        study_digest=study.digest(),
        task=study.task,
        stage=charge.stage,
        round=round_number,
        attempt=attempt,
        request=request,
        rows=table.digest,
        pool="test" if testing else "train",
        trust=study.privacy.trust.value,
        unit=study.privacy.unit,
        relation=study.privacy.relation,
        records_per_patient=plan.records_per_unit,
        events=charge.events(1),
        patients=tuple(table.by_patient[0]),
        # The round fails below the study's minimum, so that many others take part.
        peers=study.federation.minimum_hospitals - 1,
        epsilon=budget.epsilon,
        delta=budget.delta,
        distance=budget.distance,
    )


def _sound_delta(hospital: Hospital, units: int) -> None:
    """A δ of one in the cohort's size or more would allow publishing somebody whole."""
    delta = hospital.study.privacy.delta
    if delta is not None and delta * units >= 1:
        raise RefusalError(
            f"{hospital.name} refuses: expected δ below one divided by its number of patients, "
            f"found δ = {delta:g}; lower privacy.delta"
        )
