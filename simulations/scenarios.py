"""A scenario around a backend: who is asked, who answers in time, and what an attacker changes.

It sees messages only, so that it works over any engine; whether a hospital answers depends on the
study's seed, the hospital and the round, never on the order of messages. Who does not answer gives
Flower's own error for a node that is away: the coordinator goes on without waiting in real time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from flwr.app import Error, Message

from client.hospital import Hospital
from common.flower import NODE_UNAVAILABLE
from common.scenario import DATA_ATTACKS, ScenarioSpec
from common.secagg.messages import kind_of
from common.study import Study
from server.store import RunFolder
from simulations.draws import chosen, first, uniform
from simulations.grid import Backend
from simulations.observer import Observer
from simulations.poison import attackers, scenario_of
from simulations.tamper import Tamperer
from simulations.traffic import (
    Clock,
    Exchange,
    Fate,
    Parcel,
    Traffic,
    Visit,
    duration_s,
    forecast,
    parcel_of,
)

T = TypeVar("T")

TRAFFIC = "traffic.jsonl"
_TRAINING = ("finetune", "distill")
_FIRST = ("statistics", "train", "evaluate", "begin")  # questions that open a round
_WORK = ("statistics", "train", "evaluate", "delivery")  # questions whose answer is charged


@dataclass(frozen=True, kw_only=True)
class Occasion:
    """Which question of which round a message is; ``round`` counts from 0."""

    stage: str
    round: int
    attempt: int
    question: str

    @cached_property
    def key(self) -> str:
        """For draws: one for each attempt at a round."""
        return f"{self.stage}/{self.round}/{self.attempt}"


def occasion_of(message: Message) -> Occasion:
    """Reads it off the message's plain values."""
    values: dict[str, Any] = dict(message.content.config_records["values"])
    kind = message.metadata.message_type
    question = kind.split(".")[-1]
    if kind == "train.aggregate":
        question = "begin"
    elif kind == "query.aggregate":
        question = kind_of(values["message"]).name.lower()
    return Occasion(
        stage=str(values.get("stage", question)),
        round=int(values.get("round", 0)),
        attempt=int(values.get("attempt", 0)),
        question=question,
    )


@dataclass(frozen=True)
class Scene:
    """The study's scenario over its hospitals; node k is the k-th of them."""

    study: Study
    hospitals: list[Hospital]
    traffic: Traffic
    tamperer: Tamperer | None
    observer: Observer | None

    def over(self, backend: Backend) -> Backend:
        """The same backend, with everything that may go wrong."""

        def run(messages: list[Message]) -> Iterator[Message]:
            if not messages:
                return
            at = occasion_of(messages[0])
            away = self._away(at, {self._hospital(one).name for one in messages})
            working = [one for one in messages if self._hospital(one).name not in away]
            if at.question == "hello":
                yield from map(_no_answer, _rest(messages, working))
                yield from backend(working) if working else ()
                return
            visits = {name: Visit(fate=fate) for name, fate in away.items()}
            replies = self._replies(at, backend, working, visits)
            if self._spec.stragglers is not None:
                # In the order of their virtual arrival; without a clock they stream as they come.
                replies = iter(sorted(replies, key=lambda one: one[0]))
            yield from map(_no_answer, _rest(messages, working))
            yield from _before_last((reply for _, reply in replies), lambda: self._note(at, visits))

        return run

    def facts(self) -> dict[str, Any]:
        """What belongs into the run's result."""
        self.traffic.tidy()
        return {"forecast": forecast(self.traffic.exchanges.values(), self._spec.network)}

    @cached_property
    def _spec(self) -> ScenarioSpec:
        return scenario_of(self.study)

    @cached_property
    def _clock(self) -> Clock:
        return Clock(self.study.seed, self._spec.network, self._spec.stragglers)

    @cached_property
    def _deadline_s(self) -> float:
        stragglers = self._spec.stragglers
        given = stragglers.deadline_s if stragglers else None
        return self.study.federation.round_timeout_s if given is None else given

    def _hospital(self, message: Message) -> Hospital:
        return self.hospitals[message.metadata.dst_node_id - 1]

    def _away(self, at: Occasion, names: Iterable[str]) -> dict[str, Fate]:
        """The hospitals that never get this question, or do nothing about it, and why."""
        spec, seed = self._spec, self.study.seed
        away = dict.fromkeys(self._late(at) & set(names), Fate.NOT_THERE)
        if at.question not in _FIRST:
            return away
        present = sorted(set(names) - away.keys())
        if spec.participation is not None and at.stage in _TRAINING:
            asked = first(seed, present, spec.participation.asked(len(present)), "asked", at.key)
            away |= {name: Fate.NOT_ASKED for name in present if name not in asked}
            present = asked
        away |= {name: Fate.SILENT for name in present if self._drops_out(at, name, "before")}
        return away

    def _late(self, at: Occasion) -> frozenset[str]:
        """Who is not there yet. A greeting comes before the round after the last one seen."""
        spec = self._spec.late
        if spec is None or self.study.simulation is None:
            return frozenset()
        number = at.round if at.stage == "finetune" else 0
        if at.question == "hello":
            seen = [one.round for one in self.traffic.exchanges.values() if one.stage == "finetune"]
            number = max(seen, default=0)
        if at.stage in ("distill", "evaluate") or number + 1 >= spec.from_round:
            return frozenset()
        return chosen(self.study.seed, spec.hospitals, self.study.simulation.names, "late")

    def _drops_out(self, at: Occasion, name: str, when: str) -> bool:
        spec = self._spec.dropouts
        if spec is None or spec.when != when:
            return False
        return uniform(self.study.seed, "dropout", at.key, name) < spec.probability

    def _replies(
        self,
        at: Occasion,
        backend: Backend,
        working: list[Message],
        visits: dict[str, Visit],
    ) -> Iterator[tuple[float, Message]]:
        """What the coordinator gets, each with its time of arrival; fills ``visits``."""
        asked = {one.metadata.message_id: one for one in working}
        sizes: dict[int, Parcel] = {}
        for answer in backend(working) if working else ():
            message = asked[answer.metadata.reply_to_message_id]
            hospital, down = self._hospital(message), _measured(message, sizes)
            if answer.has_error():
                visits[hospital.name] = Visit(fate=Fate.FAILED, down=down.size, arrival_s=0.0)
                yield 0.0, answer
                continue
            reply = self._tampered(at, hospital, answer)
            up = parcel_of(reply)
            arrival_s = self._clock.arrival_s(
                hospital.name, at.key, down, up, self._records(at, hospital)
            )
            fate, sent = Fate.ANSWERED, up.size
            if at.question in _WORK and self._drops_out(at, hospital.name, "after"):
                fate, sent = Fate.LOST, 0
            elif arrival_s > self._deadline_s:
                fate = Fate.LATE
            visits[hospital.name] = Visit(
                fate=fate, down=down.size, up=sent, arrival_s=round(arrival_s, 6)
            )
            if fate is not Fate.ANSWERED:
                yield self._deadline_s, _no_answer(message)
                continue
            if self.observer is not None and at.question == "train":
                self.observer.see(hospital, message, reply)
            yield arrival_s, reply

    def _tampered(self, at: Occasion, hospital: Hospital, reply: Message) -> Message:
        if self.tamperer is None or at.stage not in _TRAINING:
            return reply
        if hospital.name not in self.tamperer.attackers:
            return reply
        if at.question == "train":
            return self.tamperer.update(hospital, reply)
        if at.question == "delivery":
            return self.tamperer.masked(hospital, reply, at.stage, at.round)
        return reply

    def _records(self, at: Occasion, hospital: Hospital) -> float:
        """How many records go through a step for this answer, on average."""
        if at.question not in _WORK:
            return 0.0
        if at.stage == "evaluate":
            return float(len(hospital.test))
        if at.stage not in _TRAINING:
            return float(len(hospital.train))
        spec = self.study.training(at.stage)
        return len(hospital.train) * spec.sampling_rate * spec.local_steps

    def _note(self, at: Occasion, visits: Mapping[str, Visit]) -> None:
        self.traffic.add(
            Exchange(
                stage=at.stage,
                round=at.round + 1,
                attempt=at.attempt,
                question=at.question,
                duration_s=round(duration_s(visits.values(), self._deadline_s), 6),
                visits={name: visits[name] for name in sorted(visits)},
            )
        )


def open_scene(study: Study, run: RunFolder, hospitals: list[Hospital]) -> Scene:
    """The scene of a run, new or as an interruption left it."""
    spec = scenario_of(study)
    tampers = spec.attack is not None and spec.attack.kind not in DATA_ATTACKS
    return Scene(
        study=study,
        hospitals=hospitals,
        traffic=Traffic.open(run.path / TRAFFIC),
        tamperer=Tamperer(study, spec.attack, attackers(study))
        if tampers and spec.attack
        else None,
        observer=Observer(run.path / "observer") if spec.observer else None,
    )


def _no_answer(message: Message) -> Message:
    return Message(Error(code=NODE_UNAVAILABLE, reason="away, by the scenario"), reply_to=message)


def _rest(messages: list[Message], taken: list[Message]) -> list[Message]:
    names = {one.metadata.message_id for one in taken}
    return [one for one in messages if one.metadata.message_id not in names]


def _measured(message: Message, sizes: dict[int, Parcel]) -> Parcel:
    """A message's parcel; where many hospitals are sent one content, it is looked at once."""
    key = id(message.content)
    if key not in sizes:
        sizes[key] = parcel_of(message)
    return sizes[key]


def _before_last(items: Iterator[T], act: Callable[[], None]) -> Iterator[T]:
    """``items``, with ``act`` called before the last one is given: nobody may ask for more."""
    held: list[T] = []
    for item in items:
        yield from held
        held = [item]
    act()
    yield from held
