"""Deterministic fault simulation: the real client, server and secure aggregation, seed by seed.

``consilium faults`` runs it. Most seeds ask a panel a few questions over ledgers in memory; every
hundredth conducts a whole study over Flower's messages. See docs/fault-simulator.md.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from simulations.fault_hospital import SimulatedHospital, Templates
from simulations.fault_invariants import LedgerReader, Observer, ViolationError
from simulations.fault_runs import Questions, WholeStudy, chosen_study, hospitals_of, to_its_end
from simulations.fault_scheduler import Odds, Scheduler
from simulations.fault_world import World

WHOLE_EVERY = 100
_DECLARED = 10
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory; each run has a folder of its own
_MOST_SHOWN = 3
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
    traces: dict[int, list[str]] = field(default_factory=dict)

    def add(self, result: SeedResult, *, keep_trace: bool = False) -> None:
        """Count one seed."""
        if keep_trace:
            self.traces[result.seed] = result.trace
        self.seeds += 1
        self.whole_studies += result.is_whole
        self.finished += result.ended == "finished"
        self.refused += result.ended == "refused"
        self.resumed += result.ended == "finished" and result.restarts > 0
        self.events += result.events
        self.faults += result.faults
        if result.violation:
            self.violations.append(result)

    def join(self, other: Totals) -> None:
        """Count all that another process ran."""
        for name in ("seeds", "whole_studies", "finished", "refused", "resumed", "events"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults += other.faults
        self.violations += other.violations
        self.traces |= other.traces

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
            **({"traces": self.traces} if self.traces else {}),
        }


@dataclass
class Simulator:
    """Runs seeds in ``folder``, which is in memory unless disks shall be real.

    ``whole``: whole studies only.
    """

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
            except ViolationError as found:
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
        first = scheduler.rng.choices(range(len(_QUESTIONS)), (5, 1, 1))[0]
        last = first + scheduler.rng.choices((1, 2), (9, 1))[0]
        return world, Questions(world, study, _QUESTIONS[first:last])


@contextmanager
def simulator(*, whole: bool = False, on_disk: bool = False) -> Iterator[Simulator]:
    """A simulator with a folder of its own, removed afterwards."""
    base = None if on_disk or not _MEMORY.is_dir() else _MEMORY
    with tempfile.TemporaryDirectory(prefix="consilium-faults-", dir=base) as folder:
        yield Simulator(Path(folder), whole)


def run_seeds(
    seeds: range,
    *,
    jobs: int = 1,
    whole: bool = False,
    on_disk: bool = False,
    keep_traces: bool = False,
) -> Totals:
    """Run ``seeds`` in ``jobs`` processes; see ``Simulator``."""
    part = partial(_run_part, whole=whole, on_disk=on_disk, keep_traces=keep_traces)
    if jobs == 1:
        return part(seeds)
    totals = Totals()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for one in pool.map(part, [seeds[start::jobs] for start in range(jobs)]):
            totals.join(one)
    totals.violations.sort(key=lambda one: one.seed)
    return totals


def _run_part(seeds: range, *, whole: bool, on_disk: bool, keep_traces: bool) -> Totals:
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    totals = Totals()
    with simulator(whole=whole, on_disk=on_disk) as simulated:
        for seed in seeds:
            totals.add(simulated.run(seed), keep_trace=keep_traces)
    return totals


def render(totals: Totals) -> str:
    """The totals for a person; of a broken invariant the seed and all its events."""
    lines = [
        f"{totals.seeds} seeds ({totals.whole_studies} whole studies), {totals.events} events",
        "faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(totals.faults.items())),
        f"finished {totals.finished} (resumed {totals.resumed}), refused {totals.refused}, "
        f"violations {len(totals.violations)}",
    ]
    for seed, trace in sorted(totals.traces.items()):
        lines += ["", f"seed {seed}", *trace]
    for one in totals.violations[:_MOST_SHOWN]:
        whole = " --whole" if one.is_whole and one.seed % WHOLE_EVERY else ""
        lines += [
            "",
            f"VIOLATION at seed {one.seed}: {one.violation}",
            *(one.trace if one.seed not in totals.traces else ()),
            f"again: consilium faults --seeds 1 --seed {one.seed}{whole}",
        ]
    return "\n".join(lines)


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
