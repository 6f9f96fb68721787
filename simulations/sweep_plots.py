"""Pictures of settings against quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from common.learning.metrics import Interval
from common.tasks import Measure
from simulations.combinations import in_words, value_words
from simulations.comparison import CurvePoint, SweepPoint
from simulations.drawing import (
    STYLES,
    Picture,
    band,
    bars,
    canvas,
    frame,
    legend,
    picture,
)
from simulations.measures import axis_words, number

EPSILON = "privacy.epsilon"
_WIDE = 8.0  # from this ratio of largest to smallest on, an axis is logarithmic
_WHERE = "all test patients"
_ROW_INCHES = 0.22
_MOST_BANDS = 2  # more of them cover each other


@dataclass(frozen=True)
class Level:
    """Another way's figure, as a line across the picture."""

    label: str
    value: Interval
    colour: str
    line: str


def setting_plot(
    points: Sequence[SweepPoint],
    key: str,
    *,
    measure: Measure,
    unit: str,
    title: str,
    label: str = "federated student",
    levels: Sequence[Level] = (),
) -> Picture | None:
    """The student by ``measure`` against the setting ``key``, a line for each choice of the others.

    None when no figure exists, or there are more lines than can be told apart. ``unit``: the
    privacy unit; ``label``: of a single line.
    """
    known = [one for one in points if one.student[measure.key].count]
    series = _series(known, key, label)
    if not series or len(series) > len(STYLES):
        return None
    values = list(dict.fromkeys(value_words(one.settings[key]) for one in known))
    where = _positions([one.settings[key] for one in known])
    figure, axes = canvas(4.6 + _ROW_INCHES * len(series))
    span = min(where.values()), max(where.values())
    for index, (name, members) in enumerate(series.items()):
        ordered = sorted(members, key=lambda one: where[value_words(one.settings[key])])
        here = [where[value_words(one.settings[key])] for one in ordered]
        figures, style = [one.student[measure.key] for one in ordered], STYLES[index]
        if len(series) <= _MOST_BANDS:
            band(axes, here, figures, measure, label=name, style=style)
        else:
            apart = _apart(here, index, len(series), span)
            bars(axes, apart, figures, measure, label=name, style=style)
    drawn = [one.student[measure.key] for one in known]
    for level in (one for one in levels if one.value.count):
        mean = level.value.mean
        axes.axhline(
            mean,
            color=level.colour,
            linestyle=level.line,
            linewidth=1.6,
            label=f"{level.label}: {number(mean)}",
        )
        drawn.append(level.value)
    _ticks(axes, {where[value]: value for value in values})
    axes.set_xlabel(
        f"ε of the whole training, per {unit} (smaller protects more)" if key == EPSILON else key
    )
    axes.set_ylabel(axis_words(measure, _WHERE))
    axes.set_title(title)
    frame(axes, drawn, measure)
    legend(figure, axes)
    return picture(figure)


def traffic_plot(points: Sequence[SweepPoint], measure: Measure) -> Picture | None:
    """The student against the bytes of one hospital, a series for each value of the first setting.

    None when no figure exists, or every combination moves the same bytes.
    """
    known = [
        one for one in points if one.student[measure.key].count and one.bytes_per_hospital.count
    ]
    if len({round(one.bytes_per_hospital.mean) for one in known}) < 2:
        return None
    first = next(iter(known[0].settings))
    groups: dict[str, list[SweepPoint]] = {}
    for one in known:
        groups.setdefault(in_words({first: one.settings[first]}), []).append(one)
    if len(groups) > len(STYLES):
        return None
    figure, axes = canvas(4.4 + _ROW_INCHES * len(groups))
    span = min(map(_kilobytes, known)), max(map(_kilobytes, known))
    for (name, members), style in zip(groups.items(), STYLES, strict=False):
        ordered = sorted(members, key=_kilobytes)
        where = [_kilobytes(one) for one in ordered]
        bars(
            axes,
            _apart(where, list(groups).index(name), len(groups), span),
            [one.student[measure.key] for one in ordered],
            measure,
            label=name,
            style=style,
        )
    axes.set_xlabel("kilobytes that one hospital receives and sends in the whole study")
    axes.set_ylabel(axis_words(measure, _WHERE))
    axes.set_title("What does quality cost in traffic?")
    frame(axes, [one.student[measure.key] for one in known], measure)
    legend(figure, axes)
    return picture(figure)


def rounds_plot(curves: Mapping[str, Sequence[CurvePoint]], measure: Measure) -> Picture | None:
    """The leading ``measure`` after each round, a line for each combination, by its name."""
    known = {name: [one for one in points if one.figure.count] for name, points in curves.items()}
    known = {name: points for name, points in known.items() if points}
    if not known or len(known) > len(STYLES):
        return None
    figure, axes = canvas(4.4 + _ROW_INCHES * len(known))
    for (name, points), style in zip(known.items(), STYLES, strict=False):
        colour, marker, line = style
        axes.plot(
            [one.round for one in points],
            [one.figure.mean for one in points],
            color=colour,
            marker=marker,
            linestyle=line,
            linewidth=1.8,
            markersize=4.5,
            label=name,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel("round")
    axes.set_ylabel(axis_words(measure, _WHERE))
    axes.set_title("How fast does the teacher learn?")
    # Lines without bands: the means alone set the range.
    means = [one.figure.mean for points in known.values() for one in points]
    frame(axes, [Interval(one, one, one, 1) for one in means], measure)
    legend(figure, axes)
    return picture(figure)


def _series(points: Sequence[SweepPoint], key: str, label: str) -> dict[str, list[SweepPoint]]:
    found: dict[str, list[SweepPoint]] = {}
    for one in points:
        others = {name: value for name, value in one.settings.items() if name != key}
        found.setdefault(in_words(others) or label, []).append(one)
    return found


def _apart(
    where: Sequence[float], index: int, count: int, span: tuple[float, float]
) -> list[float]:
    """``where``, moved aside a little, so that series at the same places can be told apart."""
    low, high = span
    step = 0.012 * (index - (count - 1) / 2)
    if _is_wide(low, high):
        return [one * (high / low) ** step for one in where]
    return [one + (high - low or 1.0) * step for one in where]


def _positions(values: Sequence[Any]) -> dict[str, float]:
    """Where each value stands: numbers by size, everything else side by side."""
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
        return {value_words(one): float(one) for one in values}
    return {name: float(n) for n, name in enumerate(dict.fromkeys(value_words(v) for v in values))}


def _ticks(axes: Axes, names: Mapping[float, str]) -> None:
    low, high = min(names), max(names)
    if _is_wide(low, high):
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(names)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _named(value, names)))
    axes.xaxis.set_minor_locator(NullLocator())


def _is_wide(low: float, high: float) -> bool:
    return low > 0 and high / low >= _WIDE


def _kilobytes(one: SweepPoint) -> float:
    return one.bytes_per_hospital.mean / 1e3


def _named(value: float, names: Mapping[float, str]) -> str:
    return names[min(names, key=lambda one: abs(one - value))]
