"""What must hold after every event, whatever failed before it.

The witness stands outside the code it watches: it reads each hospital's ledger through a
connection of its own, sees every message as it leaves a hospital, every draw of noise before it is
made and every vector a gate let through, and the results the coordinator believes.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.guard import Release
from client.ledger_records import parse_entry
from common.privacy.accounting import GaussianEvent, epsilon
from common.privacy.budget import budget_of, evaluation_budget_of, stage_charge
from common.privacy.units import Trust
from common.secagg.messages import Kind, kind_of
from common.secagg.plan import encoding_of
from common.study import Study
from common.wire import (
    AggregateReply,
    AggregateStep,
    AggregateTask,
    EvaluateReply,
    EvaluateTask,
    StatisticsReply,
    StatisticsTask,
    TrainReply,
    TrainTask,
)
from simulations.fault_knowledge import Eavesdropper

Step = tuple[str, int]
"""A stage and its round: what one release is about."""

_TOLERANCE = 1e-4  # of float32 sums in any order, of which two differ by noise, so by far more
_SLACK = 1e-9


class ViolationError(Exception):
    """An invariant is broken: the simulator's finding."""


def step_of(task: Any) -> Step:
    """What a request is about."""
    if isinstance(task, StatisticsTask):
        return "statistics", 0
    if isinstance(task, EvaluateTask):
        return "evaluate", 0
    return task.stage, task.round


class LedgerReader:
    """One hospital's charges as its disk holds them, through a connection of our own."""

    def __init__(self, path: Path) -> None:
        """``path``: of ``ledger.db``."""
        self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        self._last = 0
        self.has_lost = False
        self.charges: Counter[Step] = Counter()
        self.events: dict[str, list[GaussianEvent]] = {"train": [], "test": []}

    def refresh(self) -> None:
        """Read what was charged since."""
        count, last = self._db.execute(
            "SELECT count(*), coalesce(max(id), 0) FROM entry"
        ).fetchone()
        self.has_lost = self.has_lost or count < self.charges.total()
        if last == self._last:
            return
        for row in self._db.execute(
            "SELECT id, cohort, facts, '' FROM entry WHERE id > ? ORDER BY id", (self._last,)
        ):
            entry = parse_entry(*row)
            self.charges[entry.stage, entry.round] += 1
            pool = "test" if entry.stage == "evaluate" else "train"
            self.events[pool] += entry.declared
        self._last = last

    def has_release(self, step: Step) -> bool:
        """Whether a release of this step is stored, to be given again."""
        return any(
            (facts["stage"], facts["round"]) == step
            for (text,) in self._db.execute(
                "SELECT facts FROM entry JOIN release ON release.entry = entry.id"
            )
            for facts in [json.loads(text)]
        )

    def close(self) -> None:
        """Release the file."""
        self._db.close()


@dataclass
class Observer:
    """The witness of one run. ``broken`` collects what it finds; ``check`` raises it.

    ``declared``: the size that every hospital declares. ``touched``: hospitals that were at work
    since the last check. ``asked``: the coordinator's newest request
    of each step; ``attempts``: those it has made at each sum.
    """

    study: Study
    declared: int
    readers: dict[str, LedgerReader] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    asked: dict[Step, Any] = field(default_factory=dict)
    newest: Step = ("hello", 0)
    attempts: dict[Step, set[int]] = field(default_factory=lambda: defaultdict(set))
    _wire: Eavesdropper = field(init=False)
    _payloads: dict[tuple[str, Step], set[bytes]] = field(default_factory=lambda: defaultdict(set))
    _draws: dict[str, Counter[Step]] = field(default_factory=lambda: defaultdict(Counter))
    _contexts: dict[str, set[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(set))
    _values: dict[Step, dict[str, dict[str, list[Tensor]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Listen to the wire."""
        federation = self.study.federation
        enrolled = federation.hospitals or 0
        self._wire = Eavesdropper(threshold=enrolled - federation.tolerated_dropouts)

    def check(self) -> None:
        """Raise ViolationError if anything is broken; after every event."""
        if self.broken:
            raise ViolationError(self.broken[0])
        for name in self.touched:
            reader = self.readers[name]
            reader.refresh()
            if reader.has_lost:
                raise ViolationError(f"the ledger of {name} lost a charge")
            self._within_promise(name, reader)
        self.touched.clear()

    def asks(self, task: Any) -> None:
        """The coordinator sends a request."""
        if isinstance(task, (AggregateTask, TrainTask, StatisticsTask, EvaluateTask)):
            self.newest = step_of(task)
            self.asked[self.newest] = task
            if isinstance(task, AggregateTask):
                self.attempts[step_of(task)].add(task.attempt)

    def draws(self, name: str, context: Sequence[Any]) -> None:
        """A hospital is about to draw noise: it must be paid for, and never be used again."""
        step = (str(context[0]), int(context[1]))
        self._draws[name][step] += 1
        if tuple(context) in self._contexts[name]:
            self._breaks(f"{name} draws the same noise twice for {step[0]} round {step[1]}")
        self._contexts[name].add(tuple(context))
        if self._draws[name][step] > self._charges(name)[step]:
            self._breaks(f"{name} draws noise for {step[0]} round {step[1]} before it is charged")

    def released(self, name: str, asked: Release, value: Tensor) -> None:
        """A hospital's gate let ``value`` through."""
        step = (asked.stage, asked.round)
        requests = self._values.setdefault(step, {}).setdefault(asked.request, {})
        known = requests.setdefault(name, [])
        if not any(torch.equal(one, value) for one in known):
            known.append(value.clone())

    def leaves(self, name: str, task: Any, reply: Any) -> None:
        """A reply is about to leave its hospital; what it tells must be charged on the disk."""
        payload = _payload_of(reply)
        if isinstance(reply, AggregateReply):
            self._listens(name, task, reply.message)
        if payload is None:
            return
        step = step_of(task)
        seen = self._payloads[name, step]
        seen.add(payload)
        if len(seen) > self._charges(name)[step]:
            self._breaks(
                f"{len(seen)} releases of {name} for {step[0]} round {step[1]} can be read, its "
                f"ledger charges {self._charges(name)[step]}"
            )

    def fails(self, name: str, reason: str) -> None:
        """A hospital failed in a way that is no domain error: a bug."""
        self._breaks(f"{name} failed unexpectedly: {reason}")

    def believes(self, step: Step, found: Tensor, hospitals: int | None, form: str = "sum") -> None:
        """The coordinator takes ``found`` for ``step``'s result over ``hospitals`` (None: some).

        ``form``: ``sum``, or ``update``: the mean step of a training round.
        """
        value = found.double().reshape(-1)
        for values in self._subsets(step, hospitals):
            expected = self._combined(step, values, form)
            scale = 1.0 + float(expected.abs().max())
            if float((value - expected).abs().max()) <= _TOLERANCE * scale:
                return
        raise ViolationError(
            f"{step[0]} round {step[1]}: the coordinator's result over {hospitals or 'some'} "
            f"hospitals is no sum of what as many hospitals released"
        )

    def is_exhausted(self, name: str, step: Step) -> bool:
        """Whether this hospital must refuse ``step``: lost attempts used up the study's ε."""
        reader = self.readers[name]
        if self.study.privacy.trust is Trust.LOCAL and reader.has_release(step):
            return False
        pool = "test" if step[0] == "evaluate" else "train"
        more = stage_charge(self.study, step[0]).events(1)
        return not self._fits(pool, [*reader.events[pool], *more])

    def close(self) -> None:
        """Release all files."""
        for reader in self.readers.values():
            reader.close()

    def _within_promise(self, name: str, reader: LedgerReader) -> None:
        for pool, events in reader.events.items():
            if events and not self._fits(pool, events):
                raise ViolationError(
                    f"{name} spent more than the study promised its {pool} patients"
                )

    def _fits(self, pool: str, events: Sequence[GaussianEvent]) -> bool:
        budget = evaluation_budget_of(self.study) if pool == "test" else budget_of(self.study)
        assert budget is not None and budget.epsilon is not None and budget.delta is not None  # noqa: S101
        delta = budget.delta - budget.distance
        spent = epsilon(events, delta=delta, relation=budget.relation)
        return spent <= budget.epsilon * (1 + _SLACK)

    def _charges(self, name: str) -> Counter[Step]:
        self.readers[name].refresh()
        return self.readers[name].charges

    def _listens(self, name: str, task: AggregateTask | AggregateStep, message: bytes) -> None:
        asked = task if isinstance(task, AggregateStep) else None
        if found := self._wire.hears(name, asked, message):
            self._breaks(found)
        for values in self._values.get(step_of(task), {}).values():
            for value in values.get(name, ()):
                if value.numpy().tobytes() in message:
                    self._breaks(f"{name} sent its vector without a mask")

    def _subsets(self, step: Step, hospitals: int | None) -> Iterator[tuple[Tensor, ...]]:
        """What so many different hospitals may have released for one and the same request."""
        for values in self._values.get(step, {}).values():
            for count in range(1, len(values) + 1) if hospitals is None else (hospitals,):
                for names in itertools.combinations(sorted(values), count):
                    yield from itertools.product(*(values[name] for name in names))

    def _combined(self, step: Step, values: Sequence[Tensor], form: str) -> Tensor:
        total = torch.stack([value.double() for value in values]).sum(dim=0)
        in_sums = self.study.privacy.trust is Trust.DISTRIBUTED
        if in_sums:
            total /= encoding_of(self.study, step[0], total.numel()).scale
        if form == "sum":
            return total
        if not in_sums:
            return total / len(values)
        spec = self.study.training(step[0])
        rate = stage_charge(self.study, step[0]).plan.sampling_rate
        return total * (-spec.optimiser.learning_rate / (rate * self.declared * len(values)))

    def _breaks(self, what: str) -> None:
        self.broken.append(what)


def _payload_of(reply: Any) -> bytes | None:
    """What in ``reply`` was computed from patients; None where nothing was."""
    if isinstance(reply, AggregateReply):
        return reply.message if kind_of(reply.message) is Kind.MASKED else None
    value = {StatisticsReply: "sums", TrainReply: "update", EvaluateReply: "histogram"}.get(
        type(reply)
    )
    return None if value is None else getattr(reply, value).numpy().tobytes()
