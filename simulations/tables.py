"""A comparison as tables: rows of text once, drawn by the terminal and by the HTML report."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simulations.comparison import Comparison, Difference, Worst, shown, span, worst_first

MEASURES = {"auc": "AUC", "accuracy": "accuracy"}


@dataclass(frozen=True)
class Rows:
    """A table in words: the first ``names`` columns are text, the others are figures."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1


def arm_rows(comparison: Comparison) -> Rows:
    """One row per arm: the student at all test patients, and at the worst hospital."""
    seeds = len(comparison.seeds)

    return Rows(
        "Students on all hospitals' test patients",
        ("training", "ε", "AUC", "accuracy", "worst hospital, AUC"),
        tuple(
            (
                arm.title,
                "none" if arm.epsilon is None else f"{arm.epsilon:g}",
                shown(arm.student.together.auc, seeds=seeds),
                shown(arm.student.together.accuracy, seeds=seeds),
                worst_words(arm.student.worst_auc, seeds),
            )
            for arm in comparison.arms.values()
        ),
    )


def worst_words(one: Worst, seeds: int) -> str:
    """The figure and the hospital."""
    return f"{shown(one.value, seeds=seeds)} {one.hospital or ''}".rstrip()


def hospital_rows(comparison: Comparison, measure: str) -> Rows:
    """One row per hospital, worst first, by ``measure`` (``auc`` or ``accuracy``)."""
    seeds, arms = len(comparison.seeds), comparison.arms
    order = worst_first(arms["federated"].student, measure)
    gain = _gain(comparison)
    rows = []
    for name in order:
        cells = [
            shown(getattr(arms[arm].student.hospitals[name], measure), seeds=seeds)
            for arm in ("federated", "alone", "pooled")
        ]
        cells.append(shown(getattr(gain.hospitals[name], measure), seeds=seeds, signed=True))
        rows.append((name, span(comparison.hospitals[name].test_patients), *cells))
    means = [
        shown(getattr(arms[arm].student.mean_of_hospitals, measure), seeds=seeds)
        for arm in ("federated", "alone", "pooled")
    ]
    means.append(shown(getattr(gain.mean_of_hospitals, measure), seeds=seeds, signed=True))
    rows.append(("mean of all", "", *means))
    return Rows(
        f"Student {MEASURES[measure]} at each hospital's own test patients, worst first",
        ("hospital", "tests on", "federated", "alone", "pooled", "gain over alone"),
        tuple(rows),
    )


def difference_rows(comparison: Comparison) -> Rows:
    """Federated minus each other arm, paired by seed."""
    seeds = len(comparison.seeds)
    return Rows(
        "Federated minus …, on the same test patients seed by seed",
        ("compared with", "AUC", "accuracy", "mean hospital AUC", "mean hospital acc."),
        tuple(
            (
                comparison.arms[one.second].title,
                shown(one.together.auc, seeds=seeds, signed=True),
                shown(one.together.accuracy, seeds=seeds, signed=True),
                shown(one.mean_of_hospitals.auc, seeds=seeds, signed=True),
                shown(one.mean_of_hospitals.accuracy, seeds=seeds, signed=True),
            )
            for one in comparison.differences
        ),
    )


def released_rows(comparison: Comparison) -> Rows | None:
    """Exact figures beside those a real coordinator would have; None without any released."""
    seeds = len(comparison.seeds)
    rows = tuple(
        (
            arm.title,
            shown(arm.student.together.auc, seeds=seeds),
            shown(arm.released.auc, seeds=seeds),
            shown(arm.student.together.accuracy, seeds=seeds),
            shown(arm.released.accuracy, seeds=seeds),
        )
        for arm in comparison.arms.values()
        if arm.released is not None
    )
    return (
        Rows(
            "What a coordinator of real hospitals would have seen",
            ("training", "AUC, exact", "AUC, released", "accuracy, exact", "accuracy, released"),
            rows,
        )
        if rows
        else None
    )


def interval_note(seeds: int) -> str:
    """What ± means, or why there is none."""
    if seeds == 1:
        return "One seed: no interval can be given. Use more seeds before drawing conclusions."
    return (
        f"± is half the 95 % interval (Student's t) of the mean over {seeds} seeds; "
        f"“equal”: every seed gave the same figure, which on few patients is no "
        f"certainty; (k of {seeds}) says how many seeds a figure rests on; — means no AUC "
        f"exists, because only one class was among the test patients."
    )


def render_table(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal."""
    tables = [
        arm_rows(comparison),
        hospital_rows(comparison, "auc"),
        hospital_rows(comparison, "accuracy"),
        difference_rows(comparison),
    ]
    released = released_rows(comparison)
    if released is not None:
        tables.append(released)
    return Group(
        *(rich_table(one) for one in tables),
        Text(interval_note(len(comparison.seeds)), style="dim"),
    )


def rich_table(rows: Rows) -> Table:
    """The rows for a terminal."""
    table = Table(
        title=rows.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    for number, heading in enumerate(rows.headings):
        table.add_column(
            heading,
            justify="left" if number < rows.names else "right",
            # A name must never vanish on a narrow terminal; a figure may break before its ±.
            min_width=_longest_word(rows, number) if number < rows.names else None,
        )
    for cells in rows.rows:
        # As Text: a hospital's name is never read as markup.
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _longest_word(rows: Rows, column: int) -> int:
    cells = [rows.headings[column], *(cells[column] for cells in rows.rows)]
    return max(len(word) for cell in cells for word in cell.split() or [""])


def _gain(comparison: Comparison) -> Difference:
    return next(one for one in comparison.differences if one.second == "alone")
