"""`consilium data`: records against a study's dictionary, in a simulation or at a hospital."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.errors import DataError

data_app = typer.Typer(
    no_args_is_help=True,
    help="Data against a study's dictionary.",
    epilog="Example: consilium data check study.toml --data FOLDER",
)

StudyArgument = Annotated[Path, typer.Argument(help="The study file (TOML).", show_default=False)]


@data_app.command(
    "check", epilog="Example: consilium data check study.toml --hospital /srv/consilium"
)
def data_check(
    study: StudyArgument,
    data: Annotated[Path, typer.Option(help="A simulation: the folder with its data.")] = Path(),
    hospital: Annotated[
        Path | None, typer.Option(help="A hospital: its folder, with hospital.toml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Report how each column was read, what did not fit and what to do; nothing is sent."""
    from client.datacheck import check_own, report_tables
    from common.study import load_study
    from simulations.describe import check_data

    loaded = load_study(study)
    reports = check_own(hospital, loaded) if hospital else check_data(loaded, data)
    if as_json:
        print(json.dumps(reports))
        return
    for table in report_tables(reports, whole=hospital is not None):
        Console().print(table, markup=False, soft_wrap=isinstance(table, str))


@data_app.command(
    "preview", epilog="Example: consilium data preview study.toml --hospital /srv/consilium"
)
def data_preview(
    study: StudyArgument,
    hospital: Annotated[Path, typer.Option(help="Its folder, with hospital.toml.")] = Path(),
    rows: Annotated[int, typer.Option(min=1, max=100, help="How many records.")] = 5,
) -> None:
    """Show a hospital's first records as a model would see them, on this terminal only."""
    from client.datacheck import preview_own
    from common.study import load_study

    if not sys.stdout.isatty():
        raise DataError(
            "data preview shows patients' values: expected a terminal, found a file, pipe or log; "
            "run it by hand"
        )
    for shown in preview_own(hospital, load_study(study), rows):
        Console().print(shown, markup=False, highlight=False)
