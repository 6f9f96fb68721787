"""A round of training: what it asks of every hospital of the study, and one hospital's part in it.

An :class:`Assignment` holds nothing of any patient. It is read once from the coordinator's task
and the hospital's own copy of the study; a simulation reads it once for all its hospitals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from client.hospital import units_of
from common.errors import RefusalError
from common.features import FeatureMap, scaling_from_tensor
from common.learning import loop
from common.learning.capture import Loss
from common.learning.evaluate import answer, codes
from common.learning.gradients import choose_engine, plain_gradient, private_gradient
from common.learning.loop import Gradient
from common.learning.records import Records
from common.models import Student, Teacher, build_student, build_teacher, learner
from common.place import here
from common.privacy.budget import Charge, stage_charge
from common.randomness import Stream
from common.stages import OptimiserSpec
from common.study import Study
from common.tables import Table
from common.tasks import task_of
from common.tensors import get_vector
from common.wire import AggregateTask, TrainTask


@dataclass(frozen=True)
class Assignment:
    """One round of ``stage``: ``model`` learns from ``start`` [d] under ``charge``.

    ``encoder``: what turns records into what ``model`` sees, no part of which learns; None where
    the model sees the records themselves. ``teacher``: whose answers are the targets; None where
    the labels are.
    """

    study: Study
    stage: str
    round: int
    attempt: int
    charge: Charge
    features: FeatureMap
    model: nn.Module
    encoder: Teacher | None = None
    teacher: Teacher | None = None

    @cached_property
    def start(self) -> Tensor:
        """The weights that were sent [d]."""
        return get_vector(self.model)

    @property
    def loss(self) -> Loss:
        """Per-record losses: against labels, or against the teacher's answers."""
        task, temperature = task_of(self.study), self.study.distill.temperature
        if self.teacher is None:
            return task.loss
        return lambda answers, taught: task.distill_loss(answers, taught, temperature)

    @property
    def optimiser(self) -> OptimiserSpec:
        """The stage's optimiser."""
        return self.study.training(self.stage).optimiser

    def records(self, table: Table) -> Records:
        """Patients' records by privacy unit, each with what it is to be answered by."""
        inputs, targets = self.pairs(table)
        return self.grouped(table, inputs, targets)

    def grouped(self, table: Table, inputs: Tensor, targets: Tensor) -> Records:
        """The ``pairs`` of ``table`` by privacy unit, to be seen as the stage says."""
        owners, units = units_of(table, self.study.privacy.unit)
        records = Records(inputs, targets, torch.from_numpy(owners), units)
        if self.stage != "finetune":
            return records
        spec = self.study.finetune
        return replace(records, augment=spec.augment, views=spec.views)

    def pairs(self, table: Table) -> tuple[Tensor, Tensor]:
        """Inputs [rows, …] and targets [rows, …] of each row by itself."""
        inputs = self.features.encode(table)
        if self.teacher is not None:
            return inputs, answer(self.teacher, inputs)
        targets = task_of(self.study).targets(table.labels)
        return (inputs if self.encoder is None else codes(self.encoder, inputs)), targets

    def gradient(self, records: Records, declared: int, stream: Stream) -> Gradient:
        """Where one hospital's gradients come from; all its draws are from ``stream``."""
        plan = self.charge.plan
        expected_units = declared * plan.sampling_rate
        if plan.private:
            engine = choose_engine(self.model, self.loss, records)
            return private_gradient(
                engine, records, plan, expected_units=expected_units, stream=stream
            )
        return plain_gradient(
            self.model, self.loss, records, plan, expected_units=expected_units, stream=stream
        )

    def descend(self, gradient: Gradient, start: Tensor) -> Tensor:
        """The weights after this round's local steps from ``start``; [d], or [K, d] of many."""
        proximal_mu = self.study.federation.proximal_mu

        def pulled(weights: Tensor) -> Tensor:
            # FedProx (Li et al. 2020, eq. 2): + μ/2 ‖w − w₀‖², which no patient enters.
            return gradient(weights) + proximal_mu * (weights - start)

        steps = self.charge.steps_per_round
        return loop.run(
            start,
            pulled if proximal_mu else gradient,
            self.optimiser,
            steps=steps,
            first_step=self.round * steps,
            total_steps=self.charge.rounds * steps,
        )

    def update(self, records: Records, declared: int, stream: Stream) -> Tensor:
        """How one hospital's local steps move the weights [d]."""
        return self.descend(self.gradient(records, declared, stream), self.start) - self.start


def read_assignment(study: Study, task: TrainTask | AggregateTask) -> Assignment:
    """What ``task`` asks of a hospital that holds ``study``.

    Raises RefusalError for a stage or round the study does not charge; MessageError or
    RuntimeError where the models sent are not the study's.
    """
    if task.stage not in ("finetune", "distill"):
        raise RefusalError(f"refused: the study has no charged stage {task.stage!r} of training")
    charge = charge_of(study, task.stage, task.round)
    features = features_of(study, task.scaling)
    teacher = load_teacher(study, features, task.teacher)
    tuning = task.stage == "finetune"
    model = learner(study, teacher) if tuning else load_student(study, features, task.student)
    for one in (teacher, model):
        one.to(here().device)
    return Assignment(
        study=study,
        stage=task.stage,
        round=task.round,
        attempt=task.attempt,
        charge=charge,
        features=features,
        model=model,
        encoder=teacher if tuning and model is teacher.head else None,
        teacher=None if tuning else teacher,
    )


def charge_of(study: Study, stage: str, round_number: int) -> Charge:
    """The stage's charge from the hospital's own copy of the study; σ is never taken on trust."""
    try:
        charge = stage_charge(study, stage)
    except KeyError:
        raise RefusalError(f"refused: the study has no charged stage {stage!r}") from None
    if not 0 <= round_number < charge.rounds:
        raise RefusalError(
            f"refused: {stage} has rounds 0 to {charge.rounds - 1}, found round {round_number}"
        )
    return charge


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
