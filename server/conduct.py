"""A study from beginning to end, as the coordinator conducts it.

Every finished round is a checkpoint; calling :func:`conduct` on an interrupted run continues it
to the result it would have had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import RunError
from common.features import (
    FeatureMap,
    Scaling,
    corpus_scaling,
    private_scaling,
    range_scaling,
    scaling_from_tensor,
    scaling_tensor,
)
from common.learning.distill import distill_publicly, records_from_dictionary
from common.learning.pretrain import pretrain
from common.models import Student, Teacher, build_student, build_teacher, count_parameters, learner
from common.place import here
from common.privacy.budget import Budget, budget_of
from common.secagg.plan import check_sums
from common.study import Study
from common.tables import Table
from common.tensors import get_vector, set_vector
from common.wire import (
    EvaluateTask,
    Hello,
    HelloReply,
    TrainTask,
)
from server import rules
from server.link import Link
from server.panel import Panel
from server.store import Checkpoint, RunFolder


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a study stands, for whoever watches."""

    stage: str
    round: int
    rounds: int
    hospitals: int
    epsilon: float | None
    elapsed_s: float
    eta_s: float | None  # to the end of this stage


@dataclass(frozen=True)
class Outcome:
    """What a finished study yields at the coordinator."""

    teacher: Teacher
    student: Student
    scaling: Scaling
    facts: dict[str, Any]


@dataclass
class Stopwatch:
    """Seconds since the last lap, by the wall and of this process's processors."""

    wall_s: float = field(default_factory=time.monotonic)
    cpu_s: float = field(default_factory=time.process_time)

    def lap(self) -> dict[str, float]:
        """What has passed; the next lap begins."""
        before, now = self, Stopwatch()
        passed = {
            "elapsed_s": round(now.wall_s - before.wall_s, 6),
            "cpu_s": round(now.cpu_s - before.cpu_s, 6),
        }
        self.wall_s, self.cpu_s = now.wall_s, now.cpu_s
        return passed


@dataclass(frozen=True)
class Conductor:
    """What stays the same over a whole study."""

    study: Study
    panel: Panel
    run: RunFolder
    budget: Budget
    watch: Callable[[Progress], None]
    started: float
    stopwatch: Stopwatch

    def note_hospitals(self, facts: dict[str, Any]) -> None:
        """Who took part so far, before an interruption as well, and whether all noise is secret."""
        members = self.panel.members
        facts["hospitals"] = sorted({*members, *facts.get("hospitals", ())})
        facts["secret_noise"] = facts.get("secret_noise", True) and all(
            one.secret_noise for one in members.values()
        )

    def report(
        self, stage: str, number: int, rounds: int, hospitals: int, eta_s: float | None = None
    ) -> None:
        """Tell whoever watches, and log the round."""
        spent = self.budget.spent(stage, number) if self._charged(stage) else None
        self.watch(
            Progress(
                stage=stage,
                round=number,
                rounds=rounds,
                hospitals=hospitals,
                epsilon=spent,
                elapsed_s=time.monotonic() - self.started,
                eta_s=eta_s,
            )
        )
        self.run.log({"stage": stage, "round": number, "hospitals": hospitals, "epsilon": spent})
        self.run.log_cost({"stage": stage, "round": number, **self.stopwatch.lap()})

    def _charged(self, stage: str) -> bool:
        return any(charge.stage == stage for charge in self.budget.charges)


def conduct(
    study: Study,
    link: Link,
    run: RunFolder,
    corpus: Table | None,
    watch: Callable[[Progress], None],
) -> Outcome:
    """Conduct ``study`` over ``link``; everything is kept in ``run``.

    ``corpus``: public records, or None when the study draws them from its dictionary.
    """
    budget = budget_of(study)
    check_sums(study)
    done = run.last_checkpoint()
    members = _members(study, link)
    panel = Panel(study, link, members, run.attempts)
    desk = Conductor(study, panel, run, budget, watch, time.monotonic(), Stopwatch())

    # As the hospitals receive it, in float32: all parties and a resumed run see the same inputs.
    moments = scaling_tensor(study.dictionary, _scaling(desk, corpus, done))
    scaling = scaling_from_tensor(study.dictionary, moments)
    features = FeatureMap(study.dictionary, scaling)
    public = public_inputs(study, features, corpus)
    teacher, student = build_teacher(study, features), build_student(study, features)
    facts: dict[str, Any] = dict(done.facts) if done else {}
    facts.pop("average_weight", None)
    facts |= {
        "device": str(here()),
        "teacher_parameters": count_parameters(teacher),
        "student_parameters": count_parameters(student),
    }
    desk.note_hospitals(facts)
    if done is None or done.stage == "statistics":
        loss = pretrain(study, teacher, features, public)
        facts["pretrain_loss"] = None if math.isnan(loss) else loss
        desk.report("pretrain", 1, 1, 0)
        run.checkpoint(_checkpoint("pretrain", 1, teacher, student, moments, facts))
    else:
        teacher.load_state_dict(_prefixed(done.tensors, "teacher"))
        student.load_state_dict(_prefixed(done.tensors, "student"))

    if done is None or done.stage in ("statistics", "pretrain", "finetune"):
        _charged_stage(
            desk,
            "finetune",
            teacher,
            student,
            learner(study, teacher),
            moments,
            facts,
            done if done and done.stage == "finetune" else None,
        )

    if study.distill.on == "public":
        if done is None or done.stage != "distill":
            facts["distill_loss"] = distill_publicly(study, teacher, student, public)
            desk.report("distill", 1, 1, 0)
            run.checkpoint(_checkpoint("distill", 1, teacher, student, moments, facts))
    else:
        _charged_stage(
            desk,
            "distill",
            teacher,
            student,
            student,
            moments,
            facts,
            done if done and done.stage == "distill" else None,
        )

    facts["evaluation"] = _evaluate(desk, student, moments)
    return Outcome(teacher, student, scaling, facts)


def _charged_stage(
    desk: Conductor,
    stage: str,
    teacher: Teacher,
    student: Student,
    model: nn.Module,
    moments: Tensor,
    facts: dict[str, Any],
    done: Checkpoint | None,
) -> None:
    """All rounds of ``stage``; ``model`` (of the teacher, or the student) holds the result."""
    charge = desk.budget.charge(stage)
    state = _rule_state(done) if done else rules.start(get_vector(model))
    first, began = done.round if done else 0, time.monotonic()
    for number in range(first, charge.rounds):
        desk.panel.welcome()
        desk.note_hospitals(facts)
        set_vector(model, state.weights)
        task = TrainTask(
            study_digest=desk.study.digest(),
            stage=stage,
            round=number,
            attempt=0,
            teacher=_state(teacher),
            student=_state(student),
            scaling=moments,
        )
        update, hospitals = desk.panel.update(task, state.weights.numel())
        state = rules.apply(
            desk.study.federation, state, update, round_number=number, rounds=charge.rounds
        )
        set_vector(model, state.weights)
        desk.run.save_round(stage, number + 1, state.weights)
        each_s = (time.monotonic() - began) / (number + 1 - first)
        desk.report(
            stage,
            number + 1,
            charge.rounds,
            hospitals,
            eta_s=each_s * (charge.rounds - number - 1),
        )
        if number + 1 < charge.rounds:
            desk.run.checkpoint(
                _checkpoint(stage, number + 1, teacher, student, moments, facts, state)
            )
    set_vector(model, rules.result(state))
    desk.run.save_round(stage, charge.rounds, rules.result(state))
    desk.run.checkpoint(
        _checkpoint(
            stage,
            charge.rounds,
            teacher,
            student,
            moments,
            facts,
            replace(state, weights=rules.result(state)),
        )
    )


def _members(study: Study, link: Link) -> dict[str, HelloReply]:
    """The hospitals that hold this study, by name."""
    digest = study.digest()
    replies = list(link.greet(Hello(study_digest=digest)))
    members = {
        one.hospital: one
        for one in replies
        if one.study_digest == digest and one.declared_patients > 0
    }
    if len(members) < len(replies):
        raise RunError(
            f"expected {len(replies)} hospitals with different names and a positive declared "
            f"size, found {len(members)}"
        )
    if len(members) < study.federation.minimum_hospitals:
        raise RunError(
            f"expected at least {study.federation.minimum_hospitals} hospitals, "
            f"found {len(members)}; wait for more or lower federation.minimum_hospitals"
        )
    return members


def _scaling(desk: Conductor, corpus: Table | None, done: Checkpoint | None) -> Scaling:
    study = desk.study
    if done is not None:
        return scaling_from_tensor(study.dictionary, done.tensors["scaling"])
    if study.scaling == "ranges":
        return range_scaling(study.dictionary)
    if study.scaling == "public":
        if corpus is None:
            raise RunError("scaling = 'public' needs the public corpus, found none")
        return corpus_scaling(corpus)
    found = desk.panel.moments()
    scaling = private_scaling(study.dictionary, found.sums, found.noise_std)
    desk.report("statistics", 1, 1, found.hospitals)
    desk.run.checkpoint(
        Checkpoint("statistics", 1, {"scaling": scaling_tensor(study.dictionary, scaling)}, {})
    )
    return scaling


def public_inputs(study: Study, features: FeatureMap, corpus: Table | None) -> Tensor:
    """The public records that pre-training and distillation see [rows, …]."""
    if corpus is not None:
        return features.encode(corpus)
    generator = torch.Generator().manual_seed(study.seed + 5)
    return records_from_dictionary(study.dictionary, features, study.public.records, generator)


def _evaluate(desk: Conductor, student: Student, moments: Tensor) -> list[dict[str, Any]]:
    """The noised histograms that are released; empty without an evaluation budget."""
    task = EvaluateTask(study_digest=desk.study.digest(), student=_state(student), scaling=moments)
    return [one.as_dict() for one in desk.panel.histograms(task)]


def _state(model: Teacher | Student) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _checkpoint(
    stage: str,
    number: int,
    teacher: Teacher,
    student: Student,
    moments: Tensor,
    facts: dict[str, Any],
    state: rules.RuleState | None = None,
) -> Checkpoint:
    tensors = {f"teacher/{name}": t for name, t in _state(teacher).items()}
    tensors |= {f"student/{name}": t for name, t in _state(student).items()}
    tensors["scaling"] = moments
    facts = dict(facts)
    if state is not None:
        tensors |= {
            "rule/weights": state.weights,
            "rule/first": state.first,
            "rule/second": state.second,
            "rule/average_sum": state.average_sum,
        }
        facts["average_weight"] = state.average_weight
    return Checkpoint(stage, number, tensors, facts)


def _rule_state(done: Checkpoint) -> rules.RuleState:
    rule = _prefixed(done.tensors, "rule")
    return rules.RuleState(
        rule["weights"],
        rule["first"],
        rule["second"],
        rule["average_sum"],
        float(done.facts["average_weight"]),
    )


def _prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix + "/"): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix + "/")
    }
