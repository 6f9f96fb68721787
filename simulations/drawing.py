"""What every picture has in common: canvas, bands, axes, and how it is written.

Colours are Okabe and Ito's, told apart by every kind of colour vision; marker and line style
repeat what colour says. Intervals are 95 %, cut to what the measure can be.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.learning.metrics import Interval
from common.tasks import Measure
from simulations.measures import cut

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#007A5A", "#595959"
PURPLE, ORANGE, SKY = "#AA4499", "#B36B00", "#2B8CBE"
_DPI = 150
_NEAR_CHANCE = 0.15

Style = tuple[str, str, str]
"""Colour, marker and line style of one series."""
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
STYLES: tuple[Style, ...] = tuple(
    (colour, marker, line)
    for line in ("-", "--", ":")
    for colour, marker in zip(_COLOURS, "os^Dv*", strict=True)
)


@dataclass(frozen=True)
class Picture:
    """One picture as PNG and as SVG; the same figures give the same bytes."""

    png: bytes
    svg: bytes


def canvas(height_inches: float) -> tuple[Figure, Axes]:
    """An empty picture with one pair of axes."""
    figure = Figure(figsize=(8.0, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set_fontsize(13)
    return figure, axes


def band(
    axes: Axes,
    where: Sequence[float],
    values: Sequence[Interval],
    measure: Measure,
    *,
    label: str,
    style: Style = STYLES[0],
) -> None:
    """Means joined by a line, their intervals as a band."""
    colour, marker, line = style
    bounds = [cut(one, measure) for one in values]
    if any(high > low for low, high in bounds):
        axes.fill_between(
            where,
            [low for low, _ in bounds],
            [high for _, high in bounds],
            color=colour,
            alpha=0.18,
            linewidth=0,
            label="95 % interval",
        )
    axes.plot(
        where,
        [one.mean for one in values],
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=2,
        markersize=6,
        label=label,
    )


def bars(
    axes: Axes,
    where: Sequence[float],
    values: Sequence[Interval],
    measure: Measure,
    *,
    label: str,
    style: Style,
) -> None:
    """Means joined by a thin line, their intervals as bars: for more series than bands can show."""
    colour, marker, line = style
    bounds = [cut(one, measure) for one in values]
    means = [one.mean for one in values]
    axes.errorbar(
        where,
        means,
        yerr=[
            [mean - low for mean, (low, _) in zip(means, bounds, strict=True)],
            [high - mean for mean, (_, high) in zip(means, bounds, strict=True)],
        ],
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=1.2,
        markersize=6.5,
        elinewidth=1.4,
        capsize=3,
        label=label,
    )


def frame(axes: Axes, drawn: Sequence[Interval], measure: Measure) -> None:
    """The vertical range: all that is drawn, within what the measure can be, and chance."""
    low = min(cut(one, measure)[0] for one in drawn)
    high = max(cut(one, measure)[1] for one in drawn)
    margin = max(0.05 * (high - low), 0.002 * max(1.0, abs(high)))
    least, most = measure.bounds
    bottom = low - margin if least is None else max(least, low - margin) - 0.25 * margin
    top = high + margin if most is None else min(most, high + margin) + 0.25 * margin
    if measure.chance is not None:
        bottom, top = _show_chance(axes, measure.chance, bottom, top)
    axes.set_ylim(bottom, top)


def _show_chance(axes: Axes, chance: float, bottom: float, top: float) -> tuple[float, float]:
    """A line where chance lies near what is drawn, else a word on where it is; the range then."""
    if bottom - _NEAR_CHANCE < chance < top + _NEAR_CHANCE:
        chance_line(axes.axhline, chance)
        return min(bottom, chance - 0.02), max(top, chance + 0.02)
    below = chance <= bottom
    arrow, where = ("↓", "below") if below else ("↑", "above")
    axes.annotate(
        f"{arrow} chance is {chance:.1f}, {where} this axis",
        (0.99, 0.02 if below else 0.98),
        xycoords="axes fraction",
        ha="right",
        va="bottom" if below else "top",
        color=GREY,
        fontsize=9,
    )
    return bottom, top


def chance_line(line: Callable[..., Any], chance: float) -> None:
    """Chance as a line: ``line`` is a pair of axes' ``axhline`` or ``axvline``."""
    line(chance, color=GREY, linestyle=":", linewidth=1.4, label=f"chance: {chance:.1f}")


def legend(figure: Figure, axes: Axes) -> None:
    """Below the picture, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    named: dict[str, Artist] = {}
    for handle, label in zip(handles, labels, strict=True):
        named.setdefault(label, handle)  # every series has a band; it is named once
    if not named:
        return
    longest = max(len(label) for label in named)
    columns = 2 if len(named) == 4 else 3
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=min(columns, max(1, 120 // (longest + 8))),
        frameon=False,
        fontsize=9.5,
    )


def picture(figure: Figure) -> Picture:
    """The finished picture."""
    # No software name, time or random identifier in the files.
    with rc_context({"svg.hashsalt": "consilium"}):
        return Picture(
            png=_saved(figure, "png", {"Software": None}),
            svg=_saved(figure, "svg", {"Creator": None, "Date": None}),
        )


def _saved(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()
