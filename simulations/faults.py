"""Deterministic fault simulation: the real client, server and secure aggregation, seed by seed.

``consilium faults`` runs it. Most seeds ask a panel a few questions over ledgers in memory; every
fiftieth conducts a whole study over Flower's messages. See docs/fault-simulator.md.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulations.fault_hospital import SimulatedHospital, Templates
from simulations.fault_invariants import LedgerReader, Observer, Violation
from simulations.fault_runs import Questions, WholeStudy, chosen_study, hospitals_of, to_its_end
from simulations.fault_scheduler import Odds, Scheduler
from simulations.fault_world import World

WHOLE_EVERY = 50
_DECLARED = 10
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory; each run has a folder of its own
_QUESTIONS = ("moments", "update", "histograms")


@dataclass(frozen=True)
class SeedResult:
    """How one seed ended: ``finished`` or ``refused``, or with a ``violation``."""

    seed: int
    is_whole: bool
    ended: str
    restarts: int
    events: int
    faults: Counter[str]
    violation: str | None
    trace: list[str] = field(repr=False)


@dataclass
class Totals:
    """What many seeds did together."""

    seeds: int = 0
    whole_studies: int = 0
    finished: int = 0
    refused: int = 0
    resumed: int = 0
    events: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[SeedResult] = field(default_factory=list)

    def add(self, result: SeedResult) -> None:
        """Count one seed."""
        self.seeds += 1
        self.whole_studies += result.is_whole
        self.finished += result.ended == "finished"
        self.refused += result.ended == "refused"
        self.resumed += result.ended == "finished" and result.restarts > 0
        self.events += result.events
        self.faults += result.faults
        if result.violation:
            self.violations.append(result)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "seeds": self.seeds,
            "whole_studies": self.whole_studies,
            "events": self.events,
            "faults": dict(sorted(self.faults.items())),
            "finished": self.finished,
            "resumed": self.resumed,
            "refused": self.refused,
            "violations": [
                {"seed": one.seed, "violation": one.violation, "trace": one.trace}
                for one in self.violations
            ],
        }


@dataclass
class Simulator:
    """Runs seeds. ``folder``: in memory, unless the disks shall be real. ``whole``: studies only."""

    folder: Path
    whole: bool = False
    _templates: Templates = field(init=False)

    def __post_init__(self) -> None:
        """Disks and patients are made when first used."""
        self._templates = Templates(self.folder)

    def run(self, seed: int, odds: Odds | None = None) -> SeedResult:
        """One seed from beginning to end; the same seed does the same."""
        scheduler = Scheduler(seed, odds)
        is_whole = self.whole or seed % WHOLE_EVERY == 0
        place = self.folder / f"run-{seed}"
        violation, ended = None, "failed"
        with _logs_to(scheduler):
            world, conductor = self._world(scheduler, place, is_whole)
            scheduler.checks.append(world.observer.check)
            try:
                ended = to_its_end(world, conductor)
                world.observer.check()
            except Violation as found:
                violation = str(found)
                scheduler.note(f"VIOLATION {violation}")
            finally:
                world.close()
                shutil.rmtree(place)
        return SeedResult(
            seed=seed,
            is_whole=is_whole,
            ended=ended,
            restarts=scheduler.faults["coordinator_crash"],
            events=scheduler.events,
            faults=scheduler.faults,
            violation=violation,
            trace=scheduler.trace,
        )

    def _world(
        self, scheduler: Scheduler, place: Path, is_whole: bool
    ) -> tuple[World, Callable[[], None]]:
        study = chosen_study(scheduler.rng)
        observer = Observer(study, _DECLARED)
        names = [f"hospital-{number + 1}" for number in range(hospitals_of(study))]
        pinned = {
            name: self._templates.disk(number, place / name) for number, name in enumerate(names)
        }
        hospitals = {
            name: SimulatedHospital(
                name,
                study,
                place / name,
                scheduler,
                observer,
                pinned,
                *self._templates.patients(study, name),
                as_deployed=is_whole,
            )
            for name in names
        }
        observer.readers = {name: LedgerReader(place / name / "ledger.db") for name in names}
        world = World(scheduler, observer, hospitals)
        if is_whole:
            return world, WholeStudy(world, study, place / "run")
        first = scheduler.rng.choices(range(len(_QUESTIONS)), (3, 1, 1))[0]
        last = first + scheduler.rng.choice((1, 1, 1, 2))
        return world, Questions(world, study, _QUESTIONS[first:last])


@contextmanager
def simulator(*, whole: bool = False, on_disk: bool = False) -> Iterator[Simulator]:
    """A simulator with a folder of its own, removed afterwards."""
    base = None if on_disk or not _MEMORY.is_dir() else _MEMORY
    with tempfile.TemporaryDirectory(prefix="consilium-faults-", dir=base) as folder:
        yield Simulator(Path(folder), whole)


@contextmanager
def _logs_to(scheduler: Scheduler) -> Iterator[None]:
    """What client and server would log becomes part of the trace."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            scheduler.note(f"  log: {record.getMessage()}")

    handler = Handler()
    loggers = [logging.getLogger(name) for name in ("client", "server")]
    before = [one.propagate for one in loggers]
    for one in loggers:
        one.addHandler(handler)
        one.propagate = False
    try:
        yield
    finally:
        for one, propagate in zip(loggers, before, strict=True):
            one.removeHandler(handler)
            one.propagate = propagate
