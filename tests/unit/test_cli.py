"""The command line as a person meets it: exit codes, one-line errors, help with examples."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import StudyError
from simulations.cli import app, main
from simulations.reference import command_reference, study_reference, walk
from tests.conftest import Done

ROOT = Path(__file__).resolve().parents[2]
WISCONSIN = ROOT / "deploy" / "examples" / "wisconsin.toml"


def small_study(folder: Path, **replacements: str) -> Path:
    text = WISCONSIN.read_text(encoding="utf-8")
    for old, new in {
        "steps = 400": "steps = 20",
        "steps = 600": "steps = 20",
        **replacements,
    }.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "small.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epsilon = 3.0", "epsilom = 3.0", ["privacy.epsilom", "did you mean 'epsilon'"]),
        ("rounds = 10", 'rounds = "ten"', ["finetune.rounds", "integer", "'ten'"]),
        ('rule = "fedavgm"', 'rule = "fedavgg"', ["federation.rule", "did you mean 'fedavg'"]),
        ("epsilon = 3.0", "epsilon = -3.0", ["privacy.epsilon", "greater than 0", "-3"]),
        ("delta = 1e-5", "delta = 0.5", ["privacy.delta", "0.5"]),
        ("fold = 0", "fold = 4", ["evaluation", "0 to 3", "4"]),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(
    consilium: Callable[..., Done], tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    done = consilium("study", "check", small_study(tmp_path, **{old: new}))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "nowhere.toml"],
        ["simulate"],
        ["simulte", "x"],
        ["simulate", str(WISCONSIN), "--sed", "3"],
        ["simulate", str(WISCONSIN), "--engine", "rey"],
        ["sweep", str(WISCONSIN)],
        ["sweep", str(WISCONSIN), "--set", "privacy.epsilom=1"],
        ["sweep", str(WISCONSIN), "--set", "privacy.epsilon=1", "--select", "geometrik"],
        ["sweep", str(WISCONSIN), "--set", "privacy.epsilon=1", "--trials", "3"],
        [
            "sweep",
            str(WISCONSIN),
            "--set",
            "privacy.epsilon=1",
            "--select",
            "poisson",
            "--seeds",
            "2",
        ],
        ["resume", "nowhere"],
        ["bench", "acuracy"],
        ["simulate", str(ROOT / "deploy/examples/heart.toml"), "--data", "nowhere"],
    ],
)
def test_every_wrong_call_is_one_line_and_exit_code_2(
    consilium: Callable[..., Done], arguments: list[str]
) -> None:
    done = consilium(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("consilium: ")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["consilium", "--debug", "study", "check", "nowhere.toml"])
    with pytest.raises(StudyError):
        main()


def test_every_command_has_help_that_ends_with_an_example() -> None:
    import typer

    for path, command in walk(typer.main.get_command(app), ("consilium",)):
        assert command.help, path
        assert command.epilog, path
        assert command.epilog.startswith(f"Example: {path[0]}"), path


def test_reference_pages_are_current() -> None:
    docs = ROOT / "docs"
    regenerate = "run `python -m simulations.reference docs`"
    assert (docs / "commands.md").read_text() == command_reference(app), regenerate
    assert (docs / "study-file.md").read_text() == study_reference(), regenerate


def test_simulate_prints_one_json_object_and_leaves_a_whole_run_folder(
    consilium: Callable[..., Done], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = consilium("simulate", small_study(tmp_path), "--run", run, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["epsilon"] <= 3.0
    assert len(summary["hospitals"]) == 8
    for name in (
        "study.toml",
        "metrics.jsonl",
        "student.safetensors",
        "teacher.safetensors",
        "privacy.json",
        "PRIVACY.md",
        "environment.json",
        "evaluation.json",
    ):
        assert (run / name).stat().st_size > 0, name
    assert (run / "simulation.key").stat().st_mode & 0o777 == 0o600
    again = consilium("simulate", small_study(tmp_path), "--run", run)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr


def test_sweep_prints_a_table_and_one_json_object(
    consilium: Callable[..., Done], tmp_path: Path
) -> None:
    asked = ("--set", "finetune.rounds=2,3", "--seeds", "1", "--out", tmp_path / "s")
    done = consilium("sweep", small_study(tmp_path), *asked)
    assert done.returncode == 0, done.stderr
    for words in ("finetune.rounds", "kB per hospital", "This sweep chose nothing", "results.csv"):
        assert words in done.stdout
    again = consilium("sweep", small_study(tmp_path), *asked, "--json")
    found = json.loads(again.stdout)
    assert [one["settings"] for one in found["combinations"]] == [
        {"finetune.rounds": 2},
        {"finetune.rounds": 3},
    ]
    assert found["chosen"] is None and found["price_of_choosing"]["runs"] == 2


def test_select_prints_the_winner_and_its_price(
    consilium: Callable[..., Done], tmp_path: Path
) -> None:
    asked = ("--set", "finetune.rounds=2,3", "--select", "geometric", "--trials", "1")
    done = consilium("sweep", small_study(tmp_path), *asked, "--out", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert "Chosen: finetune.rounds" in done.stdout
    assert "best of a random number of trials" in done.stdout


def test_opacus_is_loaded_for_layers_that_need_its_rules_alone() -> None:
    program = (
        "import sys, client.daemon\n"
        "assert 'torch' not in sys.modules\n"
        "import client.runner, server.runner, simulations.attacks, simulations.simulate\n"
        "assert 'opacus' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_an_edited_statement_is_refused(consilium: Callable[..., Done], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert consilium("simulate", small_study(tmp_path), "--run", run, "--json").returncode == 0
    assert consilium("coordinator", "statement", run).returncode == 0
    path = run / "privacy.json"
    path.write_text(path.read_text().replace('"epsilon_target": 3.0', '"epsilon_target": 1.0'))
    done = consilium("coordinator", "statement", run)
    assert done.returncode == 2
    assert "epsilon_target" in done.stderr


def test_interrupt_then_resume_gives_the_uninterrupted_result(
    consilium: Callable[..., Done], tmp_path: Path
) -> None:
    study = small_study(tmp_path, **{"rounds = 10": "rounds = 60", "steps = 400": "steps = 20"})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    seeded = ("--noise-seed", "7", "--json")
    assert consilium("simulate", study, "--run", whole, *seeded).returncode == 0
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "simulations.cli",
            "simulate",
            str(study),
            "--run",
            str(cut),
            *seeded,
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (cut / "rounds" / "finetune-0005.safetensors").exists():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert "consilium resume" in errors
    assert not (cut / "result.json").exists()
    assert consilium("resume", cut, "--json").returncode == 0
    for name in ("teacher.safetensors", "student.safetensors", "metrics.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    statement = (cut / "PRIVACY.md").read_text()
    assert "No privacy guarantee" in statement


STARTS_AT_ONCE = """
import sys
from contextlib import suppress
from pathlib import Path

from simulations.cli import main

folder = Path(sys.argv[1])
hospital, desk = str(folder / "hospital"), str(folder / "desk")
code = folder / "code"
code.write_text("not a code")
for command in (
    ("hospital", "--help"),
    ("hospital", "join", "--file", str(code), "--folder", hospital),
    ("hospital", "status", "--folder", hospital),
    ("hospital", "pause", "--folder", hospital),
    ("hospital", "resume", "--folder", hospital),
    ("hospital", "stop", "--folder", hospital),
    ("coordinator", "init", desk, "--host", "192.0.2.1"),
    ("coordinator", "status", "--folder", desk),
    ("coordinator", "enroll", "north", "--folder", desk),
    ("coordinator", "hospitals", "--folder", desk),
    ("coordinator", "stop", "--folder", desk),
    ("simulate", "--help"),
):
    sys.argv = ["consilium", *command]
    with suppress(SystemExit):
        main()
    heavy = {"torch", "flwr", "sklearn", "pandas", "ray", "matplotlib"} & sys.modules.keys()
    assert not heavy, (command, heavy)
# What a join with a good code runs, and an approval.
import client.link, client.safe, client.studies, client.visits
from common.study import load_study
load_study(Path("deploy/examples/heart.toml"))
heavy = {"torch", "flwr", "sklearn", "pandas"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_what_only_asks_loads_nothing_that_computes(tmp_path: Path) -> None:
    (tmp_path / "hospital").mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-c", STARTS_AT_ONCE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "desk").is_dir()  # commands did run
