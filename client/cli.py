"""Commands of a hospital."""

from __future__ import annotations

import typer

hospital_app = typer.Typer(
    no_args_is_help=True,
    help="For a hospital's operator.",
    epilog="Example: consilium hospital budget",
)
