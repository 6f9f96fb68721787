"""One seeded order of everything that happens, under a clock that only it moves.

After FoundationDB's and TigerBeetle's simulators: the real state machines run, while every message,
delay, crash and restart comes out of one generator of random numbers. The same seed gives the same
run, so a failure found once is found again.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta

_BEGINNING = datetime(2030, 1, 1, tzinfo=UTC)
_SLOW_S = 300.0  # the longest a message may be held back, or an old one wait to come again
_QUICK_S = 1.0
# At each message a process passes about so many places at which it may die.
_POINTS_PER_MESSAGE = 6


class Crash(BaseException):
    """The process that was at work is gone, as by SIGKILL: no ``except Exception`` sees it."""


@dataclass(frozen=True, kw_only=True)
class Odds:
    """How likely each kind of fault is: for each message sent, or (crashes) for each handled."""

    loss: float = 0.0
    delay: float = 0.0
    duplicate: float = 0.0
    replay: float = 0.0
    hospital_crash: float = 0.0
    coordinator_crash: float = 0.0

    @classmethod
    def drawn(cls, rng: random.Random) -> Odds:
        """Some kinds only, rare or frequent: a run without losses finds what losses would hide."""
        return cls(
            **{
                one.name: 10 ** rng.uniform(-2.3, -0.8) if rng.random() < 0.5 else 0.0
                for one in fields(cls)
            }
        )


@dataclass
class Scheduler:
    """The queue of events, the virtual clock and the generator behind every choice.

    ``checks``: called after each event. ``trace``: what happened, a line each.
    """

    seed: int
    odds: Odds | None = None
    now_s: float = 0.0
    trace: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    checks: list[Callable[[], None]] = field(default_factory=list)
    events: int = 0
    _queue: list[tuple[float, int, str, Callable[[], None]]] = field(default_factory=list)
    _number: int = 0
    _calm: bool = False

    def __post_init__(self) -> None:
        """Seed the generator."""
        self.rng = random.Random(self.seed)  # noqa: S311 - a schedule, no secret
        self.odds = self.odds or Odds.drawn(self.rng)

    def now(self) -> datetime:
        """The time of day, for clocks and certificates."""
        return self.at(self.now_s)

    def at(self, seconds: float) -> datetime:
        """The time of day so many seconds after the beginning."""
        return _BEGINNING + timedelta(seconds=seconds)

    def monotonic(self) -> float:
        """Seconds since the beginning."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let everything happen that is due within ``seconds``."""
        self.run(lambda: False, seconds)

    def run(self, done: Callable[[], bool], timeout_s: float) -> None:
        """Events in their order until ``done()`` or until the time is over."""
        until = self.now_s + timeout_s
        while not done():
            if not self._queue or self._queue[0][0] > until:
                self.now_s = until
                return
            at_s, _, name, act = heapq.heappop(self._queue)
            self.now_s = max(self.now_s, at_s)
            self.note(name)
            self.events += 1
            act()
            for check in self.checks:
                check()
            self.point("coordinator_crash", "while it waits")

    def after(self, delay_s: float, name: str, act: Callable[[], None]) -> None:
        """Queue one event; of two at one time the one queued first comes first."""
        self._number += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._number, name, act))

    def strikes(self, kind: str) -> bool:
        """Whether this fault happens now; then it is counted and noted."""
        odds = 0.0 if self._calm else getattr(self.odds, kind)
        if not odds or self.rng.random() >= odds:
            return False
        self.fault(kind)
        return True

    def point(self, kind: str, place: str) -> None:
        """A place at which a process may die; ``kind``: whose crash. Raises Crash if it does."""
        odds = 0.0 if self._calm else getattr(self.odds, kind)
        if odds and self.rng.random() < odds / _POINTS_PER_MESSAGE:
            self.fault(kind, f"at {place!r}")
            raise Crash

    def fault(self, kind: str, where: str = "") -> None:
        """Count a fault that was injected."""
        self.faults[kind] += 1
        self.note(f"  fault: {kind} {where}".rstrip())

    def calm(self) -> None:
        """From now on nothing fails; what is under way still arrives."""
        self._calm = True
        self.note("faults stop")

    @property
    def is_calm(self) -> bool:
        """Whether faults have stopped."""
        return self._calm

    def note(self, line: str) -> None:
        """One line of the trace."""
        self.trace.append(f"{self.now_s:9.3f} {line}")

    def entropy(self, count: int) -> bytes:
        """Bytes for keys and masks: repeatable, and as secret as the seed."""
        return self.rng.randbytes(count)


@dataclass
class Network:
    """Carries messages between named places, and loses, delays, repeats and reorders them."""

    scheduler: Scheduler
    _sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    _newest: dict[tuple[str, str], int] = field(default_factory=dict)

    def send(self, source: str, target: str, what: str, deliver: Callable[[], None]) -> None:
        """``deliver`` will be called once, several times, or never."""
        scheduler, rng = self.scheduler, self.scheduler.rng
        self._sent[source, target] += 1
        number = self._sent[source, target]
        name = f"{source} -> {target}: {what}"
        if scheduler.strikes("loss"):
            scheduler.note(f"  lost: {name}")
            return
        delays = [rng.uniform(0.01, _QUICK_S)]
        if scheduler.strikes("delay"):
            delays[0] += rng.uniform(_QUICK_S, _SLOW_S)
        if scheduler.strikes("duplicate"):
            delays.append(rng.uniform(0.01, 2 * _QUICK_S))
        if scheduler.strikes("replay"):
            delays.append(rng.uniform(2 * _QUICK_S, _SLOW_S))
        for delay_s in delays:
            scheduler.after(delay_s, name, lambda: self._arrive(source, target, number, deliver))

    def _arrive(self, source: str, target: str, number: int, deliver: Callable[[], None]) -> None:
        newest = self._newest.get((source, target), 0)
        if number < newest:
            self.scheduler.fault("reorder")
        self._newest[source, target] = max(newest, number)
        deliver()
