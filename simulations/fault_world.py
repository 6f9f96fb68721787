"""One run of the fault simulator: a coordinator and its hospitals around one scheduler.

Two ways to the hospitals, both over the same faulty network. :class:`FaultyLink` gives the
coordinator everything that arrives, also what comes twice or from an earlier attempt: the panel and
the secure sum must cope by themselves. :class:`FaultyGrid` stands below Flower's messages, with the
deployment's own link and the hospitals' own app above it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from flwr.app import Context, Error, Message, RecordDict

from client.app import build_client_app
from client.hospital import Hospital
from common.errors import ConsiliumError
from common.flower import NODE_UNAVAILABLE, unpack
from common.secagg import kind_of
from common.wire import (
    AggregateReply,
    AggregateStep,
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
from simulations.fault_hospital import SimulatedHospital
from simulations.fault_invariants import Observer
from simulations.fault_scheduler import Crash, Network, Scheduler
from simulations.grid import InProcessGrid

Reply = TypeVar("Reply")

TIMEOUT_S = 60.0
_LONGEST_DOWN_S = 120.0
_FETCHED_S = 4.0
# What becomes of a message to a hospital that is down: an answer in its stead, a wait, or nothing.
_AWAY_ODDS, _HELD_ODDS = 0.4, 0.4
_DOMAIN_ERRORS = tuple(f"failed ({one.__name__})" for one in ConsiliumError.__subclasses__())
_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "query.hello": (Hello, HelloReply),
    "query.statistics": (StatisticsTask, StatisticsReply),
    "train": (TrainTask, TrainReply),
    "evaluate": (EvaluateTask, EvaluateReply),
    "train.aggregate": (AggregateTask, AggregateReply),
    "query.aggregate": (AggregateStep, AggregateReply),
}


@dataclass
class World:
    """The hospitals behind the network, and the witness who sees what leaves them."""

    scheduler: Scheduler
    observer: Observer
    hospitals: dict[str, SimulatedHospital]
    network: Network = field(init=False)
    held: dict[str, list[Callable[[], None]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        """Lay the wires."""
        self.network = Network(self.scheduler)

    def handles(self, name: str, act: Callable[[SimulatedHospital], None]) -> bool:
        """Let hospital ``name`` handle a message by ``act``; False where it is down.

        A crash inside ``act`` takes the hospital down for a while.
        """
        hospital = self.hospitals[name]
        if not hospital.is_up:
            self.scheduler.note(f"  {name} is down")
            return False
        self.observer.touched.add(name)
        try:
            act(hospital)
        except Crash:
            hospital.dies()
            down_s = self.scheduler.rng.uniform(0.5, _LONGEST_DOWN_S)
            self.scheduler.after(down_s, f"{name} starts", lambda: self._starts(hospital))
        return True

    def heal(self) -> None:
        """Faults stop, and everybody is there again."""
        self.scheduler.calm()
        for hospital in self.hospitals.values():
            if not hospital.is_up:
                self._starts(hospital)

    def _starts(self, hospital: SimulatedHospital) -> None:
        if not hospital.is_up:
            self.scheduler.faults["restart"] += 1
            hospital.starts()
            for deliver in self.held.pop(hospital.name, ()):
                self.scheduler.after(
                    self.scheduler.rng.uniform(0.0, _FETCHED_S),
                    f"{hospital.name} fetches a message that was held for it",
                    deliver,
                )

    def close(self) -> None:
        """End every process."""
        for hospital in self.hospitals.values():
            hospital.stop()
        self.observer.close()


class FaultyLink:
    """A ``Link`` that hands over all that arrives: see the module."""

    def __init__(self, world: World) -> None:
        """Over ``world``'s network."""
        self._world = world
        self._inbox: list[Any] = []
        self._numbers = itertools.count()
        self._open: set[int] = set()

    def greet(self, task: Hello) -> Iterator[HelloReply]:
        """See ``Link``; everybody is greeted each time."""
        return self.ask("hello", task, HelloReply)

    def ask(self, action: str, task: Any, kind: type[Reply]) -> Iterator[Reply]:
        """See ``Link``."""
        return self.ask_each(action, dict.fromkeys(self._world.hospitals, task), kind)

    def ask_each(self, action: str, tasks: Mapping[str, Any], kind: type[Reply]) -> Iterator[Reply]:
        """See ``Link``."""
        scheduler = self._world.scheduler
        self._open = {self._send(name, action, task) for name, task in tasks.items()}
        until_s = scheduler.now_s + TIMEOUT_S
        while True:
            scheduler.run(lambda: bool(self._inbox) or not self._open, until_s - scheduler.now_s)
            if not self._inbox:
                return
            reply = self._inbox.pop(0)
            if isinstance(reply, kind):
                yield reply

    def _send(self, name: str, action: str, task: Any) -> int:
        number = next(self._numbers)
        world = self._world
        world.observer.asks(task)

        def deliver() -> None:
            world.handles(name, lambda hospital: self._serve(hospital, task, number))

        world.network.send("coordinator", name, _described(action, task), deliver)
        return number

    def _serve(self, hospital: SimulatedHospital, task: Any, number: int) -> None:
        """As the client's app does: a reply, or word that there is none."""
        world, name = self._world, hospital.name
        try:
            reply = hospital.answer(task)
        except ConsiliumError as error:
            world.scheduler.note(f"  {name} refuses: {str(error)[:90]}")
            reply = None
        except Exception as error:
            world.observer.fails(name, repr(error))
            return
        if reply is not None:
            world.observer.leaves(name, task, reply)
        hospital.point("reply not yet sent")

        def arrive() -> None:
            self._open.discard(number)
            if reply is not None:
                self._inbox.append(reply)

        what = "refusal" if reply is None else _answered(reply)
        world.network.send(name, "coordinator", what, arrive)


class FaultyGrid(InProcessGrid):
    """Flower's grid over the faulty network, with the hospitals' own app at its end.

    Each message has one reply at most, as from a SuperLink.
    """

    def __init__(self, world: World) -> None:
        super().__init__(len(world.hospitals), lambda _: iter(()))
        self._world = world
        self.names = dict(enumerate(world.hospitals, start=1))
        self._app = build_client_app(self._opened)
        self._arrived: dict[str, Message] = {}
        self._sent = itertools.count()

    def activations(self) -> dict[int, datetime]:
        """Since when each hospital that is up runs."""
        began = self._world.scheduler
        return {
            node: began.at(self._world.hospitals[name].since_s)
            for node, name in self.names.items()
            if self._world.hospitals[name].is_up
        }

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each on its way."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived."""
        return [self._arrived.pop(one) for one in message_ids if one in self._arrived]

    def _push(self, message: Message) -> str:
        world, node = self._world, message.metadata.dst_node_id
        name, kind = self.names[node], message.metadata.message_type
        number = f"message {next(self._sent)}"
        message.metadata.__dict__["_message_id"] = number
        task = unpack(_KINDS[kind][0], message.content)
        world.observer.asks(task)

        def deliver() -> None:
            served = world.handles(name, lambda hospital: self._serve(hospital, message, task))
            if served:
                return
            drawn = world.scheduler.rng.random()
            if drawn < _AWAY_ODDS:
                away = Error(code=NODE_UNAVAILABLE, reason="away")
                self._arrived.setdefault(number, Message(away, reply_to=message))
            elif drawn < _AWAY_ODDS + _HELD_ODDS:
                world.held[name].append(deliver)

        world.network.send("coordinator", name, _described(kind, task), deliver)
        return number

    def _serve(self, hospital: SimulatedHospital, message: Message, task: Any) -> None:
        world, name = self._world, hospital.name
        reply = self._app(message, _context(message.metadata.dst_node_id))
        what = "refusal"
        if reply.has_error():
            reason = str(reply.error.reason)
            if reason.startswith("failed (") and not reason.startswith(_DOMAIN_ERRORS):
                world.observer.fails(name, reason)
        else:
            told = unpack(_KINDS[message.metadata.message_type][1], reply.content)
            what = _answered(told)
            world.observer.leaves(name, task, told)
        hospital.point("reply not yet sent")
        number = message.metadata.message_id
        world.network.send(name, "coordinator", what, lambda: self._arrived.update({number: reply}))

    def _opened(self, context: Context, _: str) -> AbstractContextManager[Hospital]:
        return self._world.hospitals[self.names[context.node_id]].opened()


def _described(action: str, task: Any) -> str:
    place = [str(getattr(task, one)) for one in ("stage", "round", "attempt") if hasattr(task, one)]
    return " ".join([action, *place, *_protocol(task)])


def _answered(reply: Any) -> str:
    return " ".join([type(reply).__name__, *_protocol(reply)])


def _protocol(message: Any) -> list[str]:
    """Which message of a secure sum it carries."""
    inner = getattr(message, "message", None)
    return [] if inner is None else [kind_of(inner).name]


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
