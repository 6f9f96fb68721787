"""What the coordinator does in a run: a few questions to its panel, or a whole study on disk.

Either way it is started again after every crash and every refusal, as the service does, and once
faults have stopped it must come to an end: the result, or a refusal that lost attempts explain.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.training import read_assignment
from common.errors import RunError
from common.features import FeatureMap, range_scaling, scaling_from_tensor, scaling_tensor
from common.models import build_student, build_teacher, learner
from common.privacy.units import Trust
from common.study import Study, parse_study
from common.tensors import get_vector
from common.wire import EvaluateTask, Hello, TrainTask
from server.aggregate import Attempts
from server.conduct import conduct
from server.finish import finish
from server.flower_link import Enrolled, GridLink
from server.panel import Panel, memory_attempts
from server.store import Checkpoint, RunFolder
from simulations.fault_invariants import ViolationError
from simulations.fault_scheduler import Crash, Scheduler
from simulations.fault_world import TIMEOUT_S, FaultyGrid, FaultyLink, World

_MOST_LIVES = 3  # of the coordinator before faults stop
_LONGEST_PAUSE_S = 60.0
_SETTLING_S = 1000.0  # more than any message is held back

# trust, hospitals, tolerated dropouts and colluders, spare attempts, distillation on patients; and
# how often it is run: more hospitals cost more time
_SHAPES = (
    (("local", 2, 0, 0, 0, True), 24),
    (("local", 3, 0, 0, 0, False), 4),
    (("distributed", 3, 0, 1, 0, False), 6),
    (("distributed", 3, 0, 0, 1, False), 5),
    (("distributed", 4, 1, 0, 1, False), 2),
    (("distributed", 5, 1, 1, 2, True), 1),
)


@lru_cache(maxsize=1)
def studies() -> tuple[Study, ...]:
    """Studies of a few parameters in both trust modes, whose budgets are worked out once."""
    return tuple(_study(number, *shape) for number, (shape, _) in enumerate(_SHAPES))


def chosen_study(rng: random.Random) -> Study:
    """One of them."""
    return rng.choices(studies(), [often for _, often in _SHAPES])[0]


def _study(
    number: int,
    trust: str,
    hospitals: int,
    dropouts: int,
    colluders: int,
    spare: int,
    on_patients: bool,
) -> Study:
    sgd = {"kind": "sgd", "learning_rate": 0.5}
    in_sums = trust == "distributed"
    federation: dict[str, Any] = {"minimum_hospitals": hospitals - 1, "round_timeout_s": TIMEOUT_S}
    if in_sums:
        federation |= {
            "minimum_hospitals": 2,
            "hospitals": hospitals,
            "tolerated_dropouts": dropouts,
            "tolerated_colluders": colluders,
        }
    return parse_study(
        {
            "name": f"faults-{number}",
            "task": "diagnosis",
            "scaling": "private",
            "dictionary": {
                "patient_id": "patient",
                "label": {"name": "ill", "classes": [[0], [1]]},
                "columns": [{"name": "a", "kind": "numeric", "range": [-1.0, 1.0]}],
            },
            "public": {"kind": "dictionary", "records": 4},
            "teacher": {"kind": "mlp", "hidden": [2]},
            "student": {"kind": "mlp", "hidden": [1]},
            "pretrain": {"steps": 0, "optimiser": sgd},
            "finetune": {"rounds": 2, "optimiser": sgd},
            "distill": {
                "on": "patients" if on_patients else "public",
                "steps": 1,
                "rounds": 1,
                "optimiser": sgd,
            },
            "privacy": {
                "trust": trust,
                "epsilon": 4.0,
                "delta": 1e-5,
                "spare_attempts": spare,
            },
            "federation": federation,
            "evaluation": {"epsilon": 2.0, "bins": 2},
            "simulation": {
                "source": {"kind": "csv", "path": "none.csv"},
                "hospitals": hospitals,
            },
        },
        origin="faults",
    )


def hospitals_of(study: Study) -> int:
    """How many hospitals a study of the simulator has."""
    assert study.simulation is not None and study.simulation.hospitals is not None  # noqa: S101
    return study.simulation.hospitals


def to_its_end(world: World, run: Callable[[], None]) -> str:
    """``run`` again and again, as a service does: ``finished``, or ``refused`` for good.

    Raises ViolationError when it comes to no end although nothing fails any more.
    """
    scheduler = world.scheduler
    lives = scheduler.rng.randint(1, _MOST_LIVES)
    for life in itertools.count():
        try:
            if life == lives:
                world.heal()
                scheduler.sleep(_SETTLING_S)
            scheduler.note(f"the coordinator starts, life {life + 1}")
            run()
        except Crash:
            scheduler.faults["restart"] += 1
        except RunError as error:
            scheduler.note(f"the coordinator stops: {error}")
            if scheduler.is_calm:
                _check_refusal(world, str(error))
                return "refused"
        except Exception as error:
            if isinstance(error, ViolationError):
                raise
            raise ViolationError(f"the coordinator failed unexpectedly: {error!r}") from error
        else:
            return "finished"
        if not scheduler.is_calm:
            _pause(scheduler)
    raise AssertionError


def _pause(scheduler: Scheduler) -> None:
    try:
        scheduler.sleep(scheduler.rng.uniform(0.0, _LONGEST_PAUSE_S))
    except Crash:
        scheduler.note("the coordinator dies before it was ready")


def _check_refusal(world: World, reason: str) -> None:
    """A refusal is sound when attempts lost to faults have used up what the study budgeted."""
    study, observer = world.observer.study, world.observer
    in_sums = study.privacy.trust is Trust.DISTRIBUTED
    federation = study.federation
    if in_sums:
        assert federation.hospitals is not None  # noqa: S101
        needed = federation.hospitals - federation.tolerated_dropouts
    else:
        needed = federation.minimum_hospitals
    able = [one for one in world.hospitals if not observer.is_exhausted(one, observer.newest)]
    if len(able) >= needed:
        raise ViolationError(
            f"no end although faults have stopped: {len(able)} hospitals can answer "
            f"{observer.newest[0]} round {observer.newest[1]}, {needed} are needed ({reason})"
        )


@dataclass
class Questions:
    """A few questions to the panel, in the order of a study; those answered are not repeated."""

    world: World
    study: Study
    wanted: tuple[str, ...]
    _attempts: Attempts = field(default_factory=memory_attempts)
    _answered: int = 0

    def __call__(self) -> None:
        """One life of the coordinator. Raises RunError where it must stop."""
        link = FaultyLink(self.world)
        hello = Hello(study_digest=self.study.digest())
        members = {one.hospital: one for one in link.greet(hello)}
        if len(members) < self.study.federation.minimum_hospitals:
            raise RunError(f"{len(members)} hospitals are there")
        panel = Panel(self.study, link, members, self._attempts)
        while self._answered < len(self.wanted):
            {"moments": self._moments, "update": self._update, "histograms": self._histograms}[
                self.wanted[self._answered]
            ](panel)
            self._answered += 1

    def _moments(self, panel: Panel) -> None:
        found = panel.moments()
        self.world.observer.believes(("statistics", 0), found.sums, found.hospitals)

    def _update(self, panel: Panel) -> None:
        teacher, student, moments, weights = _models(self.study.name)
        task = TrainTask(
            study_digest=self.study.digest(),
            stage="finetune",
            round=0,
            attempt=0,
            teacher=teacher,
            student=student,
            scaling=moments,
        )
        found, hospitals = panel.update(task, weights)
        self.world.observer.believes(("finetune", 0), found, hospitals, "update")

    def _histograms(self, panel: Panel) -> None:
        _, student, moments, _ = _models(self.study.name)
        task = EvaluateTask(study_digest=self.study.digest(), student=student, scaling=moments)
        for one in panel.histograms(task):
            self.world.observer.believes(("evaluate", 0), one.counts, len(one.hospitals))


@lru_cache(maxsize=16)
def _models(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, int]:
    """A teacher and a student as they are sent, their scaling, and how much of one learns."""
    (study,) = (one for one in studies() if one.name == name)
    moments = scaling_tensor(study.dictionary, range_scaling(study.dictionary))
    features = FeatureMap(study.dictionary, scaling_from_tensor(study.dictionary, moments))
    teacher, student = build_teacher(study, features), build_student(study, features)
    states = [
        {name: one.detach().clone() for name, one in model.state_dict().items()}
        for model in (teacher, student)
    ]
    return states[0], states[1], moments, get_vector(learner(study, teacher)).numel()


@dataclass(frozen=True)
class MortalRun(RunFolder):
    """The run folder, in a process that may die between its writes; its models are checked."""

    world: World
    study: Study

    def write_json(self, name: str, value: Any) -> None:
        """See ``RunFolder``."""
        self._point(f"{name} not yet written")
        super().write_json(name, value)
        self._point(f"{name} written")

    def checkpoint(self, done: Checkpoint) -> None:
        """See ``RunFolder``."""
        self._point("checkpoint not yet begun")
        super().checkpoint(done)
        self._point("checkpoint done")

    def save_round(self, stage: str, number: int, weights: Tensor) -> None:
        """See ``RunFolder``; the model must have moved by what the hospitals released."""
        task = self.world.observer.asked[stage, number - 1]
        moved = weights - read_assignment(self.study, task).start
        self.world.observer.believes((stage, number - 1), moved, None, "update")
        super().save_round(stage, number, weights)
        self._point("round saved")

    def _point(self, place: str) -> None:
        self.world.scheduler.point("coordinator_crash", place)


@dataclass(frozen=True)
class WholeStudy:
    """A study conducted over Flower's messages, from the run folder's last checkpoint on."""

    world: World
    study: Study
    path: Path

    def __call__(self) -> None:
        """One life of the coordinator. Raises RunError where it must stop."""
        run = MortalRun(self.path, self.world, self.study)
        if not (self.path / "environment.json").exists():
            RunFolder.create(self.path, self.study)
        grid = FaultyGrid(self.world)
        link = GridLink(
            grid,
            minimum_nodes=self.study.federation.minimum_hospitals,
            timeout_s=self.study.federation.round_timeout_s,
            enrolled=Enrolled(grid.names, grid.activations),
            timer=self.world.scheduler,
        )
        outcome = conduct(self.study, link, run, None, lambda _: None)
        for one in outcome.facts["evaluation"]:
            counts, hospitals = torch.tensor(one["counts"]), len(one["hospitals"])
            self.world.observer.believes(("evaluate", 0), counts, hospitals)
        finish(self.study, run, outcome)
