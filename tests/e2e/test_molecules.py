"""Drug discovery end to end on a few hundred real compounds of each kind of outcome.

Found below ``$CONSILIUM_DATA`` or ``../shared/data``; skipped, visibly, where they are absent.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from client.hospital import split_patients
from common.molecules import scaffold_folds
from common.sources import CsvSource
from common.study import Study, load_study
from common.tables import compounds_of, read_table
from common.tensors import load_tensors
from simulations.evaluation import finished_models
from simulations.hospitals import build_world
from simulations.partitions import partition
from simulations.simulate import InProcess, simulate
from simulations.summary import summarise

pytest.importorskip("rdkit", reason="needs the extra `molecules`")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "deploy" / "examples"
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data")) / "molecules"
FILES = {"bbbp": "BBBP.csv", "tox21": "tox21.csv.gz", "esol": "delaney-processed.csv"}
ROWS = {"bbbp": 400, "tox21": 1000, "esol": 400}  # toxic compounds are few
COLUMN = {"name": "smiles", "kind": "molecule", "optional": False, "bits": 128}
SMALL: dict[str, Any] = {"pretrain__steps": 30, "distill__steps": 150, "finetune__rounds": 20}


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder with some rows of every set, the same each time."""
    for name, file in FILES.items():
        if not (DATA / file).is_file():
            pytest.skip(f"needs {file} below {DATA}; set CONSILIUM_DATA")
        rows = pd.read_csv(DATA / file, dtype=str, keep_default_na=False)
        rows.sample(ROWS[name], random_state=0).to_csv(tmp_path / file, index=False)
    return tmp_path


def example(name: str, **changes: Any) -> Study:
    study = load_study(EXAMPLES / f"{name}.toml")
    small = {**SMALL, **changes}
    if study.teacher.kind == "components" and "teacher" not in changes:
        small["pretrain__steps"] = 0
    return study.revised(**small)


def test_a_secure_sum_of_sites_learns_classes(few: Path) -> None:
    """The example as it is but for its length, and more budget for the few compounds."""
    study = example("bbbp", privacy__epsilon=8.0, evaluation__split="random")
    summary = summarise(simulate(study, few / "run", few, lambda _: None))
    assert summary["all"]["student"]["auc"] > 0.6  # chance: .5
    assert summary["guaranteed"]


def test_sites_learn_several_outcomes(few: Path) -> None:
    """Rare outcomes take longer: at first all compounds are learned to be harmless."""
    study = example(
        "tox21",
        dictionary__columns=[COLUMN],
        pretrain__steps=200,
        finetune__rounds=60,
        privacy__trust="local",
        privacy__epsilon=30.0,
    )
    summary = summarise(simulate(study, few / "run", few, lambda _: None))
    assert summary["all"]["teacher"]["auc"] > 0.55  # chance: .5
    assert summary["guaranteed"]


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_sites_learn_a_number_and_release_how_well(few: Path, trust: str) -> None:
    study = example("esol", privacy__epsilon=8.0, privacy__trust=trust, evaluation__epsilon=8.0)
    run = simulate(study, few / "run", few, lambda _: None)
    summary = summarise(run)
    found = summary["all"]["student"]
    assert 0.5 < found["rmse"] < 1.9  # log10 of mol/L; the outcome's own deviation is 2.1
    released = run.read_json("result.json")["evaluation"]
    assert len(released) == (1 if trust == "distributed" else 4)


TRANSFORMER = {"kind": "transformer", "width": 16, "layers": 1, "heads": 2}


def test_a_transformer_over_smiles_teaches_a_bag_of_tokens(few: Path) -> None:
    """A secure sum's guarantee, and a student that took over what its teacher says."""
    study = example(
        "bbbp",
        dictionary__columns=[{**COLUMN, "tokens": 64}],
        teacher=TRANSFORMER,
        student={"kind": "transformer", "width": 8, "layers": 0, "heads": 1},
        distill__steps=600,
        distill__optimiser__learning_rate=1e-2,
        evaluation__split="random",
    )
    run = simulate(study, few / "run", few, lambda _: None)
    assert summarise(run)["guaranteed"]
    world = build_world(study, few)
    teacher, student, features = finished_models(run, study)
    assert world.corpus is not None
    inputs = features.encode(world.corpus)
    with torch.no_grad():
        said = torch.stack([teacher(inputs)[:, 0], student(inputs)[:, 0]])
    assert torch.corrcoef(said)[0, 1] > 0.5


@pytest.mark.parametrize(
    "teacher",
    [{"kind": "graph", "hidden": [8, 8]}, {"kind": "mlp", "hidden": [8, 8]}, TRANSFORMER],
    ids=lambda teacher: teacher["kind"],
)
def test_stacked_sites_learn_what_single_ones_do(few: Path, teacher: dict[str, Any]) -> None:
    study = example(
        "bbbp",
        dictionary__columns=[{**COLUMN, "atoms": 24, "tokens": 48}],
        teacher=teacher,
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


def test_all_sites_test_what_the_whole_sets_scaffold_split_does(few: Path) -> None:
    """MoleculeNet's published split of BBBP has 1,631, 204 and 204 compounds; of ours, which
    counts a substance once, the same tenths; sites round their own tenth."""
    study = load_study(EXAMPLES / "bbbp.toml")
    source = CsvSource(kind="csv", path=FILES["bbbp"])
    whole = read_table(source, study.dictionary, DATA)
    every_row = [one.decode() for one in whole.values["smiles"]]
    assert np.bincount(scaffold_folds(every_row, 10))[:2].tolist() == [204, 204]
    assert study.simulation is not None
    parts = partition(whole, study.simulation, 5, np.random.default_rng(0), 5)
    tested: list[str] = []
    for number, rows in enumerate(parts):
        site = whole.take(rows)
        _, test = split_patients(site, study.evaluation, seed=0, name=str(number))
        tested += compounds_of(test)
    compounds = compounds_of(whole)
    folds = scaffold_folds(compounds, study.evaluation.folds)
    rare = {one for one, fold in zip(compounds, folds, strict=True) if fold == 0}
    assert len(rare.symmetric_difference(tested)) < 0.05 * len(rare)


def test_public_structures_are_none_of_the_sites(few: Path) -> None:
    world = build_world(load_study(EXAMPLES / "esol.toml"), few)
    assert world.corpus is not None
    sites = {one for site in world.sites for one in site.table.patients}
    assert sites
    assert not sites & set(world.corpus.patients)
    assert len(world.corpus) > ROWS["tox21"] / 2
