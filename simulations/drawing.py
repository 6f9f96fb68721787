"""What every picture has in common: canvas, bands, axes, and how it is written.

Colours are Okabe and Ito's, told apart by every kind of colour vision; marker and line style
repeat what colour says. Intervals are 95 %, cut to what a share can be.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.learning.metrics import Interval

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#007A5A", "#595959"
PURPLE, ORANGE, SKY = "#AA4499", "#B36B00", "#2B8CBE"
CHANCE = 0.5
_DPI = 150

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
    *,
    label: str,
    style: Style = STYLES[0],
) -> None:
    """Means joined by a line, their intervals as a band."""
    colour, marker, line = style
    bounds = [cut(one) for one in values]
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
    axes: Axes, where: Sequence[float], values: Sequence[Interval], *, label: str, style: Style
) -> None:
    """Means joined by a thin line, their intervals as bars: for more series than bands can show."""
    colour, marker, line = style
    bounds = [cut(one) for one in values]
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


def cut(one: Interval) -> tuple[float, float]:
    """The interval within [0, 1]; the mean itself where one value stands alone."""
    if one.count < 2:
        return one.mean, one.mean
    return max(0.0, one.low), min(1.0, one.high)


def frame_auc(axes: Axes, drawn: Sequence[Interval]) -> None:
    """The vertical range: all that is drawn; chance as a line, or named where it lies below."""
    low = min(cut(one)[0] for one in drawn)
    high = max(cut(one)[1] for one in drawn)
    margin = max(0.05 * (high - low), 0.002)
    top, bottom = min(1.0, high + margin) + 0.25 * margin, low - margin
    if bottom < CHANCE + 0.15:
        bottom = min(bottom, CHANCE - 0.02)
        axes.axhline(
            CHANCE, color=GREY, linestyle=":", linewidth=1.4, label=f"chance: {CHANCE:.1f}"
        )
    else:
        axes.annotate(
            f"↓ chance is {CHANCE:.1f}, below this axis",
            (0.99, 0.02),
            xycoords="axes fraction",
            ha="right",
            va="bottom",
            color=GREY,
            fontsize=9,
        )
    axes.set_ylim(bottom, top)


def legend(figure: Figure, axes: Axes) -> None:
    """Below the picture, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    named: dict[str, Artist] = {}
    for handle, label in zip(handles, labels, strict=True):
        named.setdefault(label, handle)  # every series has a band; it is named once
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
