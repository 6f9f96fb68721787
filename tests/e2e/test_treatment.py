"""The effect of a treatment where the truth is known (IHDP), from study file to report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.study import load_study
from common.tensors import load_tensors
from simulations.bench.trained import NON_PRIVATE
from simulations.run_report import write_run_report
from simulations.simulate import Engine, simulate
from simulations.summary import summarise
from tests.e2e.test_real_data import EXAMPLES, folder_of

quiet: Callable[[object], None] = lambda _: None  # noqa: E731


@pytest.fixture
def ihdp() -> Path:
    return folder_of("treatment_effect/ihdp", "ihdp_npci_1.csv")


@pytest.mark.parametrize("task", ["treatment", "treatment-effect", "treatment-targeted"])
def test_effect_is_found_together(ihdp: Path, tmp_path: Path, task: str) -> None:
    study = load_study(EXAMPLES / "ihdp.toml").revised(
        task=task, finetune__rounds=30, distill__steps=600, **NON_PRIVATE
    )
    run = simulate(study, tmp_path / "run", ihdp, quiet)
    figures = summarise(run)["all"]["student"]
    # An effect of 0 for everybody is wrong by 4.1 here.
    assert figures["sqrt_pehe"] < 1.5 and figures["ate_error"] < 1.0
    page = write_run_report(run.path).read_text(encoding="utf-8")
    assert "√PEHE" in page and "No data can show that these are effects" in page
    assert "Doubly robust" in page


@pytest.mark.parametrize(
    ("task", "on"), [("treatment", "public"), ("treatment-targeted", "patients")]
)
def test_secure_sums_and_both_engines(ihdp: Path, tmp_path: Path, task: str, on: str) -> None:
    study = load_study(EXAMPLES / "ihdp.toml").revised(
        task=task,
        finetune__rounds=2,
        distill__on=on,
        distill__rounds=2,
        distill__steps=20,
        distill__optimiser={"kind": "sgd", "learning_rate": 0.1},
    )
    run = simulate(study, tmp_path / "sums", ihdp, quiet, noise_seed=1)
    assert np.isfinite(summarise(run)["all"]["student"]["sqrt_pehe"])
    engines: tuple[Engine, ...] = ("stacked", "one-by-one")
    local = study.revised(privacy__trust="local")
    stacked, single = (
        simulate(local, tmp_path / engine, ihdp, quiet, noise_seed=1, engine=engine).path
        for engine in engines
    )
    for model in ("teacher", "student"):
        one, other = (load_tensors(run / f"{model}.safetensors") for run in (stacked, single))
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_allclose(one[key].numpy(), other[key].numpy(), atol=1e-5)
    if task == "treatment-targeted":  # ε was learned from patients, and kept
        assert load_tensors(stacked / "teacher.safetensors")["head.shared.weight"].abs() > 0
