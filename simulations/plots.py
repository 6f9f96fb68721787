"""Pictures of a comparison or a run, as PNG bytes.

Colours are Okabe and Ito's, told apart by every kind of colour vision; marker and line style
repeat what colour says. Intervals are 95 %, cut to what a share can be.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from common.learning.metrics import Interval
from simulations.comparison import Comparison, CurvePoint, span, worst_first

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#007A5A", "#595959"
_STYLE = {
    "federated": (BLUE, "o"),
    "alone": (VERMILION, "s"),
    "pooled": (GREEN, "^"),
}
_CHANCE = 0.5
_DPI = 150
_STAGES = {
    "finetune": "teacher, fine-tuned by the hospitals",
    "distill": "student, distilled by the hospitals",
}


def epsilon_plot(comparison: Comparison) -> bytes | None:
    """Student AUC against the ε granted to training; None without a private sweep."""
    points = [one for one in comparison.sweep if one.student.auc.count]
    if not points:
        return None
    figure, axes = _canvas(4.6)
    epsilons = [one.epsilon for one in points]
    _band(axes, epsilons, [one.student.auc for one in points], label="federated, private")
    drawn = [one.student.auc for one in points]
    arms = comparison.arms
    for arm, label, colour, style in (
        ("pooled-no-privacy", "pooled data, no privacy", GREEN, "--"),
        ("alone", f"one hospital alone (mean), ε = {arms['alone'].epsilon:g}", VERMILION, "-."),
    ):
        if arm in arms and arms[arm].student.together.auc.count:
            one = arms[arm].student.together.auc
            axes.axhline(
                one.mean,
                color=colour,
                linestyle=style,
                linewidth=1.6,
                label=f"{label}: {one.mean:.3f}",
            )
            drawn.append(one)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(epsilons))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(
        f"ε of the whole training, per {comparison.study.privacy.unit.value} "
        "(smaller protects more)"
    )
    axes.set_ylabel("AUC on all test patients")
    axes.set_title("What does privacy cost?")
    _frame_auc(axes, drawn)
    _legend(figure, axes)
    return _png(figure)


def round_plot(
    curves: Mapping[str, Sequence[CurvePoint]],
    *,
    title: str = "How fast does the federation learn?",
) -> bytes | None:
    """AUC after each round, a line for each charged stage; None without any point."""
    known = {stage: [one for one in points if one.auc.count] for stage, points in curves.items()}
    known = {stage: points for stage, points in known.items() if points}
    if not known:
        return None
    figure, axes = _canvas(4.2)
    for (stage, points), style in zip(known.items(), ((BLUE, "o"), (VERMILION, "s")), strict=False):
        _band(
            axes,
            [one.round for one in points],
            [one.auc for one in points],
            label=_STAGES[stage],
            style=style,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel("round")
    axes.set_ylabel("AUC on all test patients")
    axes.set_title(title)
    _frame_auc(axes, [one.auc for points in known.values() for one in points])
    _legend(figure, axes)
    return _png(figure)


def hospital_plot(comparison: Comparison) -> bytes:
    """AUC of the student at each hospital's own test patients, worst first from the top."""
    arms = {name: comparison.arms[name].student for name in _STYLE}
    names = worst_first(arms["federated"], "auc")
    figure, axes = _canvas(1.9 + 0.46 * len(names))
    lowest = 1.0
    for offset, (arm, figures) in zip((-0.22, 0.0, 0.22), arms.items(), strict=True):
        colour, marker = _STYLE[arm]
        label = arm if arm != "alone" else "this hospital alone"
        for row, name in enumerate(names):
            one = figures.hospitals[name].auc
            if not one.count:
                continue
            low, high = _cut(one)
            lowest = min(lowest, low)
            axes.plot(
                [low, high],
                [row + offset] * 2,
                color=colour,
                linewidth=2,
                alpha=0.55,
                solid_capstyle="butt",
            )
            axes.plot(
                [one.mean],
                [row + offset],
                marker=marker,
                color=colour,
                markersize=6.5,
                linestyle="none",
                markeredgecolor="white",
                markeredgewidth=0.6,
                label=label,
            )
            label = "_nolegend_"
    for row, name in enumerate(names):
        if not any(figures.hospitals[name].auc.count for figures in arms.values()):
            axes.text(
                0.5,
                row,
                "no AUC: one class only",
                transform=axes.get_yaxis_transform(),
                ha="center",
                va="center",
                color=GREY,
                fontsize=9,
            )
    left = max(0.0, math.floor(lowest * 20 - 0.2) / 20)
    if left < _CHANCE:
        axes.axvline(
            _CHANCE, color=GREY, linestyle=":", linewidth=1.4, label=f"chance: {_CHANCE:.1f}"
        )
    axes.set_xlim(left, 1 + 0.02 * (1 - left))
    axes.set_yticks(
        range(len(names)),
        [f"{name}  (tests on {span(comparison.hospitals[name].test_patients)})" for name in names],
    )
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#e3e3e3", linewidth=0.8)
    axes.set_xlabel("AUC on the hospital's own test patients")
    axes.set_title("What does each hospital gain? Worst first")
    _legend(figure, axes)
    return _png(figure)


def _canvas(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set_fontsize(13)
    return figure, axes


def _band(
    axes: Axes,
    where: Sequence[float],
    values: Sequence[Interval],
    *,
    label: str,
    style: tuple[str, str] = (BLUE, "o"),
) -> None:
    colour, marker = style
    bounds = [_cut(one) for one in values]
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
        linewidth=2,
        markersize=6,
        label=label,
    )


def _cut(one: Interval) -> tuple[float, float]:
    """The interval within [0, 1]; the mean itself where one value stands alone."""
    if one.count < 2:
        return one.mean, one.mean
    return max(0.0, one.low), min(1.0, one.high)


def _frame_auc(axes: Axes, drawn: Sequence[Interval]) -> None:
    """The vertical range: all that is drawn; chance as a line, or named where it lies below."""
    low = min(_cut(one)[0] for one in drawn)
    high = max(_cut(one)[1] for one in drawn)
    margin = max(0.05 * (high - low), 0.002)
    top, bottom = min(1.0, high + margin) + 0.25 * margin, low - margin
    if bottom < _CHANCE + 0.15:
        bottom = min(bottom, _CHANCE - 0.02)
        axes.axhline(
            _CHANCE, color=GREY, linestyle=":", linewidth=1.4, label=f"chance: {_CHANCE:.1f}"
        )
    else:
        axes.annotate(
            f"↓ chance is {_CHANCE:.1f}, below this axis",
            (0.99, 0.02),
            xycoords="axes fraction",
            ha="right",
            va="bottom",
            color=GREY,
            fontsize=9,
        )
    axes.set_ylim(bottom, top)


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the picture, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2 if len(labels) == 4 else 3,
        frameon=False,
        fontsize=9.5,
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No software name or time in the file: the same figures give the same bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
