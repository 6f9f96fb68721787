"""`consilium sweep`: settings tried in every combination."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from common.errors import StudyError, nearest
from simulations.options import (
    DataOption,
    DeviceOption,
    JsonOption,
    NoiseSeedOption,
    ReplaceOption,
    StudyArgument,
    announce,
    emit,
    load,
    use_device,
)

if TYPE_CHECKING:
    from common.privacy.selection import Trials

_SEEDS = 5

SettingsOption = Annotated[
    list[str], typer.Option("--set", help="KEY=VALUE,VALUE,…: a key of the study file; repeatable.")
]
SelectOption = Annotated[
    str, typer.Option(help="Keep only the best trial, charged: logarithmic, geometric or poisson.")
]
TrialsOption = Annotated[
    float | None,
    typer.Option(help="With --select: mean number of trials; that of combinations if left out."),
]


def sweep(
    context: typer.Context,
    study: StudyArgument,
    settings: SettingsOption,
    data: DataOption = Path(),
    out: Annotated[
        Path | None, typer.Option(help="Results folder; runs/sweep-NAME if left out.")
    ] = None,
    *,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds, from the study's own; 5 if left out.")
    ] = None,
    select: SelectOption = "",
    trials: TrialsOption = None,
    noise_seed: NoiseSeedOption = None,
    device: DeviceOption = None,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Every combination of some settings over several seeds; resumes where it stopped."""
    from simulations.combinations import parse_settings

    use_device(device)
    loaded, asked = load(study, None), parse_settings(settings)
    kind = "select" if select else "sweep"
    path = out or Path("runs") / f"{kind}-{loaded.name}"
    announce(loaded, path, quiet=as_json)
    if select:
        if seeds is not None:
            raise StudyError("--select: trials use the study's own seed; leave out --seeds")
        from simulations.selection import select as run_selection
        from simulations.selection import selection_lines

        if not as_json:
            print("Trials run; how many, and of what, stays hidden.", file=sys.stderr)
        chosen = run_selection(
            loaded,
            asked,
            path,
            data,
            trials=_trials(select, trials, math.prod(len(one.values) for one in asked)),
            noise_seed=noise_seed,
            replace_existing=replace,
            debug=context.obj["debug"],
        )
        emit(as_json, chosen.to_json(), "\n".join(selection_lines(chosen)))
        return
    if trials is not None:
        raise StudyError("--trials belongs to --select; leave it out, or add --select logarithmic")
    from simulations.display import compare_progress
    from simulations.sweep import sweep as run_sweep
    from simulations.sweep_report import write_sweep_report
    from simulations.sweep_tables import render_sweep

    with compare_progress(quiet=as_json) as watch:
        found = run_sweep(
            loaded,
            asked,
            path,
            data,
            seeds=_SEEDS if seeds is None else seeds,
            watch=watch,
            noise_seed=noise_seed,
            replace_existing=replace,
            debug=context.obj["debug"],
        )
    report = write_sweep_report(found)
    if as_json:
        emit(True, found.to_json(), "")
        return
    Console().print(render_sweep(found))
    Console().print(f"Figures: {path}/results.csv, report: {report}", soft_wrap=True)


def _trials(select: str, mean: float | None, combinations: int) -> Trials:
    """The law of the number of trials; its mean is the number of combinations if left out."""
    from common.privacy.selection import LAWS, Trials

    law = next((one for one in LAWS if one == select), None)
    if law is None:
        raise StudyError(
            f"--select: expected one of {', '.join(LAWS)}, found {select!r}; "
            f"{nearest(select, LAWS)}"
        )
    return Trials(law=law, mean=float(combinations) if mean is None else mean)
