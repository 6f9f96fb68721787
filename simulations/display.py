"""What a person sees in the terminal: live progress and closing tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

from common.tasks import Measure
from server.conduct import Progress
from simulations.arms import CompareProgress
from simulations.measures import direction_note, measures_in, number
from simulations.scenario_words import scenario_lines

_STAGES = {
    "statistics": "scaling statistics",
    "pretrain": "pre-train teacher",
    "finetune": "fine-tune teacher",
    "distill": "distil student",
}
Role = Literal["teacher", "student"]
TEACHER_ROW = "all (teacher)"


@contextmanager
def live_progress(*, quiet: bool = False) -> Iterator[Callable[[Progress], None]]:
    """A watcher that shows stage, round, hospitals, ε so far and time left.

    Bars on a terminal, one line per tenth of a stage elsewhere, nothing when ``quiet``.
    """
    if quiet:
        yield lambda _: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_line
        return
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[facts]}"),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(progress: Progress) -> None:
            name = _STAGES[progress.stage]
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=progress.rounds, facts="")
            bars.update(tasks[name], completed=progress.round, facts=_facts(progress))

        yield show


@contextmanager
def compare_progress(*, quiet: bool = False) -> Iterator[Callable[[CompareProgress], None]]:
    """A watcher of a whole comparison: one bar on a terminal, one line a run elsewhere."""
    if quiet:
        yield lambda _: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:

        def say(at: CompareProgress) -> None:
            if at.progress is None:
                print(_compare_facts(at), file=sys.stderr, flush=True)

        yield say
        return
    columns = (BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"))
    with Bars(*columns, console=console) as bars:
        task = bars.add_task("", total=None, facts="")
        yield lambda at: bars.update(
            task, total=at.runs, completed=at.number - 1, facts=_compare_facts(at)
        )


def _compare_facts(at: CompareProgress) -> str:
    where = f" at {at.hospital}" if at.hospital else ""
    parts = [f"run {at.number}/{at.runs}", f"{at.arm}{where}, seed {at.seed}"]
    if at.reused:
        parts.append("kept from before")
    if at.progress is not None:
        parts.append(f"{_STAGES[at.progress.stage]} {at.progress.round}/{at.progress.rounds}")
    if at.eta_s is not None:
        parts.append(f"{_duration(at.eta_s)} left")
    return "  ".join(parts)


def _print_line(progress: Progress) -> None:
    every = max(1, progress.rounds // 10)
    if progress.round % every and progress.round != progress.rounds:
        return
    line = (
        f"{_STAGES[progress.stage]}: round {progress.round}/{progress.rounds}  {_facts(progress)}"
    )
    print(line.rstrip(), file=sys.stderr, flush=True)


def _facts(progress: Progress) -> str:
    parts = []
    if progress.hospitals:
        parts.append(f"{progress.hospitals} hospitals")
    if progress.epsilon is not None:
        parts.append(f"ε {progress.epsilon:.2f}")
    if progress.eta_s is not None and progress.round < progress.rounds:
        parts.append(f"{_duration(progress.eta_s)} left")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def run_table(summary: dict[str, Any]) -> Table:
    """The student, one row per hospital, then all together, and its teacher beside it."""
    title = f"{summary['study']}: test patients, exact scores (simulation only)"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False)
    measures = measures_in(summary)
    table.add_column("student", no_wrap=True)
    for heading in ("train ≈", "test", *(one.title for one in measures)):
        # A heading gives way by lines, never within a word.
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for row in summary["hospitals"]:
        table.add_row(*_cells(row, measures, "student"))
    table.add_section()
    everybody = summary["all"]
    table.add_row(*_cells(everybody, measures, "student"), style="bold")
    table.add_row(*_cells(everybody | {"hospital": TEACHER_ROW}, measures, "teacher"))
    return table


def _cells(row: Mapping[str, Any], measures: Sequence[Measure], role: Role) -> list[str]:
    return [
        row["hospital"],
        str(row["declared_patients"]),
        str(row["test_patients"]),
        *model_cells(row, measures, role),
    ]


def model_cells(row: Mapping[str, Any], measures: Sequence[Measure], role: Role) -> list[str]:
    """The figures of one model in one row of a summary."""
    return [number(row[role][one.key]) for one in measures]


def released_words(summary: Mapping[str, Any]) -> str:
    """What a coordinator would know, with what its noise alone explains."""
    return ", ".join(
        f"{one.title} {number(mean)} ({number(low)} to {number(high)})"
        for one in measures_in(summary)
        for mean, low, high in [summary["released"][one.key]]
        if mean is not None
    )


def closing_lines(summary: dict[str, Any]) -> list[str]:
    """What a reader needs to know under the table."""
    ratio = summary["teacher_parameters"] / summary["student_parameters"]
    lines = [
        f"Student: {summary['student_parameters']:,} parameters, {ratio:.0f} times smaller "
        f"than its teacher."
    ]
    if summary["guaranteed"]:
        lines.append(
            f"Privacy: {summary['protected']} are (ε = {summary['epsilon']:.2f}, "
            f"δ = {summary['delta']:g})-private for each patient; PRIVACY.md says against whom."
        )
    else:
        lines.append("Privacy: NONE is guaranteed for this run; see PRIVACY.md for why.")
    if summary["released"]:
        lines.append(
            f"A coordinator of real hospitals would know, from {summary['released_from']}: "
            f"{released_words(summary) or 'nothing'}."
        )
    if note := direction_note(measures_in(summary)):
        lines.append(note)
    return lines + scenario_lines(summary)
