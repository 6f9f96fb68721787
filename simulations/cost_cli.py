"""`consilium cost`: what a study takes, foreseen and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from simulations.options import JsonOption, emit, load, use_code_of


def cost(
    study: Annotated[
        Path,
        typer.Argument(
            help="A study file, or the folder of a finished simulated run.", show_default=False
        ),
    ],
    patients: Annotated[
        int | None,
        typer.Option(
            min=10, help="Training patients of each hospital; 1000, or as the run had them."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a study costs: parameters, operations, memory, bytes, time and ε, stage by stage.

    Tries one round of each stage on made-up patients on this machine. Of a run, what was measured
    stands beside.
    """
    from server.store import RunFolder
    from simulations.cost import PATIENTS, cost_of, run_cost
    from simulations.cost_words import cost_lines, cost_tables

    if study.is_dir():
        use_code_of(study)
        run, told = RunFolder.open(study)
        facts = run_cost(run, told, patients)
    else:
        told = load(study, None)
        facts = cost_of(told, patients=patients or PATIENTS).as_dict()
    facts = {"study": told.name, **facts}
    if as_json:
        emit(True, facts, "")
        return
    console = Console()
    for table in cost_tables(facts):
        console.print(table)
    for line in cost_lines(facts):
        console.print(line, soft_wrap=True)
