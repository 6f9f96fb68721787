"""The `consilium` command: researcher, hospital and coordinator commands as one family."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

from common.environ import QUIET

# Before the first import of Flower and torch.
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

import click
import typer
from rich.console import Console

from client.cli import hospital_app
from common.errors import ConsiliumError, StudyError, nearest
from server.cli import coordinator_app
from simulations.audit_cli import audit_app
from simulations.cost_cli import cost
from simulations.data_cli import data_app
from simulations.generate_cli import generate
from simulations.options import (
    DATA_HOME,
    DataOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    NoiseSeedOption,
    ReplaceOption,
    RunArgument,
    SeedOption,
    StudyArgument,
    announce,
    emit,
    load,
    use_code_of,
    use_device,
)
from simulations.sweep_cli import sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hospitals train one medical model together; no patient's record leaves its hospital.",
    epilog="Example: consilium simulate deploy/examples/wisconsin.toml",
)
study_app = typer.Typer(
    no_args_is_help=True,
    help="Study files.",
    epilog="Example: consilium study check deploy/examples/heart.toml",
)
app.command(rich_help_panel="Researcher", epilog="Example: consilium cost study.toml")(cost)
app.add_typer(study_app, name="study", rich_help_panel="Researcher")
app.add_typer(data_app, name="data", rich_help_panel="Researcher")
app.add_typer(audit_app, name="audit", rich_help_panel="Researcher")
app.add_typer(hospital_app, name="hospital", rich_help_panel="Hospital")
app.add_typer(coordinator_app, name="coordinator", rich_help_panel="Coordinator")

_INTERRUPTED = 130
_STOPPED = (
    "stopped; finished rounds are kept: continue with `consilium resume RUN`, "
    "or repeat the same `consilium compare` or `consilium sweep`"
)


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    context.obj = {"debug": debug}


@app.command(
    rich_help_panel="Researcher",
    epilog="Example: consilium simulate deploy/examples/heart.toml --data FOLDER --run runs/heart",
)
def simulate(
    context: typer.Context,
    study: StudyArgument,
    data: DataOption = Path(),
    run: Annotated[Path | None, typer.Option(help="Results folder; runs/NAME if left out.")] = None,
    *,
    seed: SeedOption = None,
    noise_seed: NoiseSeedOption = None,
    engine: EngineOption = "auto",
    memory: Annotated[
        int | None,
        typer.Option("--memory", min=1, help="At most so many MiB for a batch of hospitals."),
    ] = None,
    device: DeviceOption = None,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study with all its hospitals on this machine, or on a Ray cluster."""
    from simulations.attacks import run_twin
    from simulations.display import live_progress
    from simulations.simulate import parse_engine
    from simulations.simulate import simulate as run_study

    use_device(device)
    loaded = load(study, seed)
    path = run or Path("runs") / loaded.name
    announce(loaded, path, quiet=as_json)
    with live_progress(quiet=as_json) as watch:
        folder = run_study(
            loaded,
            path,
            data,
            watch,
            noise_seed=noise_seed,
            engine=parse_engine(engine),
            memory_bytes=None if memory is None else memory * 2**20,
            replace=replace,
            debug=context.obj["debug"],
        )
        run_twin(folder.path, watch, debug=context.obj["debug"])
    _show_run(folder.path, as_json)


@app.command(rich_help_panel="Researcher", epilog="Example: consilium resume runs/heart")
def resume(
    context: typer.Context,
    run: RunArgument,
    *,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue an interrupted run to the result it would have had."""
    from simulations.attacks import run_twin
    from simulations.display import live_progress
    from simulations.simulate import resume as resume_run

    use_device(device)
    use_code_of(run)
    with live_progress(quiet=as_json) as watch:
        folder = resume_run(run, watch, debug=context.obj["debug"])
        run_twin(folder.path, watch, debug=context.obj["debug"])
    _show_run(folder.path, as_json)


@app.command(
    rich_help_panel="Researcher",
    epilog="Example: consilium compare deploy/examples/heart.toml --data FOLDER --seeds 5",
)
def compare(
    context: typer.Context,
    study: StudyArgument,
    data: DataOption = Path(),
    out: Annotated[
        Path | None, typer.Option(help="Results folder; runs/compare-NAME if left out.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the study's own.")] = 5,
    *,
    epsilons: Annotated[
        str, typer.Option(help="Comma-separated ε of the sweep; around the study's if left out.")
    ] = "",
    noise_seed: NoiseSeedOption = None,
    device: DeviceOption = None,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Federated against each hospital alone and against pooled data; resumes where it stopped."""
    from simulations.compare import compare as run_comparison
    from simulations.display import compare_progress
    from simulations.report import write_report
    from simulations.tables import render_table

    use_device(device)
    loaded = load(study, None)
    path = out or Path("runs") / f"compare-{loaded.name}"
    announce(loaded, path, quiet=as_json)
    with compare_progress(quiet=as_json) as watch:
        result = run_comparison(
            loaded,
            path,
            data,
            seeds=seeds,
            watch=watch,
            epsilons=_numbers(epsilons, "--epsilons"),
            noise_seed=noise_seed,
            replace_existing=replace,
            debug=context.obj["debug"],
        )
    report = write_report(result)
    if as_json:
        emit(True, result.to_json(), "")
        return
    Console().print(render_table(result))
    Console().print(f"Report: {report}", soft_wrap=True)


app.command(
    "sweep",
    rich_help_panel="Researcher",
    epilog="Example: consilium sweep deploy/examples/wisconsin.toml --set privacy.epsilon=1,3,8",
)(sweep)


@app.command(
    rich_help_panel="Researcher",
    epilog="Example: consilium split deploy/examples/heart.toml --data FOLDER --to hospitals/",
)
def split(
    study: StudyArgument,
    to: Annotated[Path, typer.Option(help="The folder to make.")],
    data: DataOption = Path(),
    seed: SeedOption = None,
    noise_seed: NoiseSeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lay a study's hospitals out as folders, for `flwr run` or real daemons."""
    from simulations.hospitals import build_world, declared, write_world

    world = build_world(load(study, seed), data)
    write_world(world, to, noise_seed=noise_seed)
    emit(
        as_json,
        {"folder": str(to), "hospitals": {s.name: declared(s.table) for s in world.sites}},
        f"{len(world.sites)} hospitals below {to}/hospitals",
    )


app.command(
    rich_help_panel="Researcher",
    epilog='Example: consilium generate runs/language --prompt "A 40-year-old" --seed 1',
)(generate)


@app.command(rich_help_panel="Researcher", epilog="Example: consilium scenarios --json")
def scenarios(as_json: JsonOption = False) -> None:
    """How hospitals can be cut from data, and what may go wrong among them: every key."""
    from simulations.catalogue import catalogue, catalogue_tables

    found = catalogue()
    if as_json:
        emit(True, found, "")
        return
    for table in catalogue_tables(found):
        Console().print(table)


@app.command(rich_help_panel="Researcher", epilog="Example: consilium bench accuracy --json")
def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark.", show_default=False)],
    data: DataOption = DATA_HOME,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share `accuracy`.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure, and print the figures."""
    from simulations.bench import BENCHES, SHARED

    if name in SHARED:
        figures = SHARED[name](data, jobs)
    elif name not in BENCHES:
        raise ConsiliumError(f"unknown benchmark {name!r}; {nearest(name, [*BENCHES, *SHARED])}")
    elif jobs > 1:
        raise ConsiliumError(f"{name} measures time: --jobs 1 (the default) only")
    else:
        figures = BENCHES[name](data)
    if figures is None:
        raise ConsiliumError(f"{name}: its data are not below {data}; name their folder by --data")
    emit(as_json, figures, json.dumps(figures, indent=2))


@app.command(rich_help_panel="Researcher", epilog="Example: consilium faults --seeds 1000")
def faults(
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the seeds.")] = 1,
    *,
    whole: Annotated[
        bool, typer.Option("--whole", help="Whole studies only, not one seed in a hundred.")
    ] = False,
    on_disk: Annotated[
        bool, typer.Option("--on-disk", help="Ledgers on a real disk, not in memory.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Print every event of every seed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Crash, lose, delay, repeat and reorder everything, seed by seed; check what must hold.

    Exits with code 1 when an invariant breaks, with the seed and its events: the same seed does
    the same again.
    """
    from simulations.faults import render, run_seeds

    totals = run_seeds(
        range(seed, seed + seeds), jobs=jobs, whole=whole, on_disk=on_disk, keep_traces=trace
    )
    emit(as_json, totals.as_dict(), render(totals))
    if totals.violations:
        raise typer.Exit(1)


@study_app.command("check", epilog="Example: consilium study check deploy/examples/wisconsin.toml")
def study_check(study: StudyArgument, as_json: JsonOption = False) -> None:
    """Validate a study file; say what it would do and cost."""
    from simulations.describe import describe, describe_lines

    facts = describe(load(study, None))
    emit(as_json, facts, "\n".join(describe_lines(facts)))


def main() -> None:
    """Run the command line: errors are one line and exit code 2, tracebacks only with --debug."""
    debug = "--debug" in sys.argv[1:]
    try:
        command = typer.main.get_command(app)
        code = command.main(prog_name="consilium", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError:
        sys.exit(2)  # the help has been printed
    except (ConsiliumError, click.ClickException) as error:
        if debug:
            raise
        _fail(_usage(error) if isinstance(error, click.ClickException) else str(error), 2)
    except (KeyboardInterrupt, click.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit as stop:
        code = stop.code  # Typer turns Ctrl-C into an exit of its own
    if code == _INTERRUPTED:
        _fail(_STOPPED, code)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"consilium: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _usage(error: click.ClickException) -> str:
    """Click's own message, its hint said once, and where to look."""
    message, *hints = error.format_message().split(" Did you mean ")
    hint = f" Did you mean {hints[0]}" if hints else ""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "consilium"
    return f"{message}{hint} See `{command} --help`."


def _numbers(text: str, option: str) -> tuple[float, ...] | None:
    if not text:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise StudyError(f"{option}: expected numbers with commas, found {text!r}") from None


def _show_run(path: Path, as_json: bool) -> None:
    from server.store import RunFolder
    from simulations.display import closing_lines, run_table
    from simulations.run_report import write_run_report
    from simulations.summary import summarise

    summary = summarise(RunFolder(path))
    report = write_run_report(path)
    if as_json:
        emit(True, summary, "")
        return
    console = Console()
    console.print(run_table(summary))
    for line in closing_lines(summary):
        console.print(line, soft_wrap=True)
    console.print(f"Results: {path}/, report: {report}", soft_wrap=True)


if __name__ == "__main__":
    main()
