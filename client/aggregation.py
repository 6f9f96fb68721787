"""A hospital's part in a secure sum: its protocol sessions, and the vector they hide.

The vector is computed, noised and charged only when the protocol asks for it, after the hospital
has verified who else takes part and under which terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from client.guard import request_digest
from client.hospital import Hospital
from client.rounds import charge_of, check_same_study, learning_task, release_of
from common.errors import RefusalError
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


@dataclass(frozen=True)
class _Open:
    task: TrainTask
    encoding: Encoding
    session: ClientSession


@dataclass
class Aggregator:
    """What a hospital needs to take part: its identity, the enrolled others, and open sessions."""

    identity: Identity
    pinned: Pinned
    policy: AggregationPolicy = AggregationPolicy()
    attempts: Attempts = field(default_factory=MemoryAttempts)
    _open: dict[tuple[str, int], _Open] = field(default_factory=dict)

    def begin(self, hospital: Hospital, task: TrainTask) -> AggregateReply:
        """Open a session under this hospital's own reading of the terms; its Advert."""
        study = hospital.study
        check_same_study(hospital, task.study_digest)
        charge_of(hospital, task.stage, task.round)
        model, _, _ = learning_task(hospital, task, hospital.train)
        encoding = encoding_of(study, task.stage, get_vector(model).numel())
        session = ClientSession(
            name=hospital.name,
            identity=self.identity,
            terms=terms_of(study, task, encoding),
            policy=self.policy,
            pinned=self.pinned,
            attempts=self.attempts,
        )
        advert = session.advertise()
        # A new attempt or round ends whatever was open of the stage.
        self._open = {(task.stage, task.round): _Open(task, encoding, session)}
        return AggregateReply(hospital=hospital.name, message=advert)

    def step(self, hospital: Hospital, step: AggregateStep) -> AggregateReply:
        """Answer the coordinator's next message; the vector goes with the Delivery."""
        check_same_study(hospital, step.study_digest)
        found = self._open.get((step.stage, step.round))
        if found is None or found.task.attempt != step.attempt:
            raise RefusalError(
                f"secagg.attempt: no open attempt {step.attempt} at {step.stage} "
                f"round {step.round}",
                rule="secagg.attempt",
            )
        vector = None
        if found.session.expects is Kind.DELIVERY:
            vector = _vector(hospital, found).numpy()
        return AggregateReply(
            hospital=hospital.name, message=found.session.answer(step.message, vector)
        )


def _vector(hospital: Hospital, opened: _Open) -> Tensor:
    """This hospital's noised integers [length] int32, charged before they are computed."""
    task, encoding = opened.task, opened.encoding
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
