"""Drug discovery end to end on a few hundred real compounds of each kind of outcome.

Found below ``$CONSILIUM_DATA`` or ``../shared/data``; skipped, visibly, where they are absent.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from common.study import Study, load_study
from common.tensors import load_tensors
from simulations.hospitals import build_world
from simulations.simulate import InProcess, simulate
from simulations.summary import summarise

pytest.importorskip("rdkit", reason="needs the extra `molecules`")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data")) / "molecules"
FILES = {"bbbp": "BBBP.csv", "tox21": "tox21.csv.gz", "esol": "delaney-processed.csv"}
ROWS = 400
SMALL: dict[str, Any] = {"pretrain__steps": 30, "distill__steps": 150}


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder with some rows of every set, the same each time."""
    for file in FILES.values():
        if not (DATA / file).is_file():
            pytest.skip(f"needs {file} below {DATA}; set CONSILIUM_DATA")
        rows = pd.read_csv(DATA / file, dtype=str, keep_default_na=False)
        rows.sample(ROWS, random_state=0).to_csv(tmp_path / file, index=False)
    return tmp_path


def example(name: str, **changes: Any) -> Study:
    return load_study(EXAMPLES / f"{name}.toml").revised(**SMALL, **changes)


@pytest.mark.parametrize(("name", "least"), [("bbbp", 0.6), ("tox21", 0.55)])
def test_a_secure_sum_of_sites_learns_classes(few: Path, name: str, least: float) -> None:
    """The examples as they are but for their length, and more budget for the few compounds."""
    study = example(name, privacy__epsilon=20.0, evaluation__split="random")
    run = simulate(study, few / "run", few, lambda _: None)
    summary = summarise(run)
    assert summary["all"]["student"]["auc"] > least  # chance: .5
    assert summary["guaranteed"]


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_sites_learn_a_number_and_release_how_well(few: Path, trust: str) -> None:
    study = example("esol", privacy__epsilon=20.0, privacy__trust=trust, evaluation__epsilon=50.0)
    run = simulate(study, few / "run", few, lambda _: None)
    summary = summarise(run)
    found = summary["all"]["student"]
    assert 0.5 < found["rmse"] < 1.9  # log10 of mol/L; the outcome's own deviation is 2.1
    released = run.read_json("result.json")["evaluation"]
    assert len(released) == (1 if trust == "distributed" else 4)


@pytest.mark.parametrize("kind", ["graph", "mlp"])
def test_stacked_sites_learn_what_single_ones_do(few: Path, kind: str) -> None:
    column = {"name": "smiles", "kind": "molecule", "optional": False, "bits": 128, "atoms": 24}
    study = example(
        "bbbp",
        dictionary__columns=[column],
        teacher={"kind": kind, "hidden": [8, 8]},
        student={"kind": "mlp", "hidden": [4]},
        finetune__trainable="all",
        finetune__rounds=4,
        privacy__trust="local",
        federation={"rule": "fedavg", "minimum_hospitals": 5},
        evaluation__folds=3,
    )
    engines: tuple[InProcess, ...] = ("stacked", "one-by-one")
    teachers = [
        load_tensors(
            simulate(study, few / engine, few, lambda _: None, noise_seed=3, engine=engine).path
            / "teacher.safetensors"
        )
        for engine in engines
    ]
    for name, weights in teachers[0].items():
        torch.testing.assert_close(weights, teachers[1][name], rtol=1e-3, atol=1e-4)


def test_real_structures_are_read_as_their_description_says(few: Path) -> None:
    """2,050 rows of which 11 cannot be read; MoleculeNet's scaffold split tests 204 of 2,039."""
    study = load_study(EXAMPLES / "bbbp.toml").revised(
        public={"kind": "held_apart", "fraction": 0.001}
    )
    world = build_world(study, DATA)
    assert world.corpus is not None
    tables = [world.corpus, *(site.table for site in world.sites)]
    assert sum(map(len, tables)) == 2039
    assert len({one for table in tables for one in table.patients}) == 1942
    (problem,) = tables[1].report.problems
    assert "11 of 2050 structures are empty or cannot be read" in problem


def test_public_structures_are_none_of_the_sites(few: Path) -> None:
    world = build_world(load_study(EXAMPLES / "esol.toml"), few)
    assert world.corpus is not None
    sites = {one for site in world.sites for one in site.table.patients}
    assert sites
    assert not sites & set(world.corpus.patients)
    assert len(world.corpus) > ROWS / 2
