"""A coordinator and hospitals in memory, which a test may lose, delay, forge or mislead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import ConsiliumError
from common.identity import Identity
from common.secagg import (
    Aggregate,
    AggregationPolicy,
    ClientSession,
    Kind,
    MemoryAttempts,
    ServerSession,
    Terms,
)


@lru_cache(maxsize=256)
def identity_of(name: str) -> Identity:
    """One key per name for all tests: making keys is no part of what is tested."""
    return Identity.generate()


class SecAggWorld:
    """``size`` hospitals and a coordinator that passes messages on as it should."""

    def __init__(
        self,
        size: int = 5,
        threshold: int = 4,
        *,
        colluders: int = 0,
        policy: AggregationPolicy | None = None,
        **changes: Any,
    ) -> None:
        self.names = [f"hospital {one:03d}" for one in range(size)]
        self.pinned = {name: identity_of(name).public for name in self.names}
        settings: dict[str, Any] = {
            "run": "run", "stage": "finetune", "round": 1, "step": 0, "attempt": 0,
            "model": bytes(32), "plan": bytes(32), "hospitals": size, "threshold": threshold,
            "colluders": colluders, "length": 5, "input_bound": (2**31 - 1) // size,
        }  # fmt: skip
        self.terms = Terms(**(settings | changes))
        self.policy = policy or AggregationPolicy(minimum_hospitals=2)
        self.attempts = {name: MemoryAttempts() for name in self.names}
        rng = np.random.default_rng(size)
        bound = self.terms.input_bound
        self.vectors = {
            name: rng.integers(-bound, bound + 1, self.terms.length, dtype=np.int64)
            for name in self.names
        }
        self.server = ServerSession(terms=self.terms, pinned=self.pinned)
        self.clients = {name: self.session(name) for name in self.names}
        self.sent: dict[Kind, dict[str, bytes]] = {}

    def session(self, name: str, **changes: Any) -> ClientSession:
        """A hospital's session, on its own memory of attempts."""
        settings: dict[str, Any] = {
            "name": name, "identity": identity_of(name), "terms": self.terms,
            "policy": self.policy, "pinned": self.pinned, "attempts": self.attempts[name],
        }  # fmt: skip
        return ClientSession(**(settings | changes))

    def vector(self, name: str) -> NDArray[np.int32]:
        """A fresh copy: sessions consume theirs."""
        return self.vectors[name].astype("<i4")

    def answer(self, name: str, message: bytes) -> bytes:
        """What the hospital says to ``message``."""
        needs = self.clients[name].expects is Kind.DELIVERY
        reply = self.clients[name].answer(message, self.vector(name) if needs else None)
        self.sent.setdefault(Kind(reply[4]), {})[name] = reply
        return reply

    def advertise(self, names: Iterable[str] | None = None) -> None:
        for name in names or self.names:
            self.sent.setdefault(Kind.ADVERT, {})[name] = self.clients[name].advertise()
            self.server.receive(self.sent[Kind.ADVERT][name])

    def step(self, outgoing: dict[str, bytes], gone: Iterable[str] = ()) -> None:
        """Every hospital but those ``gone`` answers, and is heard."""
        for name, message in outgoing.items():
            if name not in gone:
                self.server.receive(self.answer(name, message))

    def until(self, kind: Kind, gone: Iterable[str] = ()) -> dict[str, bytes]:
        """Run to the coordinator's messages of ``kind``; those ``gone`` send no vector."""
        self.advertise()
        for next_kind in (Kind.ROSTER, Kind.DELIVERY, Kind.SURVIVORS, Kind.AGREEMENTS):
            outgoing = self.server.advance()
            if next_kind is kind:
                return outgoing
            self.step(outgoing, gone if next_kind is Kind.DELIVERY else ())
        raise AssertionError(kind)

    def run(self, gone_at: dict[str, int] | None = None, order: Callable[[list[str]], None] = id) -> Aggregate:  # fmt: skip  # noqa: E501
        """A whole round. ``gone_at``: name → first step (0 to 4) in which it is silent."""
        gone_at = gone_at or {}
        for step in range(5):
            outgoing = self.server.advance() if step else dict.fromkeys(self.names, b"")
            names = [name for name in outgoing if gone_at.get(name, 9) > step]
            order(names)
            if step == 0:
                self.advertise(names or [None][:0])
            else:
                for name in names:
                    self.server.receive(self.answer(name, outgoing[name]))
        return self.server.finish()

    def expected(self, names: Iterable[str]) -> NDArray[np.int64]:
        """The plain sum."""
        return np.sum([self.vectors[name] for name in names], axis=0)

    def check(self, aggregate: Aggregate) -> None:
        """The sum is that of the survivors, integer for integer."""
        assert len(aggregate.survivors) >= self.terms.threshold
        np.testing.assert_array_equal(aggregate.values, self.expected(aggregate.survivors))


@pytest.fixture(scope="session")
def world() -> type[SecAggWorld]:
    """The class; a test makes its own worlds."""
    return SecAggWorld


@pytest.fixture(scope="session")
def refused() -> Callable[..., ConsiliumError]:
    """``refused(call, *arguments)``: the domain error it must raise."""

    def attempt(call: Callable[..., Any], *arguments: Any) -> ConsiliumError:
        with pytest.raises(ConsiliumError) as caught:
            call(*arguments)
        return caught.value

    return attempt
