"""Survival after breast cancer in six regions (TCGA-BRCA), from study file to report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.study import load_study
from common.tensors import load_tensors
from simulations.run_report import write_run_report
from simulations.simulate import Engine, simulate
from simulations.summary import summarise
from tests.e2e.test_real_data import EXAMPLES, folder_of

quiet: Callable[[object], None] = lambda _: None  # noqa: E731


@pytest.fixture
def brca() -> Path:
    return folder_of("tcga_brca", "brca.csv")


def test_prognosis_of_breast_cancer_by_secure_sums(brca: Path, tmp_path: Path) -> None:
    study = load_study(EXAMPLES / "brca.toml").revised(
        finetune__rounds=4,
        distill__steps=400,
        privacy__epsilon=10.0,
        evaluation__epsilon=8.0,
        evaluation__bins=5,
    )
    run = simulate(study, tmp_path / "run", brca, quiet, noise_seed=1)
    summary = summarise(run)
    assert summary["guaranteed"] is False  # test noise
    assert [one["test_patients"] for one in summary["hospitals"]] == [29, 2, 28, 8, 23, 23, 44]
    figures = summary["all"]["student"]
    assert figures["cindex"] > 0.55 and 0 < figures["ibs"] < 0.3
    assert summary["hospitals"][1]["student"]["cindex"] is None  # two patients, no death
    assert summary["released"]["cindex"][0] is not None
    assert summary["released"]["ibs"][0] is None
    page = write_run_report(run.path).read_text(encoding="utf-8")
    assert "C-index" in page and "Uno" in page and "Kaplan and Meier" in page
    assert (run.path / "plots" / "survival.png").stat().st_size > 10_000


def test_stacked_hospitals_learn_what_single_ones_do(brca: Path, tmp_path: Path) -> None:
    study = load_study(EXAMPLES / "brca.toml").revised(
        finetune__rounds=2, distill__steps=50, privacy__trust="local"
    )
    engines: tuple[Engine, ...] = ("stacked", "one-by-one")
    stacked, single = (
        load_tensors(
            simulate(study, tmp_path / engine, brca, quiet, noise_seed=1, engine=engine).path
            / "teacher.safetensors"
        )
        for engine in engines
    )
    for key in stacked:
        np.testing.assert_allclose(stacked[key].numpy(), single[key].numpy(), atol=1e-5)
