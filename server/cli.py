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


@coordinator_app.command("init", epilog="Example: consilium coordinator init /srv/coordinator")
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    as_json: JsonOption = False,
) -> None:
    """Create the coordinator's signing key."""
    from server.notary import create_notary

    fingerprint = create_notary(folder).fingerprint
    text = f"Created {folder}. Give hospitals {folder / 'identity.pub'} ({fingerprint})."
    print(json.dumps({"folder": str(folder), "fingerprint": fingerprint}) if as_json else text)


@coordinator_app.command(
    "countersign",
    epilog="Example: consilium coordinator countersign checkpoint.json --hospital north.pub",
)
def countersign(
    checkpoint: Annotated[Path, typer.Argument(help="From `consilium hospital log checkpoint`.")],
    hospital: Annotated[Path, typer.Option(help="The hospital's public key.")],
    folder: Annotated[
        Path,
        typer.Option("--folder", "-C", envvar="CONSILIUM_COORDINATOR", help="From `init`."),
    ] = Path(),
) -> None:
    """Sign a hospital's checkpoint and keep it; refuse one that goes back. Prints its JSON line."""
    from common.checkpoint import Checkpoint
    from common.identity import PublicIdentity
    from server.notary import countersign as sign

    print(sign(folder, Checkpoint.load(checkpoint), PublicIdentity.load(hospital)).text())
