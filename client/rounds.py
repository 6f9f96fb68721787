"""What a hospital does when asked. Each answer is public, or noised and charged."""

from __future__ import annotations

import torch
from torch import Tensor

from client.guard import Release, request_digest
from client.hospital import Hospital, records_of, rows_digest, units_of
from common.errors import RefusalError
from common.features import FeatureMap, moment_contributions, scaling_from_tensor
from common.learning import loop
from common.learning.evaluate import answer
from common.learning.gradients import (
    Loss,
    choose_engine,
    plain_gradient,
    private_gradient,
)
from common.learning.loop import Gradient
from common.learning.metrics import score_histogram
from common.learning.records import Records
from common.models import Student, Teacher, build_student, build_teacher
from common.privacy.budget import (
    Charge,
    budget_of,
    evaluation_budget_of,
    evaluation_charge,
    stage_charge,
)
from common.privacy.plan import StepPlan, combine_records
from common.privacy.units import Trust
from common.randomness import Stream
from common.study import OptimiserSpec, Study
from common.tables import Table
from common.tasks import task_named
from common.tensors import digest_tensors, get_vector
from common.wire import (
    AggregateTask,
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
    """One noised sum of bounded moments per numeric column, charged to the training patients."""
    check_same_study(hospital, task.study_digest)
    charge = charge_of(hospital, "statistics", 0)
    _check_leaves_alone(hospital.study)
    table = hospital.admitted(hospital.train, 0)
    _, units = units_of(table, hospital.study.privacy.unit)

    def compute(stream: Stream) -> Tensor:
        return _noised_sum(charge.plan, moments_by_unit(hospital, table), stream)

    request = request_digest("statistics", task.study_digest, task.attempt)
    asked = release_of(hospital, charge, table, units, round_number=0, request=request)
    sums = hospital.guard.release(asked, compute)
    return StatisticsReply(hospital=hospital.name, sums=sums.reshape(-1, 3))


def train(hospital: Hospital, task: TrainTask) -> TrainReply:
    """One round of local steps; the reply holds only how noised gradients moved the weights."""
    study = hospital.study
    check_same_study(hospital, task.study_digest)
    if task.stage not in ("finetune", "distill"):
        raise RefusalError(f"refused: the study has no charged stage {task.stage!r} of training")
    charge = charge_of(hospital, task.stage, task.round)
    _check_leaves_alone(study)
    table = hospital.admitted(hospital.train, task.round)
    model, loss, records = learning_task(hospital, task, table)
    start = get_vector(model)

    def compute(stream: Stream) -> Tensor:
        final = _local_steps(
            model,
            loss,
            records,
            charge,
            optimiser_of(study, task.stage),
            start,
            round_number=task.round,
            declared=hospital.declared_patients,
            stream=stream,
            proximal_mu=study.federation.proximal_mu,
        )
        return final - start

    request = request_digest(
        "train",
        task.study_digest,
        task.stage,
        task.round,
        task.attempt,
        digest_tensors(task.teacher),
        digest_tensors(task.student),
        digest_tensors({"scaling": task.scaling}),
    )
    asked = release_of(
        hospital, charge, table, records.units, round_number=task.round, request=request
    )
    update = hospital.guard.release(asked, compute)
    return TrainReply(hospital=hospital.name, stage=task.stage, round=task.round, update=update)


def learning_task(
    hospital: Hospital, task: TrainTask | AggregateTask, table: Table
) -> tuple[Teacher | Student, Loss, Records]:
    """The model that learns in this stage, its loss, and the records with their targets."""
    study = hospital.study
    features = features_of(study, task.scaling)
    records = records_of(table, features, study.privacy.unit)
    model = learner(study, features, task)
    if task.stage == "finetune":
        return model, task_named(study.task).loss, records
    records, loss = taught_records(study, load_teacher(study, features, task.teacher), records)
    return model, loss, records


def learner(
    study: Study, features: FeatureMap, task: TrainTask | AggregateTask
) -> Teacher | Student:
    """The model that learns in this stage, as it was sent: the teacher, then the student."""
    if task.stage == "finetune":
        return freeze_for_finetune(study, load_teacher(study, features, task.teacher))
    return load_student(study, features, task.student)


def optimiser_of(study: Study, stage: str) -> OptimiserSpec:
    """The optimiser of a stage on patients."""
    return study.finetune.optimiser if stage == "finetune" else study.distill.optimiser


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
    classes = len(study.dictionary.label.classes)
    return EvaluateReply(hospital=hospital.name, histogram=histogram.reshape(classes, -1))


def moments_by_unit(hospital: Hospital, table: Table) -> Tensor:
    """Each unit's mean moments of the numeric columns [units, 3 · columns]."""
    owners, units = units_of(table, hospital.study.privacy.unit)
    return combine_records(moment_contributions(table), torch.from_numpy(owners), units)


def scores_by_unit(
    hospital: Hospital, student: Student, features: FeatureMap, table: Table
) -> Tensor:
    """Each unit's part in the histogram of scores by label [units, classes · bins]."""
    study = hospital.study
    owners, _ = units_of(table, study.privacy.unit)
    answers = answer(student, features.encode(table))
    probabilities = task_named(study.task).probabilities(answers).double().numpy()
    each = score_histogram(table.labels, probabilities, owners, study.evaluation.bins)
    return torch.from_numpy(each)


def _noised_sum(plan: StepPlan, each: Tensor, stream: Stream) -> Tensor:
    """The releasable sum [d] of contributions [units, d]; without privacy the plain one."""
    return plan.noised(plan.clipped_sum(each), stream) if plan.private else each.sum(dim=0)


def features_of(study: Study, scaling: Tensor) -> FeatureMap:
    """The study's inputs under the ``scaling`` that was sent; raises MessageError on another."""
    return FeatureMap(study.dictionary, scaling_from_tensor(study.dictionary, scaling))


def load_teacher(study: Study, features: FeatureMap, tensors: dict[str, Tensor]) -> Teacher:
    """The teacher with these weights."""
    teacher = build_teacher(study, features)
    teacher.load_state_dict(tensors, strict=True)
    return teacher


def load_student(study: Study, features: FeatureMap, tensors: dict[str, Tensor]) -> Student:
    """The student with these weights."""
    student = build_student(study, features)
    student.load_state_dict(tensors, strict=True)
    return student


def freeze_for_finetune(study: Study, teacher: Teacher) -> Teacher:
    """Only what the study trains keeps learning."""
    teacher.encoder.requires_grad_(study.finetune.trainable == "all")
    return teacher


def taught_records(study: Study, teacher: Teacher, records: Records) -> tuple[Records, Loss]:
    """The same records with the teacher's answers as targets, and the distillation loss."""
    task, temperature = task_named(study.task), study.distill.temperature
    taught = Records(records.inputs, answer(teacher, records.inputs), records.owners, records.units)

    def loss(answers: Tensor, targets: Tensor) -> Tensor:
        return task.distill_loss(answers, targets, temperature)

    return taught, loss


def _local_steps(
    model: Teacher | Student,
    loss: Loss,
    records: Records,
    charge: Charge,
    spec: OptimiserSpec,
    start: Tensor,
    *,
    round_number: int,
    declared: int,
    stream: Stream,
    proximal_mu: float,
) -> Tensor:
    """The weights after this round's local steps."""
    expected_units = declared * charge.plan.sampling_rate
    gradient: Gradient
    if charge.plan.private:
        gradient = private_gradient(
            choose_engine(model, loss, records),
            records,
            charge.plan,
            expected_units=expected_units,
            stream=stream,
        )
    else:
        gradient = plain_gradient(
            model, loss, records, charge.plan, expected_units=expected_units, stream=stream
        )
    if proximal_mu:
        # FedProx (Li et al. 2020, eq. 2): + μ/2 ‖w − w₀‖², which no patient enters.
        inner = gradient

        def gradient(weights: Tensor) -> Tensor:
            return inner(weights) + proximal_mu * (weights - start)

    return loop.run(
        start,
        gradient,
        spec,
        steps=charge.steps_per_round,
        first_step=round_number * charge.steps_per_round,
        total_steps=charge.rounds * charge.steps_per_round,
    )


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


def charge_of(hospital: Hospital, stage: str, round_number: int) -> Charge:
    """The stage's charge from the hospital's own copy of the study; σ is never taken on trust."""
    try:
        charge = stage_charge(hospital.study, stage)
    except KeyError:
        raise RefusalError(f"refused: the study has no charged stage {stage!r}") from None
    if not 0 <= round_number < charge.rounds:
        raise RefusalError(
            f"refused: {stage} has rounds 0 to {charge.rounds - 1}, found round {round_number}"
        )
    return charge


def release_of(
    hospital: Hospital, charge: Charge, table: Table, units: int, *, round_number: int, request: str
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
        request=request,
        rows=rows_digest(table),
        pool="test" if testing else "train",
        trust=study.privacy.trust.value,
        unit=study.privacy.unit,
        relation=study.privacy.relation,
        records_per_patient=plan.records_per_unit,
        events=charge.events(1),
        patients=tuple(dict.fromkeys(table.patients)),
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
