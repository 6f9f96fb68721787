"""The stacked engine: a round of many hospitals as a few batches.

A backend of the in-process grid (see ``grid``). Messages that ask hospitals to train are taken
together: each hospital is asked, charged and given its own noise as ever, and then their local
steps run as one, with weights [K, d] (see ``stacked``). Everything else, and whatever cannot be
stacked, goes to the one-by-one backend, with which the results agree to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from client.app import failure
from client.guard import MemoryGuard
from client.hospital import Hospital
from client.rounds import check_same_study, training_release, training_request, training_round
from client.training import Assignment
from common.errors import RefusalError
from common.flower import Unsent, unpack
from common.learning.gradients import Engine, GhostNorms
from common.learning.groups import Groups
from common.learning.loop import Gradient
from common.learning.records import Records
from common.place import beside, here, wide
from common.privacy.plan import StepPlan
from common.randomness import Stream
from common.study import Study
from common.tables import concatenate
from common.tensors import digest_tensors
from common.wire import TrainReply, TrainTask
from simulations.grid import Backend
from simulations.stacked import obstacle, stacked
from simulations.tiles import BATCH_BYTES, hospital_bytes, row_numbers, tiles

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """Everybody's records: ``inputs`` and ``targets`` [rows, …] of all hospitals in a row.

    ``records``: each node's part of them, and ``first``: its first row among them.
    """

    inputs: Tensor
    targets: Tensor
    records: dict[int, Records]
    first: dict[int, int]

    @cached_property
    def fills_up(self) -> bool:
        """Whether samples are filled up to one size: a row of a table costs less than moving it.

        Only where patients have one record each, whose order is then that of the rows.
        """
        table = self.inputs.dim() == 2 and self.inputs.is_floating_point()
        return table and all(one.one_each for one in self.records.values())


@dataclass(frozen=True)
class Round:
    """What all batches of a round share."""

    assignment: Assignment
    cohort: Cohort

    @cached_property
    def engine(self) -> Engine:
        """Checked once: gives clipped sums, whether patients have one record or several."""
        made = GhostNorms(self.assignment.model, self.assignment.loss)
        made.check(self.cohort.inputs)
        return made

    def bytes_of(self, node: int) -> int:
        """What a hospital takes in a batch."""
        weights, records = self.assignment.start.numel(), self.cohort.records[node]
        rows = len(records.inputs) * records.views
        return hospital_bytes(weights, self._row_numbers, rows, self.assignment.charge.plan)

    @cached_property
    def _row_numbers(self) -> int:
        return row_numbers(self.assignment.model, self.cohort.inputs[:1])


@dataclass(frozen=True)
class Lane:
    """One hospital in a batch: its node, what it declares, and its noise of this release."""

    node: int
    declared: int
    stream: Stream


class StackedEngine:
    """A backend over ``hospitals``, of which node 1 is the first.

    ``one_by_one`` answers what is not stacked. ``memory_bytes``: a batch takes no more, where the
    cache would hold more; results then agree with others to rounding only. ``debug`` lets the first
    failure through.
    """

    def __init__(
        self,
        hospitals: Sequence[Hospital],
        one_by_one: Backend,
        *,
        memory_bytes: int | None = None,
        debug: bool = False,
    ) -> None:
        self._hospitals = hospitals
        self._one_by_one = one_by_one
        self._batch_bytes = min(BATCH_BYTES, memory_bytes or BATCH_BYTES)
        self._debug = debug
        self._cohort: tuple[str, Cohort] | None = None
        self._said: set[str] = set()

    def __call__(self, messages: list[Message]) -> Iterator[Message]:
        """A reply to each message."""
        alike = groupby(messages, key=lambda one: (one.metadata.message_type, id(one.content)))
        for (kind, _), batch in alike:
            yield from (self._train if kind == "train" else self._one_by_one)(list(batch))

    def _train(self, messages: list[Message]) -> Iterator[Message]:
        first = self._hospital(messages[0])
        task = unpack(TrainTask, messages[0].content)
        try:
            check_same_study(first, task.study_digest)
            assignment = training_round(first.study, task)
        except RefusalError:
            yield from self._one_by_one(messages)  # each hospital refuses for itself
            return
        reason = self._unlike(messages, assignment.study)
        if not reason:
            round_ = Round(assignment, self._encoded(assignment, task))
            reason = obstacle(assignment.model, round_.cohort.inputs)
        if reason:
            self._say_once(reason)
            yield from self._one_by_one(messages)
            return
        request = training_request(task)
        # Whatever the order of the messages, the same hospitals share a batch.
        messages = sorted(messages, key=lambda one: one.metadata.dst_node_id)
        nodes = [one.metadata.dst_node_id for one in messages]
        for tile in tiles([round_.bytes_of(node) for node in nodes], self._batch_bytes):
            given = self._together(round_, nodes[tile], request)
            for message, one in zip(messages[tile], given, strict=True):
                if isinstance(one, TrainReply):
                    yield Unsent(one, reply_to=message)
                else:
                    yield Message(failure(one), reply_to=message)

    def _together(
        self, round_: Round, nodes: Sequence[int], request: str
    ) -> Iterator[TrainReply | Exception]:
        """What each hospital of one batch answers; one that refuses is left out of it."""
        assignment = round_.assignment
        lanes: dict[int, Lane] = {}
        refusals: dict[int, Exception] = {}
        for node in nodes:
            hospital = self._hospitals[node - 1]
            assert isinstance(hospital.guard, MemoryGuard)  # noqa: S101  (see _unlike)
            units = round_.cohort.records[node].units
            try:
                asked = training_release(hospital, assignment, hospital.train, units, request)
                stream = hospital.guard.charge(asked)
            except Exception as error:  # as its own app would: it fails alone
                if self._debug:
                    raise
                refusals[node] = error
            else:
                lanes[node] = Lane(node, hospital.declared_patients, stream)
        updates = dict(zip(lanes, updates_of(round_, list(lanes.values())), strict=True))
        for node in nodes:
            yield (
                refusals[node]
                if node in refusals
                else TrainReply(
                    hospital=self._hospitals[node - 1].name,
                    stage=assignment.stage,
                    round=assignment.round,
                    update=updates[node],
                )
            )

    def _unlike(self, messages: list[Message], study: Study) -> str | None:
        """Why these hospitals cannot be taken together; None when they can."""
        hospitals = [self._hospital(message) for message in messages]
        if any(one.study is not study for one in hospitals):
            return "hospitals hold different copies of the study"
        if any(not isinstance(one.guard, MemoryGuard) for one in hospitals):
            return "hospitals keep ledgers of their own"
        return None

    def _encoded(self, assignment: Assignment, task: TrainTask) -> Cohort:
        """Everybody's records, encoded once a stage."""
        key = f"{assignment.stage} {digest_tensors({'scaling': task.scaling})}"
        if assignment.teacher is not None:
            key += digest_tensors(task.teacher)
        if assignment.encoder is not None:
            key += digest_tensors(assignment.encoder.encoder.state_dict())
        if self._cohort is None or self._cohort[0] != key:
            self._cohort = (key, encode_together(assignment, self._hospitals))
        return self._cohort[1]

    def _hospital(self, message: Message) -> Hospital:
        return self._hospitals[message.metadata.dst_node_id - 1]

    def _say_once(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _logger.warning("one by one, not stacked: %s", reason)


def encode_together(assignment: Assignment, hospitals: Sequence[Hospital]) -> Cohort:
    """The training records of ``hospitals`` (node 1 is the first), encoded as one table."""
    inputs, targets = assignment.pairs(concatenate([one.train for one in hospitals]))
    records, first, start = {}, {}, 0
    for node, hospital in enumerate(hospitals, start=1):
        stop = start + len(hospital.train)
        records[node] = assignment.grouped(hospital.train, inputs[start:stop], targets[start:stop])
        first[node], start = start, stop
    return Cohort(inputs, targets, records, first)


def updates_of(round_: Round, lanes: Sequence[Lane]) -> Tensor:
    """How each hospital's local steps move its weights [K, d]; all steps taken together."""
    assignment = round_.assignment
    if not lanes:
        return assignment.start[None][:0]
    if len(lanes) == 1:  # too large to share a batch: it is taken in parts
        (lane,) = lanes
        records = round_.cohort.records[lane.node]
        return assignment.update(records, lane.declared, lane.stream)[None]
    gradient = (_private if assignment.charge.plan.private else _plain)(round_, lanes)
    start = assignment.start.expand(len(lanes), -1)
    return assignment.descend(gradient, start).sub_(assignment.start)


@dataclass(frozen=True)
class Batch:
    """The records of one step of all lanes.

    ``owners`` [rows]: units, counted over all lanes. ``present`` [units]: False where a unit only
    fills its lane up; None where all are real.
    """

    inputs: Tensor
    targets: Tensor
    owners: Tensor
    rows: Groups
    units: Groups
    present: Tensor | None = None


def draw(round_: Round, lanes: Sequence[Lane]) -> Batch:
    """One Poisson sample of each lane, from its own stream, in the order of the twin's draws."""
    how = _draw_even if round_.cohort.fills_up else _draw_ragged
    return how(round_.assignment.charge.plan, round_.cohort, lanes)


def _draw_ragged(plan: StepPlan, cohort: Cohort, lanes: Sequence[Lane]) -> Batch:
    seen, chosen, owned, rows_each, units_each, before = [], [], [], [], [], 0
    for lane in lanes:
        records = cohort.records[lane.node]
        units = plan.sample(lane.stream, records.units)
        rows, owners = records.rows_of(units, plan.records_per_unit, lane.stream)
        seen.append(records.look(rows, lane.stream))
        chosen.append(rows + cohort.first[lane.node])
        owned.append(owners + before)
        rows_each.append(len(rows))
        units_each.append(len(units))
        before += len(units)
    rows = torch.cat(chosen)
    return Batch(
        inputs=torch.cat(seen),
        targets=cohort.targets[rows],
        owners=torch.cat(owned),
        rows=Groups(tuple(rows_each)),
        units=Groups(tuple(units_each)),
    )


def _draw_even(plan: StepPlan, cohort: Cohort, lanes: Sequence[Lane]) -> Batch:
    """The same, all at once, every lane filled up with empty records to the longest one."""
    units = np.array([cohort.records[lane.node].units for lane in lanes])
    drawn = np.flatnonzero(plan.sample_each([lane.stream for lane in lanes], units.tolist()))
    lane_of = np.repeat(np.arange(len(lanes)), units)[drawn]
    sizes = np.bincount(lane_of, minlength=len(lanes))
    longest = int(sizes.max())
    ahead = np.array([cohort.first[lane.node] for lane in lanes]) - (np.cumsum(units) - units)
    rows = torch.from_numpy(drawn + ahead[lane_of])
    rank = np.arange(len(drawn)) - (np.cumsum(sizes) - sizes)[lane_of]
    places = torch.from_numpy(lane_of * longest + rank)
    whole = len(lanes) * longest

    def filled(values: Tensor) -> Tensor:
        room = values.new_zeros(whole, *values.shape[1:])
        return room.index_copy_(0, places, values[rows])

    groups = Groups((longest,) * len(lanes))
    present = torch.zeros(whole).index_fill_(0, places, 1.0)
    owners = torch.arange(whole)
    return Batch(filled(cohort.inputs), filled(cohort.targets), owners, groups, groups, present)


def _private(round_: Round, lanes: Sequence[Lane]) -> Gradient:
    """Each lane's noised mean gradient [K, d] at its own weights."""
    plan, model, engine = round_.assignment.charge.plan, round_.assignment.model, round_.engine
    expected = _expected_units(plan, lanes)
    streams = [lane.stream for lane in lanes]

    def gradient(weights: Tensor) -> Tensor:
        batch = draw(round_, lanes)
        # One vector seen K times: the first step of a round, at the weights the model came with.
        apart = nullcontext() if weights.stride(0) == 0 else stacked(model, weights, batch.rows)
        with apart:
            sums = engine.clipped_sums(
                batch.inputs, batch.targets, batch.owners, batch.units, plan, batch.present
            )
        return plan.noised_each_(sums, streams).div_(expected)

    return gradient


def _plain(round_: Round, lanes: Sequence[Lane]) -> Gradient:
    """The same means without clip and noise, for the comparison."""
    expected = _expected_units(round_.assignment.charge.plan, lanes)
    model, loss = round_.assignment.model, round_.assignment.loss

    def gradient(weights: Tensor) -> Tensor:
        batch = draw(round_, lanes)
        if not batch.rows.rows:
            return torch.zeros_like(weights)
        share = 1.0 / torch.bincount(batch.owners)[batch.owners].float()
        if batch.present is not None:
            share = share * batch.present
        own = weights.detach().clone().requires_grad_()
        with stacked(model, own, batch.rows):
            inputs, targets, share = beside(model, batch.inputs, batch.targets, share)
            with here().passing():
                answers = model(inputs)
            losses = loss(wide(answers), targets)
        (found,) = torch.autograd.grad((losses * share).sum(), own)
        return found.div_(expected)

    return gradient


def _expected_units(plan: StepPlan, lanes: Sequence[Lane]) -> Tensor:
    """The public number each lane divides by [K, 1]."""
    return torch.tensor([[lane.declared * plan.sampling_rate] for lane in lanes])
