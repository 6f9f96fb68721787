"""What a comparison found: every arm's figures over the seeds, as plain frozen data.

What is measured is the task's to say (``common.tasks``). Every figure is an :class:`Interval`: the
mean over the seeds with Student's 95 % interval and the number of seeds behind it. A figure may not
exist, as an AUC where the test patients have one class only: NaN here, null in JSON, a dash in
tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.learning.metrics import Interval, mean_interval
from common.study import Study
from common.tasks import Measure
from simulations.evaluation import Scores
from simulations.measures import Quality, leading, measures_of, number, worst_key

_EQUAL = 1e-9  # a spread below it is rounding


@dataclass(frozen=True)
class Worst:
    """The hospital with the worst mean over the seeds; None when no hospital has a figure."""

    hospital: str | None
    value: Interval


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """One arm's teacher or student at the test patients of all hospitals.

    ``together``: all hospitals' test patients as one set. ``mean_of_hospitals``: every hospital
    counts alike, however small. ``worst``: by the key of each measure. ``hospitals``: each
    hospital's own test patients.
    """

    together: Quality
    mean_of_hospitals: Quality
    worst: Mapping[str, Worst]
    hospitals: Mapping[str, Quality]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training. ``epsilon`` is what its training was granted, None without privacy.

    ``released``: what a coordinator of real hospitals would know of the student, from the sum of
    the noised histograms; None where the study grants evaluation no budget.
    """

    title: str
    epsilon: float | None
    student: ModelFigures
    teacher: ModelFigures
    released: Quality | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Students of two arms on the same test patients, seed by seed: the first minus the second.

    Where lower is better, below 0 the first is better.
    """

    first: str
    second: str
    together: Quality
    mean_of_hospitals: Quality
    hospitals: Mapping[str, Quality]


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """The federated student (and its teacher) under ``settings`` (dotted keys of the study file).

    ``arm`` names the folder of its runs. ``epsilon``: granted to training, None without privacy.
    ``rounds``: charged ones, of all stages. ``worst``: the student's. ``released``: as an arm's.
    ``bytes_per_hospital``: what one hospital receives and sends in the whole study.
    """

    arm: str
    settings: Mapping[str, Any]
    epsilon: float | None
    rounds: int
    student: Quality
    teacher: Quality
    worst: Mapping[str, Worst]
    released: Quality | None
    bytes_per_hospital: Interval


@dataclass(frozen=True)
class CurvePoint:
    """The leading measure at all hospitals' test patients after ``round`` rounds (from 1)."""

    round: int
    figure: Interval


@dataclass(frozen=True, kw_only=True)
class HospitalFacts:
    """Lowest and highest over the seeds: what it declares, what it trains and is tested on.

    ``test_patients`` and ``rarest`` (test records of the rarest class; None where the outcome has
    no classes) are exact counts, which only a simulation may show.
    """

    declared_patients: tuple[int, int]
    test_patients: tuple[int, int]
    rarest: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A whole comparison and where its runs lie."""

    study: Study
    folder: Path
    seeds: tuple[int, ...]
    hospitals: Mapping[str, HospitalFacts]
    arms: Mapping[str, Arm]
    differences: tuple[Difference, ...]
    sweep: tuple[SweepPoint, ...]
    curves: Mapping[str, tuple[CurvePoint, ...]]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What the study's task measures, the leading one first."""
        return measures_of(self.study)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``comparison.json``; figures that do not exist become None."""
        tree: dict[str, Any] = {
            "study": self.study.name,
            "study_digest": self.study.digest(),
            "interval": "95 %, Student's t over the seeds",
            "seeds": list(self.seeds),
            "measures": [asdict(one) for one in self.measures],
            "hospitals": {name: asdict(one) for name, one in self.hospitals.items()},
            "arms": {name: asdict(one) for name, one in self.arms.items()},
            "differences": [asdict(one) for one in self.differences],
            "sweep": [asdict(one) for one in self.sweep],
            "curves": curves_json(self.curves, leading(self.study)),
        }
        return {key: without_nan(value) for key, value in tree.items()}


@dataclass(frozen=True, kw_only=True)
class SeedFigures:
    """One model (or, alone, one model a hospital) under one seed: each measure by its key."""

    together: Mapping[str, float]
    hospitals: Mapping[str, Mapping[str, float]]

    @property
    def mean_of_hospitals(self) -> Mapping[str, float]:
        """Each measure averaged over the hospitals that have a figure."""
        return _means(list(self.hospitals.values()))


def seed_figures(everywhere: Sequence[Scores], at_home: Sequence[Scores]) -> SeedFigures:
    """The figures of one seed.

    ``everywhere``: each model of the arm on all hospitals' test patients together; several models
    are averaged as figures, since scores of different models make no common ranking.
    ``at_home``: for each hospital, the model it would use on its own test patients.
    """
    return SeedFigures(
        together=_means([one.figures for one in everywhere]),
        hospitals={one.hospital: one.figures for one in at_home},
    )


def over_seeds(seeds: Sequence[SeedFigures], measures: Sequence[Measure]) -> ModelFigures:
    """One model's figures with intervals over the seeds."""
    hospitals = {
        name: quality([one.hospitals[name] for one in seeds]) for name in seeds[0].hospitals
    }
    return ModelFigures(
        together=quality([one.together for one in seeds]),
        mean_of_hospitals=quality([one.mean_of_hospitals for one in seeds]),
        worst={one.key: _worst(one, hospitals) for one in measures},
        hospitals=hospitals,
    )


def paired(first: str, second: str, seeds: Mapping[str, Sequence[SeedFigures]]) -> Difference:
    """``first`` minus ``second``, subtracted seed by seed before the interval is taken."""
    pairs = list(zip(seeds[first], seeds[second], strict=True))
    return Difference(
        first=first,
        second=second,
        together=quality([_minus(a.together, b.together) for a, b in pairs]),
        mean_of_hospitals=quality(
            [_minus(a.mean_of_hospitals, b.mean_of_hospitals) for a, b in pairs]
        ),
        hospitals={
            name: quality([_minus(a.hospitals[name], b.hospitals[name]) for a, b in pairs])
            for name in pairs[0][0].hospitals
        },
    )


def quality(each: Sequence[Mapping[str, float]]) -> Quality:
    """Every measure with its interval over independent repetitions."""
    return {key: mean_interval([one[key] for one in each]) for key in each[0]}


def worst_first(figures: ModelFigures, measure: Measure) -> list[str]:
    """Hospitals from the worst mean of ``measure`` to the best; without one, last."""
    means = {name: one[measure.key].mean for name, one in figures.hospitals.items()}
    return sorted(means, key=lambda name: (worst_key(measure, means[name]), name))


def shown(interval: Interval, *, seeds: int, signed: bool = False) -> str:
    """A figure for a table: mean ± half the 95 % interval, and how many seeds when not all.

    >>> shown(mean_interval([0.9, 0.92, 0.94]), seeds=3)
    '0.920 ±0.050'
    >>> shown(mean_interval([0.9, math.nan, math.nan]), seeds=3)
    '0.900 (1 of 3)'
    >>> shown(mean_interval([1.0, 1.0]), seeds=2)
    '1.000 (equal)'
    >>> shown(mean_interval([math.nan]), seeds=1)
    '—'
    """
    if interval.count == 0:
        return "—"
    half = (interval.high - interval.low) / 2 if interval.count > 1 else 0.0
    text = number(interval.mean, signed=signed, beside=half)
    if interval.count > 1:
        # Equal values, such as 1.000 three times over, are no proof of certainty.
        text += f" ±{number(half, beside=interval.mean)}" if half > _EQUAL else " (equal)"
    return text + (f" ({interval.count} of {seeds})" if interval.count < seeds else "")


def span(pair: tuple[int, int]) -> str:
    """Lowest and highest as text.

    >>> span((3, 5)), span((4, 4))
    ('3–5', '4')
    """
    low, high = pair
    return str(low) if low == high else f"{low}–{high}"


def curves_json(
    curves: Mapping[str, Sequence[CurvePoint]], measure: Measure
) -> dict[str, list[dict[str, Any]]]:
    """Curves as plain data: each point's figure under the key of ``measure``."""
    return {
        name: [{"round": one.round, measure.key: asdict(one.figure)} for one in points]
        for name, points in curves.items()
    }


def _means(each: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return {key: one.mean for key, one in quality(each).items()}


def _minus(first: Mapping[str, float], second: Mapping[str, float]) -> Mapping[str, float]:
    return {key: value - second[key] for key, value in first.items()}


def _worst(measure: Measure, hospitals: Mapping[str, Quality]) -> Worst:
    known = {name: one[measure.key] for name, one in hospitals.items() if one[measure.key].count}
    if not known:
        return Worst(None, mean_interval([]))
    name = min(known, key=lambda name: (worst_key(measure, known[name].mean), name))
    return Worst(name, known[name])


def without_nan(value: Any) -> Any:
    """Plain data for JSON, which has no NaN: None in its place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return value
