"""How well the finished student orders patients by their survival, on TCGA-BRCA's six regions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.study import Study, load_study
from simulations.bench.trained import (
    EXAMPLES,
    NON_PRIVATE,
    figures,
    find_folder,
    over_seeds,
    student_scores,
)
from simulations.evaluation import together

_FILE = "brca.csv"
# Without noise more steps cost nothing; without clipping they must be smaller.
_LONGER: dict[str, Any] = {
    "finetune__rounds": 60,
    "finetune__optimiser__learning_rate": 0.3,
}


def prognosis(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """C-index over all patients, each predicted by the student whose fold left it out, per seed."""
    folder = find_folder(data_folder, "tcga_brca", _FILE)
    if folder is None:
        return None
    study = load_study(EXAMPLES / "brca.toml")
    arms = {
        "nonprivate": study.revised(**NON_PRIVATE, **_LONGER),
        "eps3": study.revised(privacy__epsilon=3.0),
    }
    return figures(over_seeds(partial(_cindex, folder=folder), arms, jobs=jobs))


def _cindex(study: Study, seed: int, *, folder: Path) -> Mapping[str, float]:
    scores = [
        one
        for fold in range(study.evaluation.folds)
        for one in student_scores(study.revised(seed=seed, evaluation__fold=fold), folder)
    ]
    return {"{}_cindex": together(scores).figures["cindex"]}
