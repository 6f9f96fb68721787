"""What a study measures of a model, as its task says; and how such figures are ordered and read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.learning.metrics import Interval, held
from common.study import Study
from common.tasks import Measure, task_of

Quality = Mapping[str, Interval]
"""How good a model is: each measure of the task by its key."""


def measures_of(study: Study) -> tuple[Measure, ...]:
    """All that the study's task measures; the first decides which of two models is better."""
    return task_of(study).measures


def measures_in(summary: Mapping[str, Any]) -> tuple[Measure, ...]:
    """What a run's summary has figures of: it says so itself."""
    return tuple(Measure(**one) for one in summary["measures"])


def leading(study: Study) -> Measure:
    """What decides which of two models is better."""
    return measures_of(study)[0]


def existing(measures: Sequence[Measure], quality: Quality) -> Measure:
    """The first measure of which ``quality`` has a figure; the leading one where it has none."""
    return next((one for one in measures if quality[one.key].count), measures[0])


def worst_key(measure: Measure, value: float) -> tuple[bool, float]:
    """Sorts figures: the worst first, those that do not exist last.

    >>> error = Measure("mae", "MAE", higher_is_better=False)
    >>> sorted([0.7, math.nan, 0.9], key=lambda value: worst_key(error, value))
    [0.9, 0.7, nan]
    """
    return (True, 0.0) if math.isnan(value) else (False, gain(measure, value))


def gain(measure: Measure, difference: float) -> float:
    """A difference turned so that above 0 is better."""
    return difference if measure.higher_is_better else -difference


def cut(one: Interval, measure: Measure) -> tuple[float, float]:
    """The interval within what the measure can be; the mean itself where one value stands alone."""
    if one.count < 2:
        return one.mean, one.mean
    return held(one.low, measure.bounds), held(one.high, measure.bounds)


def number(value: float | None, *, signed: bool = False, beside: float = 0.0) -> str:
    """A figure for a reader, a dash where it does not exist; large ones have fewer decimals.

    ``beside``: a figure in the same cell, whose decimals it shares.

    >>> number(0.98765), number(-0.5, signed=True), number(1523.4567), number(None)
    ('0.988', '−0.500', '1523.5', '—')
    """
    if value is None or math.isnan(value):
        return "—"
    largest = max(abs(value), abs(beside))
    decimals = 3 if largest < 10 else 2 if largest < 100 else 1
    value = round(value, decimals) + 0.0  # no negative zero
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def in_words(one: Interval, measure: Measure) -> str:
    """A figure in a sentence; its interval cut to what the measure can be."""
    if one.count == 0:
        return "none"
    if one.count == 1:
        return number(one.mean)
    low, high = cut(one, measure)
    return f"{number(one.mean)} (95 % interval {number(low)} to {number(high)})"


def capital(text: str) -> str:
    """The text as a sentence begins."""
    return text[:1].upper() + text[1:]


def axis_words(measure: Measure, where: str) -> str:
    """An axis's name: the measure on ``where``, and its direction where it is not the usual one."""
    return f"{measure.title} on {where}" + (
        "" if measure.higher_is_better else "\n(lower is better)"
    )


def direction_note(measures: Sequence[Measure]) -> str:
    """Which measures are better lower; empty where none is."""
    lower = [one.title for one in measures if not one.higher_is_better]
    return f"Lower is better for {listing(lower)}." if lower else ""


def missing_note(measures: Sequence[Measure]) -> str:
    """What a dash means."""
    needs = "; ".join(f"{one.title} needs {one.needs}" for one in measures if one.needs)
    return "— means that a figure does not exist" + (f": {needs}." if needs else ".")


def listing(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listing(["AUC"]), listing(["a", "b", "c"])
    ('AUC', 'a, b and c')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
