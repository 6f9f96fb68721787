"""The figures of finished runs: every model at every hospital's test patients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.learning.metrics import Interval, held, mean_interval
from common.study import Study
from common.tasks import task_of
from server.store import RunFolder
from simulations.arms import ArmRun
from simulations.combinations import Combination
from simulations.comparison import (
    CurvePoint,
    SeedFigures,
    SweepPoint,
    over_seeds,
    quality,
    seed_figures,
)
from simulations.evaluation import Scores, finished_models, round_curve, score, together
from simulations.measures import Quality, measures_of
from simulations.worlds import Worlds

Ledger = Mapping[str, Mapping[str, Sequence[SeedFigures]]]
"""Role (student, teacher) → arm → figures, seed by seed."""


def score_runs(runs: Sequence[ArmRun], folder: Path, worlds: Worlds) -> Ledger:
    """Every arm's models at every hospital's test patients."""
    ledger: dict[str, dict[str, list[SeedFigures]]] = {"student": {}, "teacher": {}}
    for seed in dict.fromkeys(run.study.seed for run in runs):
        everywhere: dict[tuple[str, str], list[Scores]] = {}
        at_home: dict[tuple[str, str], list[Scores]] = {}
        for run in (one for one in runs if one.study.seed == seed):
            hospitals = worlds.judges(run.drawn_by)
            teacher, student, features = finished_models(RunFolder(folder / run.place), run.study)
            for role, model in (("teacher", teacher), ("student", student)):
                scored = score(model, run.study, features, hospitals)
                own = [one for one in scored if run.hospital in (None, one.hospital)]
                everywhere.setdefault((role, run.arm), []).append(together(scored))
                at_home.setdefault((role, run.arm), []).extend(own)
        for (role, arm), scores in everywhere.items():
            figures = seed_figures(scores, at_home[role, arm])
            ledger[role].setdefault(arm, []).append(figures)
    return ledger


def sweep_points(
    sweep: Sequence[Combination], folder: Path, seeds: Sequence[int], ledger: Ledger
) -> tuple[SweepPoint, ...]:
    """What each combination achieved, and what it took."""
    return tuple(_point(one, folder, seeds, ledger) for one in sweep)


def _point(one: Combination, folder: Path, seeds: Sequence[int], ledger: Ledger) -> SweepPoint:
    study, runs = one.study, runs_of_arm(folder, one.arm, seeds)
    student, teacher = (
        over_seeds(ledger[role][one.arm], measures_of(study)) for role in ("student", "teacher")
    )
    return SweepPoint(
        arm=one.arm,
        settings=dict(one.settings),
        epsilon=study.privacy.epsilon,
        rounds=study.finetune.rounds
        + (study.distill.rounds if study.distill.on == "patients" else 0),
        student=student.together,
        teacher=teacher.together,
        worst=student.worst,
        released=released(runs, study),
        bytes_per_hospital=bytes_per_hospital(runs),
    )


def runs_of_arm(folder: Path, arm: str, seeds: Sequence[int]) -> list[RunFolder]:
    """The runs of an arm in which all hospitals take part, or one roof."""
    return [RunFolder(folder / arm / f"seed-{seed}") for seed in seeds]


def bytes_per_hospital(runs: Sequence[RunFolder]) -> Interval:
    """Bytes that one hospital receives and sends for all rounds, on average, over several runs."""
    values = []
    for run in runs:
        forecast = run.read_json("result.json")["forecast"]
        moved = forecast["bytes_down"] + forecast["bytes_up"]
        values.append(moved / len(forecast["hospitals"]))
    return mean_interval(values)


def released(runs: Sequence[RunFolder], study: Study) -> Quality | None:
    """What the sum of the released histograms shows; None unless every run released some."""
    found = [released_figures(run, study) for run in runs]
    known = [one for one in found if one is not None]
    return quality(known) if len(known) == len(found) else None


def released_figures(run: RunFolder, study: Study) -> dict[str, float] | None:
    """What a coordinator would know of the run's student; None for nothing."""
    histograms = run.read_json("result.json")["evaluation"]
    if not histograms:
        return None
    total = np.sum([np.array(one["counts"]) for one in histograms], axis=0)
    figures = task_of(study).released_figures(total)
    return {one.key: held(figures[one.key], one.bounds) for one in measures_of(study)}


def curve(
    runs: Iterable[ArmRun], folder: Path, worlds: Worlds, stage: str
) -> tuple[CurvePoint, ...]:
    """The leading measure after each round of ``stage``, over the seeds of one arm."""
    by_round: dict[int, list[float]] = {}
    for run in runs:
        place, hospitals = RunFolder(folder / run.place), worlds.judges(run.drawn_by)
        for number, value in round_curve(place, run.study, hospitals, stage):
            by_round.setdefault(number, []).append(value)
    return tuple(
        CurvePoint(number, mean_interval(values)) for number, values in sorted(by_round.items())
    )
