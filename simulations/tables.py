"""A comparison as tables: rows of text once, drawn by the terminal and by the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.tasks import Measure
from simulations.comparison import Comparison, Difference, Worst, shown, span, worst_first
from simulations.measures import Quality, direction_note, listing, missing_note


@dataclass(frozen=True)
class Rows:
    """A table in words: the first ``names`` columns are text, the others are figures."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1


def titles(measures: Sequence[Measure]) -> list[str]:
    """The measures as headings."""
    return [one.title for one in measures]


def arm_rows(comparison: Comparison) -> Rows:
    """One row per arm: the student at all test patients, and at the worst hospital."""
    seeds, measures, first = len(comparison.seeds), comparison.measures, comparison.measures[0]

    return Rows(
        "Students on all hospitals' test patients",
        ("training", "ε", *titles(measures), f"worst hospital, {first.title}"),
        tuple(
            (
                arm.title,
                "none" if arm.epsilon is None else f"{arm.epsilon:g}",
                *_cells(arm.student.together, measures, seeds),
                worst_words(arm.student.worst[first.key], seeds),
            )
            for arm in comparison.arms.values()
        ),
    )


def worst_words(one: Worst, seeds: int) -> str:
    """The figure and the hospital."""
    return f"{shown(one.value, seeds=seeds)} {one.hospital or ''}".rstrip()


def hospital_rows(comparison: Comparison, measure: Measure) -> Rows:
    """One row per hospital, worst first, by ``measure``."""
    seeds, key = len(comparison.seeds), measure.key
    students = [comparison.arms[arm].student for arm in ("federated", "alone", "pooled")]
    change = against_alone(comparison)
    rows = []
    for name in worst_first(students[0], measure):
        cells = [shown(one.hospitals[name][key], seeds=seeds) for one in students]
        cells.append(shown(change.hospitals[name][key], seeds=seeds, signed=True))
        rows.append((name, span(comparison.hospitals[name].test_patients), *cells))
    means = [shown(one.mean_of_hospitals[key], seeds=seeds) for one in students]
    means.append(shown(change.mean_of_hospitals[key], seeds=seeds, signed=True))
    rows.append(("mean of all", "", *means))
    last = "gain over alone" if measure.higher_is_better else "federated − alone"
    return Rows(
        f"Student {measure.title} at each hospital's own test patients, worst first"
        + _below_zero([measure]),
        ("hospital", "tests on", "federated", "alone", "pooled", last),
        tuple(rows),
    )


def difference_rows(comparison: Comparison) -> Rows:
    """Federated minus each other arm, paired by seed."""
    seeds, measures = len(comparison.seeds), comparison.measures
    return Rows(
        "Federated minus …, on the same test patients seed by seed" + _below_zero(measures),
        (
            "compared with",
            *titles(measures),
            *(f"mean hospital {title}" for title in titles(measures)),
        ),
        tuple(
            (
                comparison.arms[one.second].title,
                *_cells(one.together, measures, seeds, signed=True),
                *_cells(one.mean_of_hospitals, measures, seeds, signed=True),
            )
            for one in comparison.differences
        ),
    )


def released_rows(comparison: Comparison) -> Rows | None:
    """Exact figures beside those a real coordinator would have; None without any released."""
    seeds, measures = len(comparison.seeds), comparison.measures
    rows = tuple(
        (
            arm.title,
            *(
                shown(one[measure.key], seeds=seeds)
                for measure in measures
                for one in (arm.student.together, arm.released)
            ),
        )
        for arm in comparison.arms.values()
        if arm.released is not None
    )
    return (
        Rows(
            "What a coordinator of real hospitals would have seen",
            (
                "training",
                *(f"{title}, {how}" for title in titles(measures) for how in ("exact", "released")),
            ),
            rows,
        )
        if rows
        else None
    )


def interval_note(seeds: int, measures: Sequence[Measure]) -> str:
    """What ± means, or why there is none; what a dash means, and where lower is better."""
    if seeds == 1:
        about = "One seed: no interval can be given. Use more seeds before drawing conclusions."
    else:
        about = (
            f"± is half the 95 % interval (Student's t) of the mean over {seeds} seeds; "
            f"“equal”: every seed gave the same figure, which on few patients is no "
            f"certainty; (k of {seeds}) says how many seeds a figure rests on."
        )
    return " ".join(filter(None, (about, missing_note(measures), direction_note(measures))))


def against_alone(comparison: Comparison) -> Difference:
    """Federated minus each hospital alone."""
    return next(one for one in comparison.differences if one.second == "alone")


def render_table(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal."""
    tables = [
        arm_rows(comparison),
        *(hospital_rows(comparison, one) for one in comparison.measures),
        difference_rows(comparison),
    ]
    released = released_rows(comparison)
    if released is not None:
        tables.append(released)
    return Group(
        *(rich_table(one) for one in tables),
        Text(interval_note(len(comparison.seeds), comparison.measures), style="dim"),
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


def _cells(
    quality: Quality, measures: Sequence[Measure], seeds: int, *, signed: bool = False
) -> list[str]:
    return [shown(quality[one.key], seeds=seeds, signed=signed) for one in measures]


def _below_zero(measures: Sequence[Measure]) -> str:
    """What a negative difference means, where it is not the usual."""
    lower = [one.title for one in measures if not one.higher_is_better]
    return f"; below 0 is a gain in {listing(lower)}" if lower else ""
