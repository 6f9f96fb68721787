"""Pictures of a comparison or a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from common.tasks import Measure
from simulations.comparison import Comparison, CurvePoint, span, worst_first
from simulations.drawing import (
    BLUE,
    GREEN,
    GREY,
    STYLES,
    VERMILION,
    Picture,
    band,
    canvas,
    chance_line,
    frame,
    legend,
    picture,
)
from simulations.measures import axis_words, cut, leading
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
    """The student against the ε granted to training; None without a private sweep."""
    arms, measure = comparison.arms, leading(comparison.study)
    levels = [
        Level(label, arms[arm].student.together[measure.key], colour, line)
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
        measure=measure,
        unit=comparison.study.privacy.unit.value,
        title="What does privacy cost?",
        label="federated, private",
        levels=levels,
    )


def round_plot(
    curves: Mapping[str, Sequence[CurvePoint]],
    measure: Measure,
    *,
    title: str = "How fast does the federation learn?",
) -> Picture | None:
    """The leading ``measure`` after each round, a line for each charged stage; None without any."""
    known = {stage: [one for one in points if one.figure.count] for stage, points in curves.items()}
    known = {stage: points for stage, points in known.items() if points}
    if not known:
        return None
    figure, axes = canvas(4.2)
    for (stage, points), style in zip(known.items(), STYLES, strict=False):
        band(
            axes,
            [one.round for one in points],
            [one.figure for one in points],
            measure,
            label=_STAGES[stage],
            style=style,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel("round")
    axes.set_ylabel(axis_words(measure, "all test patients"))
    axes.set_title(title)
    frame(axes, [one.figure for points in known.values() for one in points], measure)
    legend(figure, axes)
    return picture(figure)


def hospital_plot(comparison: Comparison) -> Picture:
    """The student at each hospital's own test patients, worst first from the top."""
    measure = leading(comparison.study)
    arms = {name: comparison.arms[name].student for name in _STYLE}
    names = worst_first(arms["federated"], measure)
    figure, axes = canvas(1.9 + 0.46 * len(names))
    ends: list[float] = []
    for offset, (arm, figures) in zip((-0.22, 0.0, 0.22), arms.items(), strict=True):
        colour, marker = _STYLE[arm]
        label = arm if arm != "alone" else "this hospital alone"
        for row, name in enumerate(names):
            one = figures.hospitals[name][measure.key]
            if not one.count:
                continue
            low, high = cut(one, measure)
            ends += [low, high]
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
        if not any(figures.hospitals[name][measure.key].count for figures in arms.values()):
            axes.text(
                0.5,
                row,
                f"no {measure.title}" + (f": it needs {measure.needs}" if measure.needs else ""),
                transform=axes.get_yaxis_transform(),
                ha="center",
                va="center",
                color=GREY,
                fontsize=9,
            )
    left, right = _range(ends, measure)
    if measure.chance is not None and left < measure.chance < right:
        chance_line(axes.axvline, measure.chance)
    axes.set_xlim(left, right)
    axes.set_yticks(
        range(len(names)),
        [f"{name}  (tests on {span(comparison.hospitals[name].test_patients)})" for name in names],
    )
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="#e3e3e3", linewidth=0.8)
    axes.set_xlabel(axis_words(measure, "the hospital's own test patients"))
    axes.set_title("What does each hospital gain? Worst first")
    legend(figure, axes)
    return picture(figure)


def _range(ends: Sequence[float], measure: Measure) -> tuple[float, float]:
    """All that is drawn, out to the best a figure can be, where there is such a thing."""
    least, most = measure.bounds
    best = most if measure.higher_is_better else least
    known = [*ends, *([] if best is None else [best])] or [0.0]
    low, high = min(known), max(known)
    margin = 0.05 * (high - low) or 0.05 * max(1.0, abs(high))
    left, right = low - margin, high + margin
    # A little room, so that a mark at the end of what can be is whole.
    if least is not None:
        left = max(left, least - 0.4 * margin)
    if most is not None:
        right = min(right, most + 0.4 * margin)
    return left, right
