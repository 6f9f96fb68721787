"""What an attack did to a finished run: beside the same study without it.

The twin run has the same seed, hospitals and everything else that goes wrong. Where noise is
secret it has noise of its own, so that small differences are the noise's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.hospital import Hospital
from common.learning.evaluate import predictions
from common.study import Study
from common.tasks import Floats, Measure, task_of
from server.conduct import Progress
from server.store import RunFolder
from simulations.bootstrap import interval
from simulations.evaluation import finished_models
from simulations.measures import gain, measures_of
from simulations.poison import attackers, scenario_of, stamp
from simulations.simulate import resume, simulate

TWIN = "without-attack"


def run_twin(path: Path, watch: Callable[[Progress], None], *, debug: bool = False) -> None:
    """The same run without its attack, in ``path/without-attack``; nothing where none attacks.

    Continues an interrupted twin; a finished one is left alone.
    """
    run, study = RunFolder.open(path)
    if scenario_of(study).attack is None:
        return
    twin = path / TWIN
    if (twin / "simulation.json").exists():
        resume(twin, watch, debug=debug)
        return
    settings = run.read_json("simulation.json")
    simulate(
        study.revised(simulation__scenario__attack=None),
        twin,
        Path(settings["data_folder"]),
        watch,
        noise_seed=settings["noise_seed"],
        engine=settings.get("engine", "one-by-one"),
        memory_bytes=settings.get("memory_bytes"),
        replace=True,  # an interruption before its settings were written
        debug=debug,
    )


def attack_outcome(
    run: RunFolder, study: Study, hospitals: list[Hospital]
) -> dict[str, Any] | None:
    """What the attack cost; None where none attacks. Each figure as [value, low, high].

    ``KEY_loss`` for each measure of the task: how much worse the student is at all (honest) test
    patients than that of the run without attack; None before that has finished. ``backdoor_rate``:
    of test patients of other classes who are given the target class once the trigger is stamped on
    them; ``backdoor_rate_without``: by the student of the run without attack. The same of the
    teacher, which learns from the poisoned records themselves: a student that learns on public
    records, where the trigger is rare, hardly takes it over.
    """
    attack = scenario_of(study).attack
    if attack is None:
        return None
    labels = np.concatenate([one.test.labels for one in hospitals])
    attacked = _predictions(run, study, hospitals)
    twin = RunFolder(run.path / TWIN)
    honest = None
    if (twin.path / "result.json").exists():
        honest = _predictions(twin, study, hospitals)
    found: dict[str, Any] = {"kind": attack.kind, "hospitals": sorted(attackers(study))}
    for measure in measures_of(study):
        found[f"{measure.key}_loss"] = (
            None if honest is None else _known(_loss(measure, study, labels, honest, attacked))
        )
    if attack.kind == "backdoor":
        assert attack.target_class is not None  # noqa: S101  (the study file refuses it otherwise)
        others = labels != attack.target_class
        for key, folder, taught in (
            ("backdoor_rate", run, False),
            ("backdoor_rate_without", twin, False),
            ("teacher_backdoor_rate", run, True),
            ("teacher_backdoor_rate_without", twin, True),
        ):
            found[key] = None
            if (folder.path / "result.json").exists():
                given = _predictions(folder, study, hospitals, triggered=True, teacher=taught)
                hit = (given.argmax(axis=1) == attack.target_class)[others].astype(float)
                found[key] = _known(interval(_share, labels[others], hit, seed=study.seed))
    return found


def _loss(
    measure: Measure, study: Study, labels: NDArray[Any], honest: Floats, attacked: Floats
) -> tuple[float, float, float]:
    task = task_of(study)

    def figure(rows: NDArray[Any], predictions: Floats) -> float:
        return task.figures(rows, predictions)[measure.key]

    def lost(rows: NDArray[Any], before: Floats, after: Floats) -> float:
        return gain(measure, figure(rows, before) - figure(rows, after))

    return interval(lost, labels, honest, attacked, seed=study.seed)


def _predictions(
    run: RunFolder,
    study: Study,
    hospitals: list[Hospital],
    *,
    triggered: bool = False,
    teacher: bool = False,
) -> Floats:
    """Of the run's student (or ``teacher``), at all test records [rows, …]."""
    taught, learned, features = finished_models(run, study)
    model = taught if teacher else learned
    attack = scenario_of(study).attack
    tables = [one.test for one in hospitals]
    if triggered and attack is not None:
        tables = [stamp(attack, table) for table in tables]
    task = task_of(study)
    return np.concatenate([predictions(task, model, features.encode(table)) for table in tables])


def _share(labels: NDArray[Any], hit: Floats) -> float:  # noqa: ARG001 - a figure has labels
    return float(hit.mean())


def _known(values: tuple[float, float, float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]
