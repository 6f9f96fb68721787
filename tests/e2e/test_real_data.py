"""Studies on real hospitals' files, which are not part of this repository.

Found below ``$CONSILIUM_DATA`` or ``../shared/data``; skipped, visibly, where they are absent.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.errors import DataError
from common.study import load_study
from server.store import RunFolder
from simulations.describe import check_data
from simulations.hospitals import build_world
from simulations.simulate import simulate
from simulations.summary import summarise

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data"))


def folder_of(name: str, file: str) -> Path:
    folder = DATA / name
    if not (folder / file).is_file():
        pytest.skip(f"needs {file} below {folder}; set CONSILIUM_DATA")
    return folder


@pytest.fixture
def heart() -> Path:
    return folder_of("heart", "processed.cleveland.data")


@pytest.fixture
def pneumonia() -> Path:
    return folder_of("images", "pneumoniamnist.npz")


def test_heart_data_are_what_their_description_says(heart: Path) -> None:
    """Rows, and the columns that hold nothing at one hospital (heart-disease.names)."""
    reports = check_data(load_study(EXAMPLES / "heart.toml"), heart)
    rows = {name: report["rows"] for name, report in reports.items()}
    assert rows == {"cleveland": 199, "hungarian": 195, "switzerland": 84, "va": 134}
    missing = {
        name: {column["name"]: column["missing"] for column in report["columns"]}
        for name, report in reports.items()
    }
    assert missing["switzerland"]["chol"] == 84  # written as 0: never measured there
    assert missing["hungarian"]["ca"] > 190
    assert missing["cleveland"]["chol"] == 0
    assert all(
        column["unmapped"] == 0 for report in reports.values() for column in report["columns"]
    )
    assert any("chol: empty throughout" in one for one in reports["switzerland"]["problems"])


def test_four_real_hospitals_learn_together(heart: Path, tmp_path: Path) -> None:
    study = load_study(EXAMPLES / "heart.toml").revised(distill__steps=400)
    run = simulate(study, tmp_path / "run", heart, lambda _: None)
    summary = summarise(run)
    assert [row["hospital"] for row in summary["hospitals"]] == [
        "cleveland",
        "hungarian",
        "switzerland",
        "va",
    ]
    # Chance is .5; a right run stays far above .75 whatever the noise at ε = 1.
    assert summary["all"]["student"]["auc"] > 0.75
    assert summary["epsilon"] <= 1.0
    assert summary["guaranteed"]


def test_images_of_ten_hospitals(pneumonia: Path, tmp_path: Path) -> None:
    study = load_study(EXAMPLES / "pneumonia.toml").revised(
        pretrain__steps=20, finetune__rounds=8, distill__steps=60
    )
    world = build_world(study, pneumonia)
    assert len(world.sites) == 10
    assert world.corpus is not None
    assert len(world.corpus) + sum(len(site.table) for site in world.sites) == 4708
    run = simulate(study, tmp_path / "run", pneumonia, lambda _: None)
    summary = summarise(RunFolder(run.path))
    assert summary["all"]["teacher"]["auc"] > 0.8
    assert summary["teacher_parameters"] >= 10 * summary["student_parameters"]


def test_repeated_encounters_stay_with_their_patient() -> None:
    """Counts from the data's description: 71,257 encounters of 50,062 patients at ten sites."""
    folder = folder_of("diabetes130", "diabetic_data.csv.gz")
    world = build_world(load_study(EXAMPLES / "diabetes.toml"), folder)
    assert world.corpus is not None
    tables = [world.corpus, *(site.table for site in world.sites)]
    assert len(world.sites) == 10
    assert sum(len(table) for table in tables) == 71_257
    assert sum(len(set(table.patients)) for table in tables) == 50_062


def test_a_wrong_folder_is_one_line(heart: Path) -> None:
    with pytest.raises(DataError, match=r"no such data file; name the folder .* --data FOLDER"):
        build_world(load_study(EXAMPLES / "heart.toml"), heart.parent)
