"""A study's cost for a reader: in the terminal, and in a run's report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import JustifyMethod
from rich.table import Table

from simulations.markup import Html, data_table, note, paragraph, section
from simulations.scenario_words import STAGES, bytes_words, time_words

MODEL_HEADINGS = ("parameters", "patients train", "weights", "FLOPs", "keeps", "processor")
_TOLD = (
    "FLOPs and processor time are those of one record's answer, in a batch; what it keeps is what "
    "a record's gradient needs in memory. Processor times are this machine's."
)


def model_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Teacher and student under ``MODEL_HEADINGS``, each after its name."""
    return [
        (
            role,
            f"{one['parameters']:,}",
            f"{one['trained']:,}" if one["trained"] else "none",
            bytes_words(one["weight_bytes"]),
            f"{one['flops']:,}",
            bytes_words(one["activation_bytes"]),
            f"{one['answer_us']:.3g} µs",
        )
        for role, one in ((role, facts[role]) for role in ("teacher", "student"))
    ]


def ratio_words(facts: Mapping[str, Any]) -> str:
    """How much less the student takes."""
    return (
        f"The student has {facts['smaller']:.0f} times fewer parameters; an answer takes "
        f"{facts['fewer_flops']:.1f} times fewer operations and {facts['faster']:.1f} times less "
        f"processor time."
    )


def cost_tables(facts: Mapping[str, Any]) -> Iterator[Table]:
    """Models, and stages with what a run measured beside what was foreseen."""
    yield _rich("Models", ("", *MODEL_HEADINGS), model_rows(facts))
    yield _rich(
        "Stages: a hospital in one round, or the coordinator in one step",
        ("stage", "rounds", "down", "up", "FLOPs", "CPU", "line", "ε"),
        [_stage_row(one) for one in facts["stages"]],
    )
    rows = [_measured_row(one, one["measured"]) for one in facts["stages"] if one["measured"]]
    if rows:
        headings = (
            "",
            "to it: foreseen",
            "measured",
            "from it",
            "measured",
            "all work",
            "measured",
        )
        yield _rich("Measured beside foreseen", headings, rows)


def cost_lines(facts: Mapping[str, Any]) -> list[str]:
    """What a reader needs to know under the tables."""
    line = facts["line"]
    lines = [
        ratio_words(facts),
        f"For {facts['hospitals']} hospitals of {facts['patients']:,} training patients each, over "
        f"lines of {line['downlink_mbit_s']:g} Mbit/s: about {time_words(facts['duration_s'])}.",
    ]
    if any(one["measured"] for one in facts["stages"]):
        lines.append(
            "Measured CPU is that of the whole simulated stage; beside it that of as many "
            "hospitals one by one, which the stacked engine undercuts where they are small."
        )
    return lines


def cost_section(models: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Html:
    """What a run took: its models, and each stage's measured bytes and seconds.

    ``rows``: as ``cost.measured_stages`` gives them.
    """
    return section(
        "Cost of computation",
        paragraph(ratio_words(models)),
        data_table("Models", ("model", *MODEL_HEADINGS), model_rows(models)),
        data_table(
            "Measured in this run",
            ("stage", "rounds", "to a hospital", "from it", "processor time", "elapsed"),
            [
                (
                    STAGES.get(one["stage"], one["stage"]),
                    str(one["rounds"]),
                    _size(one["bytes_down"]),
                    _size(one["bytes_up"]),
                    _seconds(one["cpu_s"]),
                    _seconds(one["elapsed_s"]),
                )
                for one in rows
            ],
        ),
        note(
            f"{_TOLD} Bytes are those of one hospital in one round; seconds those of the whole "
            f"stage with all its hospitals in one process. `consilium cost` foresees them before "
            f"anything runs."
        ),
    )


def _stage_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        STAGES.get(one["stage"], one["stage"]),
        f"{one['rounds']:,}",
        _size(one["bytes_down"]),
        _size(one["bytes_up"]),
        f"{one['flops']:.2g}" if one["flops"] else "–",
        _seconds(one["cpu_s"]),
        _seconds(one["line_s"]),
        "–" if one["epsilon"] is None else f"{one['epsilon']:.3g}",
    )


def _measured_row(one: Mapping[str, Any], seen: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        STAGES.get(one["stage"], one["stage"]),
        _size(one["bytes_down"]),
        _size(seen["bytes_down"]),
        _size(one["bytes_up"]),
        _size(seen["bytes_up"]),
        _seconds(one["all_cpu_s"]),
        _seconds(seen["cpu_s"]),
    )


def _size(count: float | None) -> str:
    return bytes_words(count) if count else "–"


def _seconds(seconds: float | None) -> str:
    if not seconds:
        return "–"
    return time_words(seconds) if seconds >= 0.1 else f"{seconds * 1000:.2g} ms"


def _rich(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False)
    for heading, column in zip(headings, zip(*rows, strict=True), strict=True):
        # Words give way at blanks, a number and its unit do not.
        least = max(map(len, column)) if table.columns else 1
        justify: JustifyMethod = "right" if table.columns else "left"
        table.add_column(heading, justify=justify, min_width=least)
    for row in rows:
        table.add_row(*row)
    return table
