"""The hospitals of a study, and what they answer: one by one, or only in a secure sum.

Each question has one answer, whichever way it came: the coordinator's rules need not know.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.errors import RunError
from common.features import moment_count
from common.learning.optimisers import learning_rate_at
from common.privacy.budget import stage_charge
from common.privacy.units import Trust
from common.study import Study
from common.tasks import task_of
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
from server import rules
from server.aggregate import Attempts, SecureSum, secure_sum
from server.link import Link

Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Moments:
    """``sums`` [``moment_count``]: noised sums of what ``moment_contributions`` names.

    ``noise_std``: of their noise. ``hospitals``: how many are in them.
    """

    sums: Tensor
    noise_std: float
    hospitals: int


@dataclass(frozen=True)
class Histogram:
    """Noised ``counts`` [classes, bins] of test patients by label and score.

    ``hospitals``: whose patients are in it: one hospital's, or those of a whole secure sum.
    ``noise_std``: of the noise in every count.
    """

    hospitals: tuple[str, ...]
    counts: Tensor
    noise_std: float

    def as_dict(self) -> dict[str, Any]:
        """As plain data, as ``result.json`` keeps it."""
        return {
            "hospitals": list(self.hospitals),
            "counts": self.counts.tolist(),
            "noise_std": self.noise_std,
        }


def memory_attempts() -> Attempts:
    """Numbers of attempts as ``RunFolder.attempts`` gives them, while the process lives."""
    given: Counter[tuple[str, int]] = Counter()

    def attempts(stage: str, number: int, fresh: int) -> Iterator[int]:
        newest = given[stage, number]
        if newest:
            yield newest - 1
        for attempt in range(newest, newest + fresh):
            given[stage, number] = attempt + 1
            yield attempt

    return attempts


@dataclass(frozen=True)
class Panel:
    """The hospitals that take part (``members``, by name; more may come) and the ``link``.

    ``attempts``: see ``secure_sum``; a run that may be resumed passes its folder's.
    """

    study: Study
    link: Link
    members: dict[str, HelloReply]
    attempts: Attempts = field(default_factory=memory_attempts)

    def welcome(self) -> None:
        """Let hospitals that came, or came back, take part from now on."""
        digest = self.study.digest()
        for one in self.link.greet(Hello(study_digest=digest)):
            if one.study_digest == digest and one.declared_patients > 0:
                self.members[one.hospital] = one

    def update(self, task: TrainTask, weights: int) -> tuple[Tensor, int]:
        """A round's mean update [weights], and how many hospitals are in it."""
        if self._in_sums:
            return self._summed_step(task, weights)

        def fits(reply: TrainReply) -> bool:
            found = (reply.stage, reply.round, reply.update.shape)
            return found == (task.stage, task.round, (weights,))

        mean = rules.Accumulator.empty(weights)
        for reply in self._ask("train", task, TrainReply, fits):
            mean = mean.add(reply.update, self._weight(reply.hospital))
        return mean.mean(), mean.hospitals

    def moments(self) -> Moments:
        """What private scaling is made from, over all training patients."""
        length = moment_count(self.study.dictionary)
        if self._in_sums:
            found = self._secure_sum("statistics", length)
            return Moments(found.values.float(), found.noise_std, len(found.hospitals))
        task, shape = StatisticsTask(study_digest=self.study.digest(), attempt=0), (length,)
        running = rules.Accumulator.empty(length)
        for reply in self._ask(
            "statistics", task, StatisticsReply, lambda reply: reply.sums.shape == shape
        ):
            running = running.add(reply.sums, 1.0)
        noise_std = stage_charge(self.study, "statistics").plan.noise_std
        sums = running.total().float()
        return Moments(sums, noise_std * math.sqrt(running.hospitals), running.hospitals)

    def histograms(self, task: EvaluateTask) -> list[Histogram]:
        """Test patients' scores: one histogram a hospital, or a single one of all together.

        Empty when the study grants evaluation no budget: then nobody is asked.
        """
        study = self.study
        if study.evaluation.epsilon is None:
            return []
        shape = task_of(study).release_shape(study.evaluation.bins)
        if self._in_sums:
            found = self._secure_sum(
                "evaluate", math.prod(shape), student=task.student, scaling=task.scaling
            )
            counts = found.values.reshape(shape)
            return [Histogram(found.hospitals, counts, found.noise_std)]
        noise_std = stage_charge(study, "evaluate").plan.noise_std
        replies = self._ask(
            "evaluate", task, EvaluateReply, lambda reply: reply.histogram.shape == shape
        )
        return [
            Histogram((reply.hospital,), reply.histogram, noise_std)
            for reply in sorted(replies, key=lambda one: one.hospital)
        ]

    @property
    def _in_sums(self) -> bool:
        return self.study.privacy.trust is Trust.DISTRIBUTED

    def _summed_step(self, task: TrainTask, weights: int) -> tuple[Tensor, int]:
        """One step of plain descent on the noised sum of everybody's clipped gradients.

        Divided by public numbers: the same update as the declared-weighted mean of single steps.
        """
        found = self._secure_sum(
            task.stage,
            weights,
            round_number=task.round,
            teacher=task.teacher,
            student=task.student,
            scaling=task.scaling,
        )
        rate = stage_charge(self.study, task.stage).plan.sampling_rate
        declared = sum(self.members[name].declared_patients for name in found.hospitals)
        spec = self.study.training(task.stage)
        learning_rate = learning_rate_at(spec.optimiser, task.round, spec.rounds)
        update = found.values * (-learning_rate / (rate * declared))
        return update.float(), len(found.hospitals)

    def _secure_sum(
        self,
        stage: str,
        length: int,
        *,
        round_number: int = 0,
        teacher: dict[str, Tensor] | None = None,
        student: dict[str, Tensor] | None = None,
        scaling: Tensor | None = None,
    ) -> SecureSum:
        task = AggregateTask(
            study_digest=self.study.digest(),
            stage=stage,
            round=round_number,
            attempt=0,
            teacher=teacher or {},
            student=student or {},
            scaling=torch.zeros(0, 2) if scaling is None else scaling,
        )
        return secure_sum(self.study, self.link, task, self.members, length, self.attempts)

    def _ask(
        self, action: str, task: Any, kind: type[Reply], fits: Callable[[Reply], bool]
    ) -> Iterator[Reply]:
        """One fitting reply of each enrolled hospital; fewer than the study's minimum is an error.

        ``fits``: whether a reply answers this very task; others are left out.
        """
        answered: set[str] = set()
        for reply in self.link.ask(action, task, kind):
            name = reply.hospital  # type: ignore[attr-defined]
            if name in self.members and name not in answered and fits(reply):
                answered.add(name)
                yield reply
        if len(answered) < self.study.federation.minimum_hospitals:
            raise RunError(
                f"{action}: expected answers from at least "
                f"{self.study.federation.minimum_hospitals} hospitals, found {len(answered)}; "
                f"the run stopped after its last finished round and can be resumed"
            )

    def _weight(self, hospital: str) -> float:
        """The public weight of a hospital."""
        declared = self.study.federation.weighting == "declared"
        return float(self.members[hospital].declared_patients) if declared else 1.0
