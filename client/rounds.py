"""What a hospital does when asked. Each answer is public, or noised and charged."""

from __future__ import annotations

import torch
from torch import Tensor

from client.hospital import Hospital, units_of
from common.errors import RefusalError
from common.features import FeatureMap, moment_contributions, scaling_from_tensor
from common.learning import loop
from common.learning.evaluate import answer, charged_histogram
from common.learning.gradients import (
    Loss,
    choose_engine,
    plain_gradient,
    private_gradient,
)
from common.learning.loop import Gradient
from common.learning.records import Records
from common.models import Student, Teacher, build_student, build_teacher
from common.privacy.budget import Charge, budget_of
from common.privacy.plan import combine_records
from common.randomness import Stream
from common.study import OptimiserSpec, Study
from common.tasks import task_named
from common.tensors import digest_tensors, get_vector
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
    _same_study(hospital, task.study_digest)
    return HelloReply(
        hospital=hospital.name,
        study_digest=hospital.study.digest(),
        declared_patients=hospital.declared_patients,
        secret_noise=hospital.noise.is_secret,
    )


def statistics(hospital: Hospital, task: StatisticsTask) -> StatisticsReply:
    """One noised sum of bounded moments per numeric column, charged to the training patients."""
    _same_study(hospital, task.study_digest)
    plan = _charge(hospital, "statistics", 0).plan
    owners, units = units_of(hospital.train, hospital.study.privacy.unit)
    _sound_delta(hospital, units)
    each = combine_records(moment_contributions(hospital.train), torch.from_numpy(owners), units)
    stream = hospital.noise.stream(
        "statistics", task.study_digest, task.attempt, hospital.cohort_digest
    )
    sums = plan.noised(plan.clipped_sum(each), stream) if plan.private else each.sum(dim=0)
    return StatisticsReply(hospital=hospital.name, sums=sums.reshape(-1, 3))


def train(hospital: Hospital, task: TrainTask) -> TrainReply:
    """One round of local steps; the reply holds only how noised gradients moved the weights."""
    study = hospital.study
    _same_study(hospital, task.study_digest)
    charge = _charge(hospital, task.stage, task.round)
    features = FeatureMap(study.dictionary, scaling_from_tensor(study.dictionary, task.scaling))
    records = hospital.training_records(features)
    _sound_delta(hospital, records.units)
    teacher = load_teacher(study, features, task.teacher)
    if task.stage == "finetune":
        model: Teacher | Student = freeze_for_finetune(study, teacher)
        loss: Loss = task_named(study.task).loss
        spec = study.finetune.optimiser
    else:
        model = load_student(study, features, task.student)
        records, loss = taught_records(study, teacher, records)
        spec = study.distill.optimiser
    stream = hospital.noise.stream(
        "train",
        task.study_digest,
        task.stage,
        task.round,
        task.attempt,
        digest_tensors(task.teacher),
        digest_tensors(task.student),
        digest_tensors({"scaling": task.scaling}),
        hospital.cohort_digest,
    )
    start = get_vector(model)
    final = _local_steps(
        model,
        loss,
        records,
        charge,
        spec,
        start,
        round_number=task.round,
        declared=hospital.declared_patients,
        stream=stream,
        proximal_mu=study.federation.proximal_mu,
    )
    return TrainReply(
        hospital=hospital.name, stage=task.stage, round=task.round, update=final - start
    )


def evaluate(hospital: Hospital, task: EvaluateTask) -> EvaluateReply:
    """Score the test patients. Leaves as a noised histogram, or not at all."""
    study = hospital.study
    _same_study(hospital, task.study_digest)
    nothing = EvaluateReply(hospital=hospital.name, histogram=torch.zeros(0, 0))
    if study.evaluation.epsilon is None:
        return nothing
    features = FeatureMap(study.dictionary, scaling_from_tensor(study.dictionary, task.scaling))
    student = load_student(study, features, task.student)
    probabilities = task_named(study.task).probabilities(
        answer(student, features.encode(hospital.test))
    )
    owners, units = units_of(hospital.test, study.privacy.unit)
    _sound_delta(hospital, units)
    stream = hospital.noise.stream(
        "evaluate",
        task.study_digest,
        digest_tensors(task.student),
        digest_tensors({"scaling": task.scaling}),
        hospital.cohort_digest,
    )
    histogram = charged_histogram(
        study, hospital.test.labels, probabilities.double().numpy(), owners, stream
    )
    return EvaluateReply(hospital=hospital.name, histogram=histogram)


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


def _same_study(hospital: Hospital, digest: str) -> None:
    if digest != hospital.study.digest():
        raise RefusalError(
            f"{hospital.name} refuses: expected the study it holds "
            f"({hospital.study.digest()[:12]}…), found another ({digest[:12]}…)"
        )


def _charge(hospital: Hospital, stage: str, round_number: int) -> Charge:
    """The stage's charge from the hospital's own copy of the study; σ is never taken on trust."""
    try:
        charge = budget_of(hospital.study).charge(stage)
    except KeyError:
        raise RefusalError(f"refused: the study has no charged stage {stage!r}") from None
    if not 0 <= round_number < charge.rounds:
        raise RefusalError(
            f"refused: {stage} has rounds 0 to {charge.rounds - 1}, found round {round_number}"
        )
    return charge


def _sound_delta(hospital: Hospital, units: int) -> None:
    """A δ of one in the cohort's size or more would allow publishing somebody whole."""
    delta = hospital.study.privacy.delta
    if delta is not None and delta * units >= 1:
        raise RefusalError(
            f"{hospital.name} refuses: expected δ below one divided by its number of patients, "
            f"found δ = {delta:g}; lower privacy.delta"
        )
