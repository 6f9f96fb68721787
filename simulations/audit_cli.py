"""`consilium audit`: checks of the software itself."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from common.errors import PrivacyError

audit_app = typer.Typer(
    no_args_is_help=True,
    help="Check that the software keeps its promises.",
    epilog="Example: consilium audit privacy --quick",
)


@audit_app.callback()
def _root() -> None:
    """Check that the software keeps its promises."""


@audit_app.command("privacy", epilog="Example: consilium audit privacy --epsilon 1,3,8 --quick")
def audit_privacy_command(
    epsilon: Annotated[str, typer.Option(help="Claimed ε to audit, separated by commas.")] = (
        "1,3,8"
    ),
    runs: Annotated[
        int | None, typer.Option(help="Repetitions per bound, of 1,000 trials each.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, and weaker bounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Conformance of noise, clipping, sampling and budget; lower bounds on ε by canaries.

    Exits with code 1 when a fault is found.
    """
    from simulations.audits import audit_privacy, render

    audit = audit_privacy(_numbers(epsilon), runs=runs, quick=quick)
    if as_json:
        print(json.dumps(audit))
    else:
        console = Console()
        for part in render(audit):
            console.print(part, soft_wrap=True)
    if not audit["passed"]:
        raise typer.Exit(1)


def _numbers(text: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise PrivacyError(
            f"--epsilon: expected numbers separated by commas, such as 1,3,8, found {text!r}"
        ) from None
