"""A hospital of the fault simulator: the real client on a real disk, in a process that may die.

Whatever is not on the disk when a crash comes is lost: the next message meets a new process. The
disk is the client's own safe: SQLite ledger, audit log, claimed steps and encrypted sessions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from client import rounds
from client.aggregation import Aggregator, MemorySessions, Sessions
from client.guard import Guard, LedgerGuard, Release
from client.hospital import Hospital
from client.policyfile import sign_policy
from client.safe import Safe, SafeFolder, create_safe, open_safe
from common.identity import PublicIdentity
from common.randomness import NoiseSource, SecretNoise, Stream
from common.secagg import AggregationPolicy, Attempts, MemoryAttempts
from common.secagg.terms import Pinned
from common.study import Study
from common.tables import Table
from common.wire import (
    AggregateStep,
    AggregateTask,
    EvaluateTask,
    Hello,
    StatisticsTask,
    TrainTask,
)
from simulations.fault_invariants import Observer
from simulations.fault_scheduler import Crash, Scheduler
from simulations.hospitals import declared
from simulations.made_up import rows_of

PATIENTS, TEST_PATIENTS = 8, 4
_TORN = b'{"facts":{"att'  # the beginning of a line that never reached the disk whole
_TORN_ODDS = 0.3

# What the hospitals of the simulator permit: the invariants are about what they promise beyond.
_PERMISSIVE = {
    "epsilon_lifetime": "500.0",
    "epsilon_per_year": "500.0",
    "stages": '["statistics", "finetune", "distill", "evaluate"]',
    "trust": '["local", "distributed"]',
    "smallest_noise_multiplier": "0.01",
    "smallest_cohort": "1",
    "fewest_peers": "0",
}

ANSWERS: dict[type, Callable[[Hospital, Any], Any]] = {
    Hello: rounds.hello,
    StatisticsTask: rounds.statistics,
    TrainTask: rounds.train,
    EvaluateTask: rounds.evaluate,
    AggregateTask: lambda hospital, task: _aggregator(hospital).begin(hospital, task),
    AggregateStep: lambda hospital, step: _aggregator(hospital).step(hospital, step),
}
"""What the client's app calls for each message."""


def _aggregator(hospital: Hospital) -> Aggregator:
    assert hospital.aggregator is not None  # noqa: S101
    return hospital.aggregator


def make_safe(path: Path) -> SafeFolder:
    """A safe with a permissive policy, to be copied to the disks of many runs."""
    folder = create_safe(path, {})
    lines = []
    for line in folder.policy.read_text(encoding="utf-8").splitlines():
        key = line.split("=")[0].strip()
        lines.append(f"{key} = {_PERMISSIVE[key]}" if key in _PERMISSIVE else line)
    folder.policy.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with open_safe(path, {}) as safe:
        sign_policy(folder.policy, safe.identity, safe.log)
    return folder


@dataclass(frozen=True)
class WatchedGuard:
    """The hospital's own gate, and a witness of what it lets through."""

    inner: Guard
    name: str
    observer: Observer

    @property
    def noise(self) -> NoiseSource:
        """See ``Guard``."""
        return self.inner.noise

    @property
    def is_lasting(self) -> bool:
        """See ``Guard``."""
        return self.inner.is_lasting

    def admit(self, patients: Any, *, study: str, round_number: int) -> frozenset[str]:
        """See ``Guard``."""
        return self.inner.admit(patients, study=study, round_number=round_number)

    def release(self, asked: Release, compute: Callable[[Stream], Tensor]) -> Tensor:
        """See ``Guard``."""
        value = self.inner.release(asked, compute)
        self.observer.released(self.name, asked, value)
        return value


@dataclass(frozen=True)
class WatchedNoise:
    """Secret noise whose every use is seen before it is drawn."""

    inner: SecretNoise
    name: str
    observer: Observer
    point: Callable[[str], None]

    @property
    def is_secret(self) -> bool:
        """See ``NoiseSource``."""
        return self.inner.is_secret

    def stream(self, *context: bytes | str | int) -> Stream:
        """See ``NoiseSource``."""
        self.observer.draws(self.name, context)
        self.point("noise drawn")
        return self.inner.stream(*context)


@dataclass(frozen=True)
class MortalAttempts:
    """Claims between which the process may die."""

    inner: Attempts
    point: Callable[[str], None]

    def claim(self, release: bytes, attempt: int, step: int) -> None:
        """See ``Attempts``."""
        self.point("step not yet claimed")
        self.inner.claim(release, attempt, step)
        self.point("step claimed")


@dataclass(frozen=True)
class MortalSessions:
    """Sessions between whose writes the process may die."""

    inner: Sessions
    point: Callable[[str], None]

    def save(self, task: AggregateTask, frozen: bytes) -> None:
        """See ``Sessions``."""
        self.point("session not yet saved")
        self.inner.save(task, frozen)
        self.point("session saved")

    def update(self, task: AggregateTask, frozen: bytes) -> None:
        """See ``Sessions``."""
        self.point("session not yet updated")
        self.inner.update(task, frozen)
        self.point("session updated")

    def load(self, stage: str, round_number: int) -> tuple[AggregateTask, bytes] | None:
        """See ``Sessions``."""
        return self.inner.load(stage, round_number)

    def forget(self, stage: str, round_number: int) -> None:
        """See ``Sessions``."""
        self.point("session not yet forgotten")
        self.inner.forget(stage, round_number)


@dataclass(frozen=True, eq=False)
class RememberedIdentity(PublicIdentity):
    """A public key that remembers what it has verified: all hospitals here share one process.

    A deployment's hospitals verify the same signatures each for themselves, several times over.
    """

    _sound: set[tuple[bytes, bytes, str]] = field(default_factory=set, repr=False)

    def __eq__(self, other: object) -> bool:
        """Equal to any public identity of this key."""
        return isinstance(other, PublicIdentity) and self.key == other.key

    def __hash__(self) -> int:
        """Of the key."""
        return hash(self.key)

    def verify(self, message: bytes, signature: bytes, *, purpose: str) -> None:
        """See ``PublicIdentity``."""
        if (message, signature, purpose) not in self._sound:
            super().verify(message, signature, purpose=purpose)
            self._sound.add((message, signature, purpose))


@dataclass
class SimulatedHospital:
    """One hospital: its disk, its patients, and whether its process runs.

    ``since_s``: when it started last. ``as_deployed``: each message meets a new process even
    without a crash, and all it keeps is files; else the process lives until it dies, and steps and
    sessions are kept by objects that outlive it, which is quicker.
    """

    name: str
    study: Study
    disk: Path
    scheduler: Scheduler
    observer: Observer
    pinned: Pinned
    train: Table
    test: Table
    as_deployed: bool
    is_up: bool = True
    since_s: float = 0.0
    _open: tuple[ExitStack, Hospital] | None = None
    _attempts: MemoryAttempts = field(default_factory=MemoryAttempts)
    _sessions: MemorySessions = field(default_factory=MemorySessions)
    _noise: SecretNoise = field(init=False)

    def __post_init__(self) -> None:
        """Its noise key."""
        self._noise = SecretNoise(self.scheduler.entropy(32))

    def answer(self, task: Any) -> Any:
        """The client's reply to one message. Raises what the client raises, and Crash."""
        with self.opened() as hospital:
            return ANSWERS[type(task)](hospital, task)

    @contextmanager
    def opened(self) -> Iterator[Hospital]:
        """The client's view of this hospital, over its open safe."""
        if self.as_deployed or self._open is None:
            stack = ExitStack()
            try:
                safe = stack.enter_context(
                    open_safe(self.disk, {}, clock=self.scheduler.now, on_step=self._on_step)
                )
            except BaseException:
                stack.close()
                raise
            self._open = (stack, self._hospital(safe))
        try:
            yield self._open[1]
        finally:
            if self.as_deployed:
                self.stop()

    def stop(self) -> None:
        """End the process: its memory is gone, its disk stays."""
        if self._open is not None:
            self._open[0].close()
            self._open = None

    def dies(self) -> None:
        """As ``stop``; it is down until ``starts``."""
        self.stop()
        self.is_up = False

    def starts(self) -> None:
        """A new process takes up what the disk holds."""
        self.is_up, self.since_s = True, self.scheduler.now_s

    def _hospital(self, safe: Safe) -> Hospital:
        noise = WatchedNoise(self._noise, self.name, self.observer, self.point)
        return Hospital(
            name=self.name,
            study=self.study,
            train=self.train,
            test=self.test,
            declared_patients=declared(self.train),
            guard=WatchedGuard(LedgerGuard(safe, noise), self.name, self.observer),
            aggregator=Aggregator(
                identity=safe.identity,
                pinned=self.pinned,
                policy=AggregationPolicy(minimum_hospitals=safe.policy().release.fewest_peers + 1),
                attempts=MortalAttempts(
                    safe.attempts() if self.as_deployed else self._attempts, self.point
                ),
                sessions=MortalSessions(
                    safe.sessions() if self.as_deployed else self._sessions, self.point
                ),
                entropy=self.scheduler.entropy,
            ),
        )

    def point(self, place: str) -> None:
        """A place at which this hospital may die."""
        self.scheduler.point("hospital_crash", f"{self.name}: {place}")

    def _on_step(self, step: str) -> None:
        """The ledger's own places; between its commit and the log a line may be torn."""
        try:
            self.point(step)
        except Crash:
            if step.endswith("not yet logged") and self.scheduler.rng.random() < _TORN_ODDS:
                self.scheduler.fault("torn_write", self.name)
                with (self.disk / "audit.log").open("ab") as log:
                    log.write(_TORN)
            raise


@dataclass(frozen=True)
class Templates:
    """Safes made once, under ``path``, and copied for every run; patients made once."""

    path: Path
    _patients: dict[tuple[str, str], tuple[Table, Table]] = field(default_factory=dict)

    def disk(self, number: int, target: Path) -> RememberedIdentity:
        """Hospital ``number``'s new disk at ``target``; its public key."""
        made = self.path / f"safe-{number}"
        if not made.exists():
            make_safe(made)
        shutil.copytree(made, target)
        return RememberedIdentity(SafeFolder(target).public().key)

    def patients(self, study: Study, name: str) -> tuple[Table, Table]:
        """Hospital ``name``'s patients for training and for testing, one random record each."""
        key = (study.name, name)
        if key not in self._patients:
            self._patients[key] = (
                _made_up(study, name, PATIENTS),
                _made_up(study, f"{name} test", TEST_PATIENTS),
            )
        return self._patients[key]


def _made_up(study: Study, name: str, count: int) -> Table:
    generator = np.random.default_rng(list(name.encode()))
    columns = {one.name: generator.uniform(-1, 1, count) for one in study.dictionary.columns}
    names = [f"{name} patient {one}" for one in range(count)]
    return rows_of(study, columns, np.arange(count) % 2, names)
