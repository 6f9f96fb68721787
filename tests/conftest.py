"""Studies small enough for tests, and hospitals in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Before Flower and torch are imported. Flower's defaults report usage and look for updates.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The networks here are tiny: threads would only wait for each other (ten times slower).
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

from client.guard import MemoryGuard
from client.hospital import Hospital
from common.dictionary import Dictionary
from common.randomness import SeededNoise
from common.study import Study, load_study, parse_study
from common.tables import Table, TableReport

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.toml"))


@pytest.fixture(scope="session")
def examples() -> list[Path]:
    """Every study file that ships."""
    return EXAMPLES


@pytest.fixture(scope="session")
def wisconsin() -> Study:
    """The example on Wisconsin, cut down to seconds."""
    return load_study(ROOT / "deploy" / "examples" / "wisconsin.toml").revised(
        finetune__rounds=3,
        pretrain__steps=30,
        distill__steps=60,
        simulation__hospitals=4,
        federation__minimum_hospitals=3,
    )


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def consilium(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """The command line in this process: what it printed and the exit code it ended with."""
    from simulations.cli import main

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return Done(int(stop.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def tree() -> dict[str, Any]:
    """A small valid study on two columns, as parsed TOML; tests spoil it."""
    return {
        "name": "small",
        "task": "diagnosis",
        "seed": 1,
        "dictionary": {
            "patient_id": "who",
            "label": {"name": "ill", "classes": [[0], [1]]},
            "columns": [
                {"name": "a", "kind": "numeric", "range": [-4.0, 4.0]},
                {"name": "b", "kind": "numeric", "range": [-4.0, 4.0]},
            ],
        },
        "public": {"kind": "dictionary", "records": 64},
        "teacher": {"kind": "mlp", "hidden": [16, 8], "skip": True},
        "student": {"kind": "mlp", "hidden": [2]},
        "pretrain": {"steps": 5, "optimiser": {"kind": "adam", "learning_rate": 1e-3}},
        "finetune": {"rounds": 3, "optimiser": {"kind": "sgd", "learning_rate": 0.5}},
        "distill": {
            "on": "public",
            "steps": 40,
            "rounds": 3,
            "optimiser": {"kind": "adam", "learning_rate": 1e-2},
        },
        "privacy": {"trust": "local", "epsilon": 4.0, "delta": 1e-5},
        "evaluation": {"folds": 4},
    }


@pytest.fixture
def small(tree: dict[str, Any]) -> Study:
    """The small study itself."""
    return parse_study(tree, origin="test")


def _table(study: Study, patients: int, records_each: int, seed: int) -> Table:
    """Separable records: illness shows in both columns of every record of a patient."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 2, patients)
    owners = np.repeat(np.arange(patients), records_each)
    values = {
        column.name: 1.5 * (2.0 * label[owners] - 1) + generator.normal(0, 1, len(owners))
        for column in study.dictionary.columns
    }
    return Table(
        dictionary=study.dictionary,
        values=values,
        labels=label[owners].astype(np.int64),
        patients=np.array([f"p{seed}-{owner}" for owner in owners], dtype=object),
        report=TableReport(rows=len(owners), patients=patients, unlabelled=0, columns=()),
    )


@pytest.fixture
def make_table() -> Callable[..., Table]:
    """``make_table(study, patients=…, records_each=…, seed=…)``."""

    def make(study: Study, *, patients: int = 60, records_each: int = 1, seed: int = 0) -> Table:
        return _table(study, patients, records_each, seed)

    return make


@pytest.fixture
def make_hospital() -> Callable[..., Hospital]:
    """A hospital in memory with test noise."""

    def make(
        study: Study,
        name: str = "north",
        *,
        patients: int = 60,
        records_each: int = 1,
        seed: int = 0,
        noise_seed: int = 7,
    ) -> Hospital:
        return Hospital(
            name=name,
            study=study,
            train=_table(study, patients, records_each, seed),
            test=_table(study, 20, 1, seed + 1000),
            declared_patients=patients,
            guard=MemoryGuard(SeededNoise(noise_seed, name)),
        )

    return make


@pytest.fixture
def table_of() -> Callable[..., Table]:
    """A table straight from arrays, for edge cases."""

    def make(dictionary: Dictionary, values: dict[str, Any], labels: Any = None) -> Table:
        rows = len(next(iter(values.values())))
        known = np.zeros(rows, np.int64) if labels is None else np.asarray(labels, np.int64)
        return Table(
            dictionary,
            {name: np.asarray(column) for name, column in values.items()},
            known,
            np.array([f"row-{row}" for row in range(rows)], dtype=object),
            TableReport(rows=rows, patients=rows, unlabelled=0, columns=()),
        )

    return make
