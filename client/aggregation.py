"""A hospital's part in a secure sum: its protocol sessions, and the vector they hide.

The vector is computed, noised and charged only when the protocol asks for it, after the hospital
has verified who else takes part and under which terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from client.guard import request_digest
from client.hospital import Hospital
from client.rounds import (
    charge_of,
    check_same_study,
    learner,
    learning_task,
    release_of,
)
from common.errors import ConsiliumError, RefusalError
from common.features import FeatureMap, scaling_from_tensor
from common.identity import Identity
from common.learning.gradients import PerRecordGradients
from common.privacy.plan import combine_records
from common.randomness import Stream
from common.secagg import AggregationPolicy, Attempts, ClientSession, Kind, MemoryAttempts
from common.secagg.encoding import Encoding
from common.secagg.plan import encoding_of, terms_of
from common.secagg.terms import Pinned
from common.tensors import get_vector
from common.wire import AggregateReply, AggregateStep, TrainTask

# Per-record gradients of at most so many numbers are held at once (float32: 32 MiB).
_CHUNK_NUMBERS = 8 * 2**20


class Sessions(Protocol):
    """Where open sessions wait for the coordinator's next message."""

    def save(self, task: TrainTask, frozen: bytes) -> None:
        """Keep a new session; it takes the place of an older one of the same round."""
        ...

    def update(self, task: TrainTask, frozen: bytes) -> None:
        """Keep its state after a step."""
        ...

    def load(self, stage: str, round_number: int) -> tuple[TrainTask, bytes] | None:
        """The task that began it, and its state."""
        ...

    def forget(self, stage: str, round_number: int) -> None:
        """It is over."""
        ...


@dataclass
class MemorySessions:
    """Sessions that end with the process: for simulations."""

    _open: dict[tuple[str, int], tuple[TrainTask, bytes]] = field(default_factory=dict)

    def save(self, task: TrainTask, frozen: bytes) -> None:
        """See ``Sessions``."""
        self._open = {(task.stage, task.round): (task, frozen)}

    def update(self, task: TrainTask, frozen: bytes) -> None:
        """See ``Sessions``."""
        self._open[task.stage, task.round] = (task, frozen)

    def load(self, stage: str, round_number: int) -> tuple[TrainTask, bytes] | None:
        """See ``Sessions``."""
        return self._open.get((stage, round_number))

    def forget(self, stage: str, round_number: int) -> None:
        """See ``Sessions``."""
        self._open.pop((stage, round_number), None)


@dataclass
class Aggregator:
    """What a hospital needs to take part: its identity, the enrolled others, and its memory."""

    identity: Identity
    pinned: Pinned
    policy: AggregationPolicy = AggregationPolicy()
    attempts: Attempts = field(default_factory=MemoryAttempts)
    sessions: Sessions = field(default_factory=MemorySessions)

    def begin(self, hospital: Hospital, task: TrainTask) -> AggregateReply:
        """Open a session under this hospital's own reading of the terms; its Advert."""
        check_same_study(hospital, task.study_digest)
        charge_of(hospital, task.stage, task.round)
        session = self._session(hospital, task, _encoding(hospital, task))
        advert = session.advertise()
        self.sessions.save(task, session.freeze())
        return AggregateReply(hospital=hospital.name, message=advert)

    def step(self, hospital: Hospital, step: AggregateStep) -> AggregateReply:
        """Answer the coordinator's next message; the vector goes with the Delivery."""
        check_same_study(hospital, step.study_digest)
        found = self.sessions.load(step.stage, step.round)
        if found is None or found[0].attempt != step.attempt:
            raise RefusalError(
                f"secagg.attempt: no open attempt {step.attempt} at {step.stage} "
                f"round {step.round}",
                rule="secagg.attempt",
            )
        task, frozen = found
        encoding = _encoding(hospital, task)
        session = self._session(hospital, task, encoding).thaw(frozen)
        vector = None
        try:
            if session.expects is Kind.DELIVERY:
                vector = _vector(hospital, task, encoding).numpy()
            answer = session.answer(step.message, vector)
        except ConsiliumError:
            # The first message that breaks a rule ends the attempt for good.
            self.sessions.forget(step.stage, step.round)
            raise
        if session.expects is None:
            self.sessions.forget(step.stage, step.round)
        else:
            self.sessions.update(task, session.freeze())
        return AggregateReply(hospital=hospital.name, message=answer)

    def _session(self, hospital: Hospital, task: TrainTask, encoding: Encoding) -> ClientSession:
        return ClientSession(
            name=hospital.name,
            identity=self.identity,
            terms=terms_of(hospital.study, task, encoding),
            policy=self.policy,
            pinned=self.pinned,
            attempts=self.attempts,
        )


def _encoding(hospital: Hospital, task: TrainTask) -> Encoding:
    study = hospital.study
    features = FeatureMap(study.dictionary, scaling_from_tensor(study.dictionary, task.scaling))
    size = get_vector(learner(study, features, task)).numel()
    return encoding_of(study, task.stage, size)


def _vector(hospital: Hospital, task: TrainTask, encoding: Encoding) -> Tensor:
    """This hospital's noised integers [length] int32, charged before they are computed."""
    study = hospital.study
    charge = charge_of(hospital, task.stage, task.round)
    table = hospital.admitted(hospital.train, task.round)
    model, loss, records = learning_task(hospital, task, table)
    plan, weights = charge.plan, get_vector(model)

    def compute(stream: Stream) -> Tensor:
        each = PerRecordGradients(model, loss)
        units = plan.sample(stream, records.units)
        total = torch.zeros(encoding.length, dtype=torch.int64).numpy()
        at_once = max(1, _CHUNK_NUMBERS // (encoding.length * plan.records_per_unit))
        for chunk in torch.split(units, at_once):
            rows, owners = records.rows_of(chunk, plan.records_per_unit, stream)
            if len(rows):
                gradients = each(weights, records.inputs[rows], records.targets[rows])
                total += encoding.encode(combine_records(gradients, owners, len(chunk)).numpy())
        return torch.from_numpy(encoding.finish(total, stream))

    terms = terms_of(study, task, encoding)
    asked = release_of(
        hospital,
        charge,
        table,
        records.units,
        round_number=task.round,
        request=request_digest("aggregate", terms.digest.hex()),
    )
    # Two sums of one round differ by a hospital's vector: each attempt has noise, and cost, of its
    # own, because the attempt is part of the terms.
    return hospital.guard.release(replace(asked, peers=encoding.threshold - 1, once=True), compute)
