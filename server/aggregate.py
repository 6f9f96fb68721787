"""A noised sum out of secure aggregation: the coordinator sees no hospital's part of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import ConsiliumError, RunError, SecAggError
from common.identity import PublicIdentity
from common.secagg import Aggregate, ServerSession
from common.secagg.plan import encoding_of, terms_of
from common.study import Study
from common.wire import AggregateReply, AggregateStep, AggregateTask, HelloReply
from server.link import Link

_logger = logging.getLogger(__name__)

Attempts = Callable[[str, int, int], Iterator[int]]
"""Stage, round, how many: the numbers of the next attempts (see ``RunFolder.attempts``)."""

_EXCHANGES = 4  # roster, delivery, survivors, agreements; the adverts came before


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """``values`` [length]: the noised sum over the ``hospitals`` whose vectors arrived.

    ``noise_std``: of its noise, in every coordinate.
    """

    values: Tensor
    hospitals: tuple[str, ...]
    noise_std: float


def secure_sum(
    study: Study,
    link: Link,
    task: AggregateTask,
    members: Mapping[str, HelloReply],
    length: int,
    attempts: Attempts,
) -> SecureSum:
    """The hospitals' noised sum [length] of what ``task`` asks for.

    A failed attempt is repeated as often as the study has budgeted (``spare_attempts``);
    ``attempts`` numbers them. What earlier ones have cost, every hospital knows for itself. Raises
    RunError when too few remain.
    """
    # A hospital without an identity takes part in no sum; the others go on without it.
    pinned = {
        name: PublicIdentity.from_text(one.identity)
        for name, one in members.items()
        if one.identity
    }
    encoding = encoding_of(study, task.stage, length)
    for attempt in attempts(task.stage, task.round, study.privacy.spare_attempts + 1):
        tried = replace(task, attempt=attempt)
        session = ServerSession(terms=terms_of(study, tried, encoding), pinned=pinned)
        try:
            found = _exchange(link, session, tried)
        except SecAggError as error:
            _logger.warning("%s round %d, attempt %d: %s", task.stage, task.round, attempt, error)
            continue
        return SecureSum(
            values=torch.from_numpy(encoding.decode(found.values)),
            hospitals=found.survivors,
            noise_std=encoding.noise_std(len(found.survivors)),
        )
    raise RunError(
        f"{task.stage} round {task.round}: no secure sum in {study.privacy.spare_attempts + 1} "
        f"attempts; the run stopped after its last finished round and can be resumed"
    )


def _exchange(link: Link, session: ServerSession, task: AggregateTask) -> Aggregate:
    _receive(session, link.ask("aggregate.begin", task, AggregateReply))
    for _ in range(_EXCHANGES):
        tasks = {
            name: AggregateStep(
                study_digest=task.study_digest,
                stage=task.stage,
                round=task.round,
                attempt=task.attempt,
                message=message,
            )
            for name, message in session.advance().items()
        }
        _receive(session, link.ask_each("aggregate.step", tasks, AggregateReply))
    return session.finish()


def _receive(session: ServerSession, replies: Iterator[AggregateReply]) -> None:
    """Take in what is sound; a hospital that sends anything else counts as silent."""
    for reply in replies:
        try:
            session.receive(reply.message)
        except ConsiliumError as error:
            _logger.warning("a hospital's message was set aside: %s", error)
