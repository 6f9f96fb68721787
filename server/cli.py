"""Commands of the coordinator."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from server.admin_cli import FolderOption, JsonOption, add_admin_commands

coordinator_app = typer.Typer(
    no_args_is_help=True,
    help="For the coordinator of a federation.",
    epilog="Example: consilium coordinator status",
)
add_admin_commands(coordinator_app)

RunArgument = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]


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


@coordinator_app.command(
    "init",
    epilog="Example: consilium coordinator init /srv/coordinator --host federation.example.org",
)
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    host: Annotated[
        list[str],
        typer.Option(help="How hospitals reach it: a DNS name or IP address; may be repeated."),
    ],
    port: Annotated[int, typer.Option(help="The public port.")] = 8443,
    listen: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    database: Annotated[
        str, typer.Option(help="A URL without a password; see docs/coordinator.md.")
    ] = "sqlite:///store.db",
    as_json: JsonOption = False,
) -> None:
    """Create a coordinator: keys, certificate authority, registry, settings."""
    from server.desk import create_desk
    from server.settings import parse_settings

    tree = {"host": host, "port": port, "listen": listen, "database": database}
    created = create_desk(folder, parse_settings(tree, origin="init"))
    fingerprint = created.public().fingerprint
    text = (
        f"Created {folder}. Fingerprint, for the hospitals: {fingerprint}\n"
        f"Next: move {folder / 'key'} off this disk (set CONSILIUM_KEY_FILE), then "
        f"`consilium coordinator start`."
    )
    print(json.dumps({"folder": str(folder), "fingerprint": fingerprint}) if as_json else text)


@coordinator_app.command(
    "backup", epilog="Example: consilium coordinator backup /mnt/copies/2030-01-01.tar.gz"
)
def backup(
    file: Annotated[Path, typer.Argument(help="A new file.")],
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Copy everything into one file, also while the service runs. Keys stay encrypted in it."""
    from common.auditlog import utc_now
    from server.backup import back_up

    made = back_up(folder, file, utc_now())
    note = "" if made.has_database else "\nThe database is PostgreSQL's: copy it with pg_dump."
    text = (
        f"{made.files} files in {file} (SHA-256 {made.sha256}). The wrapping key is not among "
        f"them: keep it elsewhere, nothing opens without it.{note}"
    )
    print(json.dumps({"file": str(file), **asdict(made)}) if as_json else text)


@coordinator_app.command(
    "restore", epilog="Example: consilium coordinator restore 2030-01-01.tar.gz /srv/coordinator"
)
def restore(
    file: Annotated[Path, typer.Argument(help="From `backup`.")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    as_json: JsonOption = False,
) -> None:
    """Make a folder of a backup. Studies that ran go on from the last round that is in it."""
    from common.auditlog import utc_now
    from server.backup import restore as restore_backup

    restore_backup(file, folder, utc_now())
    text = (
        f"Restored {folder}. Next: put the wrapping key back as {folder / 'key'} (or set "
        f"CONSILIUM_KEY_FILE), then `consilium coordinator start`."
    )
    print(json.dumps({"folder": str(folder)}) if as_json else text)


@coordinator_app.command(
    "countersign",
    epilog="Example: consilium coordinator countersign checkpoint.json --hospital north.pub",
)
def countersign(
    checkpoint: Annotated[Path, typer.Argument(help="From `consilium hospital log checkpoint`.")],
    hospital: Annotated[Path, typer.Option(help="The hospital's public key.")],
    folder: FolderOption = Path(),
) -> None:
    """Sign a hospital's checkpoint and keep it; refuse one that goes back. Prints its JSON line."""
    from common.checkpoint import Checkpoint
    from common.identity import PublicIdentity
    from server.notary import countersign as sign

    print(sign(folder, Checkpoint.load(checkpoint), PublicIdentity.load(hospital)).text())
