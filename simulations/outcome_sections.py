"""What a run's report shows beside its measures, for outcomes that have more to show.

Only a simulation can: it has all test patients' outcomes in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.labels import SurvivalLabel
from common.learning.effect_metrics import (
    doubly_robust,
    effective_share,
    mean_with_interval,
    outside_overlap,
    policy_scores,
)
from common.learning.survival_metrics import kaplan_meier, lost_share
from simulations.drawing import STYLES, Picture, canvas, legend, picture
from simulations.evaluation import Scores
from simulations.markup import Html, data_table, note, paragraph, section
from simulations.measures import number
from simulations.report_sections import saved_picture

_GROUPS = ("lowest third of risk", "middle third", "highest third")
_DRAWN = 200  # times at which a curve is drawn


def outcome_sections(folder: Path, scores: Scores) -> list[Html]:
    """Sections for the kind of outcome that ``scores`` are of; pictures go into ``folder``."""
    kind = scores.study.dictionary.label.kind
    return _SECTIONS[kind](folder, scores) if kind in _SECTIONS else []


def survival_plot(label: SurvivalLabel, scores: Scores) -> Picture:
    """Predicted curves of three groups by risk, on Kaplan and Meier's of the same patients."""
    cuts = np.array([0.0, *label.cuts])
    times, seen = scores.labels[:, 0].astype(np.float64), scores.labels[:, 1] > 0
    figure, axes = canvas(4.6)
    for (name, rows), (colour, marker, _) in zip(_by_risk(label, scores), STYLES, strict=False):
        curve = kaplan_meier(times[rows], seen[rows])
        # Nothing is known beyond the last patient of a group.
        at = np.linspace(0.0, min(cuts[-1], times[rows].max()), _DRAWN)
        low, high = curve.interval(at)
        axes.fill_between(at, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        axes.step(
            at, curve.at(at), where="post", color=colour, linewidth=1.6, label=f"seen: {name}"
        )
        predicted = np.concatenate([[1.0], scores.predictions[rows].mean(axis=0)])
        axes.plot(
            cuts,
            predicted,
            color=colour,
            marker=marker,
            linestyle="--",
            linewidth=1.4,
            markersize=6,
            label=f"predicted: {name}",
        )
    axes.set_xlim(0, cuts[-1])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(label.unit)
    axes.set_ylabel("share without the event")
    axes.set_title("Are predicted curves those of the patients?")
    legend(figure, axes)
    return picture(figure)


def _by_risk(label: SurvivalLabel, scores: Scores) -> list[tuple[str, NDArray[np.intp]]]:
    """The rows of each third, by the share of the time that the student expects to be lost."""
    risk = lost_share(scores.predictions, np.array(label.cuts))
    thirds = np.array_split(np.argsort(risk, kind="stable"), len(_GROUPS))
    return [(name, rows) for name, rows in zip(_GROUPS, thirds, strict=True) if len(rows)]


def _survival(folder: Path, scores: Scores) -> list[Html]:
    label = scores.study.dictionary.label
    assert isinstance(label, SurvivalLabel)  # noqa: S101  (its kind)
    last = [
        f"{name}: {number(float(scores.predictions[rows, -1].mean()))}"
        for name, rows in _by_risk(label, scores)
    ]
    words = (
        f"Predicted survival at {label.cuts[-1]:g} {label.unit} by thirds of the test patients: "
        f"{'; '.join(last)}. Kaplan and Meier's curves of the same thirds stand beside."
    )
    shown = saved_picture(
        folder,
        "survival",
        survival_plot(label, scores),
        alt=words,
        caption="Test patients in thirds by the student's risk. Steps: Kaplan and Meier's estimate "
        "with its 95 % interval (Greenwood, log-log). Dashes: the mean of the predicted curves.",
    )
    return [section("Curves and patients", shown)]


def _effect(_: Path, scores: Scores) -> list[Html]:
    treated, outcome = scores.labels[:, 0].astype(np.float64), scores.labels[:, 1].astype(float)
    mu0, mu1, propensity = scores.predictions.T
    without, with_it = doubly_robust(treated, outcome, mu0, mu1, propensity)
    policy = mu1 > mu0
    rows = [
        ("effect of the treatment, mean over patients", with_it - without),
        ("outcome if all were treated", with_it),
        ("outcome if nobody were", without),
        (
            f"outcome if those were in whom the student foresees more ({policy.mean():.0%})",
            policy_scores(policy, without, with_it),
        ),
    ]
    apart, share = outside_overlap(propensity), effective_share(treated, propensity)
    return [
        section(
            "What the treatment does",
            paragraph(
                "No data can show that these are effects. They are, only if everything that "
                "decides both who is treated and how patients fare is among the columns. Where "
                "something is missing (how ill somebody looked to the doctor), the figures are "
                "wrong, and neither more patients nor any figure here would tell."
            ),
            data_table(
                "Doubly robust estimates (AIPW) over all test patients",
                ("", "estimate", "95 % interval"),
                [_estimate(name, each) for name, each in rows],
            ),
            paragraph(
                f"Overlap: {apart:.0%} of the test patients have a propensity below 0.1 or above "
                f"0.9; of them the data say little. The weights are worth {share:.0%} of the "
                f"patients of the arm where they are worth least (Kish's effective sample size)."
            ),
            note(
                "Intervals cover the chance of who was tested, not that the models behind them are "
                "wrong. Higher outcomes are taken as better."
            ),
        )
    ]


def _estimate(name: str, scores: NDArray[np.float64]) -> tuple[str, ...]:
    mean, low, high = mean_with_interval(scores)
    return name, number(mean), f"{number(low)} to {number(high)}"


_SECTIONS: Mapping[str, Callable[[Path, Scores], list[Html]]] = {
    "survival": _survival,
    "effect": _effect,
}
