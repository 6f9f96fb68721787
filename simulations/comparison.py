"""What a comparison found: every arm's figures over the seeds, as plain frozen data.

AUC and accuracy are shares between 0 and 1. Every figure is an :class:`Interval`: the mean over
the seeds with Student's 95 % interval and the number of seeds behind it. An AUC does not exist
where the test patients have one class only: NaN here, null in JSON, a dash in tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.learning.metrics import Interval, mean_interval
from common.study import Study
from simulations.evaluation import Scores

_EQUAL = 1e-9  # a spread below it is rounding


@dataclass(frozen=True)
class Quality:
    """How good a model is: AUC and accuracy."""

    auc: Interval
    accuracy: Interval


@dataclass(frozen=True)
class Worst:
    """The hospital with the lowest mean over the seeds; None when no hospital has a figure."""

    hospital: str | None
    value: Interval


@dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """One arm's teacher or student at the test patients of all hospitals.

    ``together``: all hospitals' test patients as one set. ``mean_of_hospitals``: every hospital
    counts alike, however small. ``hospitals``: each hospital's own test patients.
    """

    together: Quality
    mean_of_hospitals: Quality
    worst_auc: Worst
    worst_accuracy: Worst
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
    """Students of two arms on the same test patients, seed by seed: the first minus the second."""

    first: str
    second: str
    together: Quality
    mean_of_hospitals: Quality
    hospitals: Mapping[str, Quality]


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """The federated student (and its teacher) under ``settings`` (dotted keys of the study file).

    ``arm`` names the folder of its runs. ``epsilon``: granted to training, None without privacy.
    ``rounds``: charged ones, of all stages. ``released``: as an arm's. ``bytes_per_hospital``:
    what one hospital receives and sends in the whole study.
    """

    arm: str
    settings: Mapping[str, Any]
    epsilon: float | None
    rounds: int
    student: Quality
    teacher: Quality
    worst_auc: Worst
    released: Quality | None
    bytes_per_hospital: Interval


@dataclass(frozen=True)
class CurvePoint:
    """AUC at all hospitals' test patients after ``round`` rounds (from 1)."""

    round: int
    auc: Interval


@dataclass(frozen=True, kw_only=True)
class HospitalFacts:
    """Lowest and highest over the seeds: what it declares, what it trains and is tested on.

    ``test_patients`` and ``rarest_class`` (test records of the rarer class) are exact counts, which
    only a simulation may show.
    """

    declared_patients: tuple[int, int]
    test_patients: tuple[int, int]
    rarest_class: tuple[int, int]


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

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``comparison.json``; figures that do not exist become None."""
        tree: dict[str, Any] = {
            "study": self.study.name,
            "study_digest": self.study.digest(),
            "interval": "95 %, Student's t over the seeds",
            "seeds": list(self.seeds),
            "hospitals": {name: asdict(one) for name, one in self.hospitals.items()},
            "arms": {name: asdict(one) for name, one in self.arms.items()},
            "differences": [asdict(one) for one in self.differences],
            "sweep": [asdict(one) for one in self.sweep],
            "curves": {
                name: [asdict(one) for one in points] for name, points in self.curves.items()
            },
        }
        return {key: without_nan(value) for key, value in tree.items()}


@dataclass(frozen=True, kw_only=True)
class SeedFigures:
    """One model (or, alone, one model a hospital) under one seed."""

    auc: float
    accuracy: float
    hospitals: Mapping[str, tuple[float, float]]

    @property
    def mean_of_hospitals(self) -> tuple[float, float]:
        """AUC and accuracy averaged over the hospitals that have one."""
        return (
            mean_interval([auc for auc, _ in self.hospitals.values()]).mean,
            mean_interval([accuracy for _, accuracy in self.hospitals.values()]).mean,
        )


def seed_figures(everywhere: Sequence[Scores], at_home: Sequence[Scores]) -> SeedFigures:
    """The figures of one seed.

    ``everywhere``: each model of the arm on all hospitals' test patients together; several models
    are averaged as figures, since scores of different models make no common ranking.
    ``at_home``: for each hospital, the model it would use on its own test patients.
    """
    return SeedFigures(
        auc=mean_interval([one.auc for one in everywhere]).mean,
        accuracy=mean_interval([one.accuracy for one in everywhere]).mean,
        hospitals={one.hospital: (one.auc, one.accuracy) for one in at_home},
    )


def over_seeds(seeds: Sequence[SeedFigures]) -> ModelFigures:
    """One model's figures with intervals over the seeds."""
    hospitals = {
        name: _quality([one.hospitals[name] for one in seeds]) for name in seeds[0].hospitals
    }
    return ModelFigures(
        together=_quality([(one.auc, one.accuracy) for one in seeds]),
        mean_of_hospitals=_quality([one.mean_of_hospitals for one in seeds]),
        worst_auc=_worst({name: one.auc for name, one in hospitals.items()}),
        worst_accuracy=_worst({name: one.accuracy for name, one in hospitals.items()}),
        hospitals=hospitals,
    )


def paired(first: str, second: str, seeds: Mapping[str, Sequence[SeedFigures]]) -> Difference:
    """``first`` minus ``second``, subtracted seed by seed before the interval is taken."""
    pairs = list(zip(seeds[first], seeds[second], strict=True))
    return Difference(
        first=first,
        second=second,
        together=_quality([(a.auc - b.auc, a.accuracy - b.accuracy) for a, b in pairs]),
        mean_of_hospitals=_quality(
            [_minus(a.mean_of_hospitals, b.mean_of_hospitals) for a, b in pairs]
        ),
        hospitals={
            name: _quality([_minus(a.hospitals[name], b.hospitals[name]) for a, b in pairs])
            for name in pairs[0][0].hospitals
        },
    )


def worst_first(figures: ModelFigures, measure: str) -> list[str]:
    """Hospitals by ascending mean of ``measure`` (``auc`` or ``accuracy``); without one, last."""
    means = {name: getattr(one, measure).mean for name, one in figures.hospitals.items()}
    return sorted(means, key=lambda name: (math.isnan(means[name]), means[name], name))


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
    mean = round(interval.mean, 3) + 0.0  # no negative zero
    text = f"{mean:+.3f}".replace("-", "−") if signed else f"{mean:.3f}"
    if interval.count > 1:
        half = (interval.high - interval.low) / 2
        # Equal values, such as 1.000 three times over, are no proof of certainty.
        text += f" ±{half:.3f}" if half > _EQUAL else " (equal)"
    return text + (f" ({interval.count} of {seeds})" if interval.count < seeds else "")


def span(pair: tuple[int, int]) -> str:
    """Lowest and highest as text.

    >>> span((3, 5)), span((4, 4))
    ('3–5', '4')
    """
    low, high = pair
    return str(low) if low == high else f"{low}–{high}"


def _quality(pairs: Sequence[tuple[float, float]]) -> Quality:
    return Quality(
        mean_interval([one for one, _ in pairs]), mean_interval([two for _, two in pairs])
    )


def _minus(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return first[0] - second[0], first[1] - second[1]


def _worst(values: Mapping[str, Interval]) -> Worst:
    known = {name: one for name, one in values.items() if one.count}
    if not known:
        return Worst(None, mean_interval([]))
    name = min(known, key=lambda name: (known[name].mean, name))
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
