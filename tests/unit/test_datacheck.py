"""A hospital looks at its own data: the whole report, and a preview that goes nowhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from client.datacheck import ascii_picture, check_own, preview_own, report_tables
from client.safe import create_safe
from common.errors import DataError
from common.study import Study, parse_study
from simulations.cli import main

CELL = "CANARY-CELL-77"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hospital with a safe, whose file has dates, names and odd cells."""
    for variable in ("CONSILIUM_KEY", "CONSILIUM_KEY_FILE", "CONSILIUM_PASSPHRASE"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "north"
    create_safe(path, {})
    lines = ["pid,name,came,left,weight,b,ill"]
    lines += [
        f"{CELL}-{n // 2},Ada,2020-01-01,2020-01-{3 + n % 9:02d},3,2,{n % 2}" for n in range(8)
    ]
    lines += [f"z,Ada,2020-01-01,?,{CELL},99,1", "y,Ada,soon,2020-01-02,1,1,9"]
    (path / "x.csv").write_text("\n".join(lines) + "\n")
    settings = {
        "name": "north",
        "declared_patients": 10,
        "safe": ".",
        "source": {
            "kind": "csv",
            "path": "x.csv",
            "rename": {"who": "pid"},
            "derive": {"a": {"start": "came", "end": "left"}},
        },
    }
    (path / "hospital.toml").write_text(tomli_w.dumps(settings))
    return path


@pytest.fixture
def study(tree: dict[str, Any]) -> Study:
    tree["dictionary"]["columns"][0] |= {"range": [0.0, 9.0]}
    return parse_study(tree, origin="test")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capsys.readouterr()
        return int(stopped.value.code or 0), told.out, told.err

    return run


def text_of(shown: list[Any]) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        for one in shown:
            console.print(one, markup=False)
    return capture.get()


def everything_written(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_says_how_each_column_was_read_and_what_to_do(
    folder: Path, study: Study
) -> None:
    report = check_own(folder, study)["north"]
    assert (report["rows"], report["patients"], report["unlabelled"]) == (10, 6, 1)
    told = text_of(report_tables({"north": report}, whole=True))
    for words in (
        "north: 10 rows, 6 patients, 1 without a known label",
        "b: 1 values outside the plausible range; they are clipped to it: check units",
        "ill: 1 rows have values of no class (9) and are left out; recode them",
        "came: 1 cells are no dates and were read as missing; set date_format",
        "de-identified: never read, as direct identifiers: name",
        "de-identified: dates shifted by a secret offset",
    ):
        assert words in told
    assert "2 (20%)" in told  # of column a: one date that is none, one missing
    assert CELL not in told


def test_dates_are_shifted_by_the_safes_own_key(folder: Path, study: Study) -> None:
    from client.hospitalfile import load_hospital_file
    from client.safe import open_safe

    assert load_hospital_file(folder).safe == "."
    with open_safe(folder, {}) as safe:
        key = safe.dates_key()
        assert key == safe.dates_key()
    secret = (folder / "ledger.secret").read_bytes()
    assert len(key) == 32
    assert key not in secret


def test_a_preview_numbers_patients_and_writes_nothing(
    folder: Path, study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    before = everything_written(folder)
    told = text_of(preview_own(folder, study, 3))
    assert CELL not in told
    assert "Ada" not in told
    rows = [line.split("│")[1:-1] for line in told.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows[-3:]] == [
        ["1", "2", "2", "0"],
        ["1", "3", "2", "1"],
        ["2", "4", "2", "0"],
    ]
    assert everything_written(folder) == before
    assert caplog.text == ""


def test_a_preview_needs_a_terminal(
    folder: Path, study: Study, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(study.to_toml())
    code, out, err = run("data", "preview", path, "--hospital", folder)
    assert (code, out) == (2, "")
    assert "expected a terminal, found a file, pipe or log" in err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = run("data", "preview", path, "--hospital", folder, "--rows", "2")
    assert code == 0
    assert "patient" in out


def test_check_at_a_hospital_and_in_a_simulation(
    folder: Path, study: Study, tree: dict[str, Any], tmp_path: Path, run: Any
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(study.to_toml())
    code, out, _ = run("data", "check", path, "--hospital", folder, "--json")
    assert code == 0
    assert json.loads(out)["north"]["rows"] == 10
    code, out, _ = run("data", "check", path, "--hospital", folder)
    assert code == 0
    assert "read from" in out
    code, _, err = run("data", "check", path)
    assert code == 2
    assert "a hospital checks its own with --hospital FOLDER" in err
    source = {
        "kind": "csv",
        "path": "x.csv",
        "rename": {"who": "pid"},
        "derive": {"a": {"start": "came", "end": "left"}},
    }
    tree["simulation"] = {"source": source, "hospitals": 2}
    path.write_text(parse_study(tree, origin="test").to_toml())
    code, out, _ = run("data", "check", path, "--data", folder, "--json")
    assert json.loads(out)["all"]["patients"] == 6


def test_a_picture_in_characters(tmp_path: Path, tree: dict[str, Any]) -> None:
    grey = np.zeros((96, 96), np.float32)
    grey[:48] = 1
    lines = ascii_picture(grey)
    assert (len(lines), {len(line) for line in lines}) == (24, {48})
    assert lines[0] == "@" * 48
    assert lines[-1] == " " * 48


def test_pictures_are_previewed_too(tmp_path: Path, tree: dict[str, Any]) -> None:
    np.savez(tmp_path / "x.npz", pic=np.full((3, 8, 8), 255, np.uint8), ill=np.array([0, 1, 0]))
    settings = {
        "name": "n",
        "declared_patients": 10,
        "source": {"kind": "npz", "path": "x.npz"},
    }
    (tmp_path / "hospital.toml").write_text(tomli_w.dumps(settings))
    tree["task"] = "imaging"
    tree["dictionary"] |= {
        "patient_id": "",
        "columns": [{"name": "pic", "kind": "image", "shape": [8, 8]}],
    }
    tree["public"] = {"kind": "held_apart"}
    tree["teacher"], tree["student"] = (
        {"kind": "cnn", "hidden": [4, 4]},
        {"kind": "cnn", "hidden": [4]},
    )
    shown = preview_own(tmp_path, parse_study(tree, origin="test"), 2)
    assert shown[0] == "patient 1, ill = 0"
    assert shown[1] == "@" * 8


def test_what_cannot_be_read_is_one_line(folder: Path, study: Study) -> None:
    (folder / "x.csv").unlink()
    with pytest.raises(DataError, match="no such data file"):
        check_own(folder, study)
