"""How many bytes a simulated study moves between coordinator and hospitals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
from flwr.app import ArrayRecord, Message

from common.learning.metrics import Interval, mean_interval
from server.store import RunFolder
from simulations.grid import Backend

_FILE = "traffic.json"


class Meter:
    """Counts the contents of all messages that pass a backend; kept in the run's folder.

    An interrupted run keeps counting where it stopped: a round that is asked again is sent again.
    """

    def __init__(self, run: RunFolder, hospitals: int) -> None:
        self._run = run
        kept = run.read_json(_FILE) if (run.path / _FILE).exists() else {}
        self._counts = {
            "hospitals": hospitals,
            "messages": int(kept.get("messages", 0)),
            "to_hospitals_bytes": int(kept.get("to_hospitals_bytes", 0)),
            "from_hospitals_bytes": int(kept.get("from_hospitals_bytes", 0)),
        }

    def around(self, backend: Backend) -> Backend:
        """The same backend, counted."""

        def run(messages: list[Message]) -> Iterator[Message]:
            sizes: dict[int, int] = {}  # a broadcast's content is one object
            for message in messages:
                key = id(message.content)
                if key not in sizes:
                    sizes[key] = content_bytes(message)
                self._counts["to_hospitals_bytes"] += sizes[key]
            self._counts["messages"] += len(messages)
            for reply in backend(messages):
                self._counts["from_hospitals_bytes"] += content_bytes(reply)
                yield reply

        return run

    def save(self) -> None:
        """Write what was counted so far."""
        self._run.write_json(_FILE, self._counts)


def content_bytes(message: Message) -> int:
    """Bytes of a message's values and arrays; Flower's envelope comes to some hundred more."""
    if message.has_error():
        return len((message.error.reason or "").encode())
    return sum(_record_bytes(one) for one in message.content.values())


def _record_bytes(record: Any) -> int:
    if isinstance(record, ArrayRecord):
        return sum(len(one.data) for one in record.values())
    return len(msgpack.packb(dict(record)))


def bytes_per_hospital(runs: Sequence[RunFolder]) -> Interval:
    """Bytes that one hospital receives and sends in a whole study, over several runs of it."""
    return mean_interval([_moved(run) for run in runs])


def _moved(run: RunFolder) -> float:
    if not (run.path / _FILE).exists():  # conducted outside a simulation, or by older software
        return math.nan
    counts = run.read_json(_FILE)
    return float(
        (counts["to_hospitals_bytes"] + counts["from_hospitals_bytes"]) / counts["hospitals"]
    )
