"""A hospital's part in a secure sum: its protocol sessions, and the vector they hide.

The vector is computed, noised and charged only when the protocol asks for it, after the hospital
has verified who else takes part and under which terms.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from client.guard import request_digest
from client.hospital import Hospital, units_of
from client.rounds import check_same_study, release_of
from client.summands import Summand, summand_of
from common.errors import ConsiliumError, RefusalError
from common.identity import Identity
from common.randomness import Stream
from common.secagg import AggregationPolicy, Attempts, ClientSession, Kind, MemoryAttempts
from common.secagg.encoding import Encoding
from common.secagg.plan import encoding_of, terms_of
from common.secagg.terms import Pinned
from common.wire import AggregateReply, AggregateStep, AggregateTask


class Sessions(Protocol):
    """Where open sessions wait for the coordinator's next message."""

    def save(self, task: AggregateTask, frozen: bytes) -> None:
        """Keep a new session; it takes the place of an older one of the same round."""
        ...

    def update(self, task: AggregateTask, frozen: bytes) -> None:
        """Keep its state after a step."""
        ...

    def load(self, stage: str, round_number: int) -> tuple[AggregateTask, bytes] | None:
        """The task that began it, and its state."""
        ...

    def forget(self, stage: str, round_number: int) -> None:
        """It is over."""
        ...


@dataclass
class MemorySessions:
    """Sessions that end with the process: for simulations."""

    _open: dict[tuple[str, int], tuple[AggregateTask, bytes]] = field(default_factory=dict)

    def save(self, task: AggregateTask, frozen: bytes) -> None:
        """See ``Sessions``."""
        self._open = {(task.stage, task.round): (task, frozen)}

    def update(self, task: AggregateTask, frozen: bytes) -> None:
        """See ``Sessions``."""
        self._open[task.stage, task.round] = (task, frozen)

    def load(self, stage: str, round_number: int) -> tuple[AggregateTask, bytes] | None:
        """See ``Sessions``."""
        return self._open.get((stage, round_number))

    def forget(self, stage: str, round_number: int) -> None:
        """See ``Sessions``."""
        self._open.pop((stage, round_number), None)


@dataclass
class Aggregator:
    """What a hospital needs to take part: its identity, the enrolled others, and its memory.

    ``entropy(n)``: n secret bytes, for keys and masks.
    """

    identity: Identity
    pinned: Pinned
    policy: AggregationPolicy = AggregationPolicy()
    attempts: Attempts = field(default_factory=MemoryAttempts)
    sessions: Sessions = field(default_factory=MemorySessions)
    entropy: Callable[[int], bytes] = secrets.token_bytes

    def begin(self, hospital: Hospital, task: AggregateTask) -> AggregateReply:
        """Open a session under this hospital's own reading of the terms; its Advert."""
        check_same_study(hospital, task.study_digest)
        summand = summand_of(hospital, task)
        encoding = encoding_of(hospital.study, task.stage, summand.length)
        session = self._session(hospital, task, encoding)
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
        summand = summand_of(hospital, task)
        encoding = encoding_of(hospital.study, task.stage, summand.length)
        session = self._session(hospital, task, encoding).thaw(frozen)
        vector = None
        try:
            if session.expects is Kind.DELIVERY:
                vector = _vector(hospital, task, summand, encoding).numpy()
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

    def _session(
        self, hospital: Hospital, task: AggregateTask, encoding: Encoding
    ) -> ClientSession:
        return ClientSession(
            name=hospital.name,
            identity=self.identity,
            terms=terms_of(hospital.study, task, encoding),
            policy=self.policy,
            pinned=self.pinned,
            attempts=self.attempts,
            entropy=self.entropy,
        )


def _vector(
    hospital: Hospital, task: AggregateTask, summand: Summand, encoding: Encoding
) -> Tensor:
    """This hospital's noised integers [length] int32, charged before they are computed."""
    table = hospital.admitted(summand.rows, task.round)
    _, units = units_of(table, hospital.study.privacy.unit)

    def compute(stream: Stream) -> Tensor:
        total = summand.integers(table, encoding, stream)
        return torch.from_numpy(encoding.finish(total, stream))

    terms = terms_of(hospital.study, task, encoding)
    asked = release_of(
        hospital,
        summand.charge,
        table,
        units,
        round_number=task.round,
        attempt=task.attempt,
        request=request_digest("aggregate", terms.digest.hex()),
    )
    # Two sums of one round differ by a hospital's vector: each attempt has noise, and cost, of its
    # own, because the attempt is part of the terms.
    return hospital.guard.release(replace(asked, peers=encoding.threshold - 1, once=True), compute)
