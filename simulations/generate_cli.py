"""`consilium generate`: what a model of language writes."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.options import JsonOption, RunArgument, emit, use_code_of


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="At most so many more.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the likeliest token each time; 1: as they are.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another text.")] = 0,
    *,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="By the teacher, not the student.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What a finished run's language model writes. It is made up: no patient, not for care."""
    from client.describe import printable
    from simulations.generation import NOTICE, Draw
    from simulations.generation import generate as write

    use_code_of(run)
    text = write(run, prompt, Draw(tokens, temperature, seed), teacher=teacher)
    facts = {"prompt": prompt, "text": text, "made_up": True, "notice": NOTICE}
    shown = [printable(line) for line in (prompt + text).splitlines()]
    emit(as_json, facts, "\n".join([*shown, f"({NOTICE})"]))
