"""Pictures of a comparison or a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from simulations.comparison import Comparison, CurvePoint, span, worst_first
from simulations.drawing import (
    BLUE,
    CHANCE,
    GREEN,
    GREY,
    STYLES,
    VERMILION,
    Picture,
    band,
    canvas,
    cut,
    frame_auc,
    legend,
    picture,
)
from simulations.sweep_plots import EPSILON, Level, setting_plot

_STYLE = {
    "federated": (BLUE, "o"),
    "alone": (VERMILION, "s"),
    "pooled": (GREEN, "^"),
}
_STAGES = {
    "finetune": "teacher, fine-tuned by the hospitals",
    "distill": "student, distilled by the hospitals",
}


def epsilon_plot(comparison: Comparison) -> Picture | None:
    """Student AUC against the ε granted to training; None without a private sweep."""
    arms = comparison.arms
    levels = [
        Level(label, arms[arm].student.together.auc, colour, line)
        for arm, label, colour, line in (
            ("pooled-no-privacy", "pooled data, no privacy", GREEN, "--"),
            (
                "alone",
                f"one hospital alone (mean), ε = {arms['alone'].epsilon or 0:g}",
                VERMILION,
                "-.",
            ),
        )
        if arm in arms
    ]
    return setting_plot(
        comparison.sweep,
        EPSILON,
        unit=comparison.study.privacy.unit.value,
        title="What does privacy cost?",
        label="federated, private",
        levels=levels,
    )


def round_plot(
    curves: Mapping[str, Sequence[CurvePoint]],
    *,
    title: str = "How fast does the federation learn?",
) -> Picture | None:
    """AUC after each round, a line for each charged stage; None without any point."""
    known = {stage: [one for one in points if one.auc.count] for stage, points in curves.items()}
    known = {stage: points for stage, points in known.items() if points}
    if not known:
        return None
    figure, axes = canvas(4.2)
    for (stage, points), style in zip(known.items(), STYLES, strict=False):
        band(
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
    frame_auc(axes, [one.auc for points in known.values() for one in points])
    legend(figure, axes)
    return picture(figure)


def hospital_plot(comparison: Comparison) -> Picture:
    """AUC of the student at each hospital's own test patients, worst first from the top."""
    arms = {name: comparison.arms[name].student for name in _STYLE}
    names = worst_first(arms["federated"], "auc")
    figure, axes = canvas(1.9 + 0.46 * len(names))
    lowest = 1.0
    for offset, (arm, figures) in zip((-0.22, 0.0, 0.22), arms.items(), strict=True):
        colour, marker = _STYLE[arm]
        label = arm if arm != "alone" else "this hospital alone"
        for row, name in enumerate(names):
            one = figures.hospitals[name].auc
            if not one.count:
                continue
            low, high = cut(one)
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
    if left < CHANCE:
        axes.axvline(
            CHANCE, color=GREY, linestyle=":", linewidth=1.4, label=f"chance: {CHANCE:.1f}"
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
    legend(figure, axes)
    return picture(figure)
