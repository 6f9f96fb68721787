"""Commands of the coordinator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

coordinator_app = typer.Typer(
    no_args_is_help=True,
    help="For the coordinator of a federation.",
    epilog="Example: consilium coordinator statement runs/heart",
)

RunArgument = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@coordinator_app.command("statement", epilog="Example: consilium coordinator statement runs/heart")
def statement(run: RunArgument, as_json: JsonOption = False) -> None:
    """Recompute a run's privacy statement from its study; refuse a stored one that differs."""
    from server.statement import recomputed_statement, statement_text
    from server.store import RunFolder

    folder, study = RunFolder.open(run)
    facts = recomputed_statement(folder, study)
    print(json.dumps(facts) if as_json else statement_text(facts))


@coordinator_app.command("rounds", epilog="Example: consilium coordinator rounds runs/heart")
def rounds(run: RunArgument, as_json: JsonOption = False) -> None:
    """Every finished round of a run: stage, hospitals, ε so far."""
    from server.store import RunFolder

    folder, _ = RunFolder.open(run)
    lines = folder.metrics()
    if as_json:
        print(json.dumps({"rounds": lines}))
        return
    for line in lines:
        spent = "" if line["epsilon"] is None else f"  ε {line['epsilon']:.3f}"
        print(f"{line['stage']:<10} {line['round']:>4}  {line['hospitals']:>4} hospitals{spent}")
