"""What went over the line in a simulated run, message by message, and how long it would have taken.

Bytes are those of the parts that Flower really sends for a message's content. Its own requests,
HTTP and TLS come on top: some hundred bytes a part. Greetings are not counted.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from flwr.app import Array, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from torch import Tensor

from common.files import write_atomically
from common.flower import Unsent, pack
from common.scenario import NetworkSpec, StragglersSpec
from simulations.draws import normal

_BITS, _MEGA = 8, 1e6
_MOST_FORMS = 4096
_PARCELS: dict[tuple[Any, ...], Parcel] = {}


class Fate(StrEnum):
    """What became of one question to one hospital."""

    ANSWERED = "answered"
    FAILED = "failed"  # it answered with an error, a refusal for instance
    NOT_THERE = "not there"  # it joins later
    NOT_ASKED = "not asked"
    SILENT = "silent"  # it dropped out before its work
    LOST = "lost"  # it dropped out after its work
    LATE = "late"  # its reply came after the deadline


@dataclass(frozen=True)
class Parcel:
    """A message's content on the line: ``size`` in bytes, sent in so many ``parts``."""

    size: int
    parts: int


def parcel_of(message: Message) -> Parcel:
    """Measures what Flower sends.

    Once for contents of one form, since serialising costs more than a hospital's work may: the
    size depends on names, numbers, and the lengths of texts and arrays.
    """
    held = message.message if isinstance(message, Unsent) else None
    form = _form(message.content if held is None else vars(held))
    if form not in _PARCELS:
        if len(_PARCELS) >= _MOST_FORMS:
            _PARCELS.clear()
        # On a copy: Flower leaves views of memory in what it takes apart, which cannot be copied.
        content = deepcopy(message.content) if held is None else pack(held)
        parts = get_all_nested_objects(content).values()
        _PARCELS[form] = Parcel(sum(len(one.deflate()) for one in parts), len(parts))
    return _PARCELS[form]


def _form(value: Any) -> Any:
    """What the size of ``value`` depends on: Flower's records, or a wire message's fields."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return "bytes", len(value)
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape)
    if isinstance(value, Array):
        return value.dtype, tuple(value.shape), value.stype, len(value.data)
    if hasattr(value, "items"):  # asking whether it is a Mapping takes as long as all the rest
        return tuple((name, _form(one)) for name, one in value.items())
    return type(value).__name__, repr(value)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One hospital in one exchange: bytes to it and from it, and when its reply arrived."""

    fate: Fate
    down: int = 0
    up: int = 0
    arrival_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question to the hospitals and their answers. ``round`` counts from 1.

    ``question``: ``train``, ``statistics``, ``evaluate``, or a step of a secure sum.
    """

    stage: str
    round: int
    attempt: int
    question: str
    duration_s: float
    visits: dict[str, Visit]

    @property
    def key(self) -> tuple[str, int, int, str]:
        """A repetition after an interruption takes the place of the first."""
        return (self.stage, self.round, self.attempt, self.question)


@dataclass(frozen=True)
class Clock:
    """Virtual time: what line and processor of each hospital take, by the study's seed."""

    seed: int
    network: NetworkSpec
    stragglers: StragglersSpec | None

    def arrival_s(
        self, hospital: str, round_key: str, down: Parcel, up: Parcel, records: float
    ) -> float:
        """From the question's leaving to the reply's arrival; ``records``: taken through a step."""
        network = self.network
        requests_s = (down.parts + up.parts) * network.latency_ms / 1000
        line_s = down.size * _BITS / (network.downlink_mbit_s * _MEGA) + up.size * _BITS / (
            network.uplink_mbit_s * _MEGA
        )
        compute_s = records / network.records_per_s * self._slowness(hospital, round_key)
        return requests_s + line_s + compute_s

    def _slowness(self, hospital: str, round_key: str) -> float:
        if self.stragglers is None:
            return 1.0
        exponent = self.stragglers.spread * normal(self.seed, "spread", hospital)
        exponent += self.stragglers.jitter * normal(self.seed, "jitter", hospital, round_key)
        return math.exp(exponent)


def duration_s(visits: Iterable[Visit], deadline_s: float) -> float:
    """How long the coordinator waits: for the last reply, or for ones that do not come in time."""
    seen = list(visits)
    if any(one.fate in (Fate.LOST, Fate.LATE) for one in seen):
        return deadline_s
    return max((one.arrival_s or 0.0 for one in seen), default=0.0)


@dataclass
class Traffic:
    """All exchanges of a run, kept in ``traffic.jsonl`` as they happen."""

    path: Path
    exchanges: dict[tuple[str, int, int, str], Exchange] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Traffic:
        """What an interrupted run left; a line that was cut is left out."""
        found = cls(path)
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                found._keep(_parsed(json.loads(line)))
            found.tidy()
        return found

    def add(self, exchange: Exchange) -> None:
        """Keep one, on disk before the coordinator can count its round as finished."""
        self._keep(exchange)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(_line(exchange))
            handle.flush()
            os.fsync(handle.fileno())

    def tidy(self) -> None:
        """Leave each exchange once in the file."""
        write_atomically(self.path, "".join(map(_line, self.exchanges.values())).encode())

    def _keep(self, exchange: Exchange) -> None:
        self.exchanges[exchange.key] = exchange


def forecast(exchanges: Iterable[Exchange], network: NetworkSpec) -> dict[str, Any]:
    """Bytes and time of all rounds on patients, as plain data; see docs/scenarios.md."""
    by_round: dict[tuple[str, int], list[Exchange]] = {}
    for one in exchanges:
        by_round.setdefault((one.stage, one.round), []).append(one)
    rounds = [_round(stage, number, each) for (stage, number), each in by_round.items()]
    hospitals: dict[str, Counter[str]] = {}
    for each in by_round.values():
        for exchange in each:
            for name, visit in exchange.visits.items():
                hospitals.setdefault(name, Counter()).update(
                    bytes_down=visit.down, bytes_up=visit.up
                )
    return {
        "line": network.model_dump(mode="json"),
        **{key: sum(one[key] for one in rounds) for key in ("bytes_down", "bytes_up")},
        "duration_s": round(sum(one["duration_s"] for one in rounds), 6),
        "rounds": rounds,
        "hospitals": {name: dict(hospitals[name]) for name in sorted(hospitals)},
    }


def _round(stage: str, number: int, each: list[Exchange]) -> dict[str, Any]:
    """One round of ``stage``; a secure sum takes several exchanges, and perhaps attempts.

    A hospital counts once: as having answered if it did so to the end.
    """
    visits = [visit for one in each for visit in one.visits.values()]
    fates = {name: visit.fate for one in each for name, visit in one.visits.items()}
    counted = Counter(fates.values())
    return {
        "stage": stage,
        "round": number,
        "duration_s": round(sum(one.duration_s for one in each), 6),
        "bytes_down": sum(one.down for one in visits),
        "bytes_up": sum(one.up for one in visits),
        **{fate.name.lower(): counted[fate] for fate in Fate},
    }


def _line(exchange: Exchange) -> str:
    visits = {name: vars(visit) for name, visit in exchange.visits.items()}
    return json.dumps({**vars(exchange), "visits": visits}) + "\n"


def _parsed(line: Mapping[str, Any]) -> Exchange:
    visits = {
        name: Visit(**{**visit, "fate": Fate(visit["fate"])})
        for name, visit in line["visits"].items()
    }
    return Exchange(**{**line, "visits": visits})
