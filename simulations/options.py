"""What the researcher's commands share: their options, and how they say things."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.compute import DEVICE_VARIABLE, from_environment
from common.errors import StudyError
from common.plugins import allow_code_in

if TYPE_CHECKING:
    from common.study import Study

StudyArgument = Annotated[Path, typer.Argument(help="The study file (TOML).", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]
DataOption = Annotated[Path, typer.Option("--data", help="The folder that holds the data files.")]
DATA_HOME = Path(os.environ.get("CONSILIUM_DATA", "."))
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Replaces the study's seed.")]
NoiseSeedOption = Annotated[
    int | None, typer.Option(help="Repeatable test noise in place of secret noise: NO privacy.")
]
EngineOption = Annotated[
    str, typer.Option(help="Who answers for the hospitals: auto, stacked, one-by-one or ray.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where models run: auto (a GPU if there is one), cpu or cuda."),
]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Start over in a used folder.")]


def load(path: Path, seed: int | None) -> Study:
    """The study, with another seed if one is given. Raises StudyError."""
    from common.study import load_study  # noqa: PLC0415 (torch takes a second)

    allow_code_in(path.parent)
    loaded = load_study(path)
    if seed is not None:
        if seed < 0:
            raise StudyError(f"--seed: expected a number of at least 0, found {seed}")
        loaded = loaded.revised(seed=seed)
    return loaded


def use_device(name: str | None) -> None:
    """Run models there, in this process and in those it starts; None: as the environment says."""
    if name is not None:
        os.environ[DEVICE_VARIABLE] = name
    from_environment()


def use_code_of(run: Path) -> None:
    """Let the run's study name the code it was made with, if it named any."""
    try:
        folder = json.loads((run / "simulation.json").read_text())["code_folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    allow_code_in(Path(folder))


def announce(study: Study, path: Path, *, quiet: bool) -> None:
    """Say what will run, under which promise, and where its results go."""
    if quiet:
        return
    from simulations.describe import promise  # noqa: PLC0415 (torch takes a second)

    print(f"Study {study.name}: {promise(study)}. Results go to {path}/", file=sys.stderr)


def emit(as_json: bool, value: Any, text: str) -> None:
    """One JSON object, or words."""
    print(json.dumps(value) if as_json else text)
