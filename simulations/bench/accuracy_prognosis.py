"""How well the finished student orders patients by their survival, on TCGA-BRCA's six regions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.study import load_study
from simulations.bench.trained import (
    EXAMPLES,
    NON_PRIVATE,
    SEEDS,
    figures,
    find_folder,
    student_scores,
)
from simulations.evaluation import together

_FILE = "brca.csv"
# Without noise nothing is gained by clipping, and more steps cost nothing.
_UNCLIPPED: dict[str, Any] = {
    "privacy__clip_norm": 10.0,
    "finetune__rounds": 60,
    "finetune__optimiser__learning_rate": 0.3,
}


def prognosis(data_folder: Path) -> dict[str, Any] | None:
    """C-index over all patients, each predicted by the student whose fold left it out, per seed."""
    folder = find_folder(data_folder, "tcga_brca", _FILE)
    if folder is None:
        return None
    study = load_study(EXAMPLES / "brca.toml")
    arms: dict[str, Mapping[str, Any]] = {
        "nonprivate_cindex": {**NON_PRIVATE, **_UNCLIPPED},
        "eps3_cindex": {"privacy__epsilon": 3.0},
    }

    def seed_cindex(seed: int, changes: Mapping[str, Any]) -> float:
        scores = [
            one
            for fold in range(study.evaluation.folds)
            for one in student_scores(
                study.revised(seed=seed, evaluation__fold=fold, **changes), folder
            )
        ]
        return together(scores).figures["cindex"]

    return figures(
        {key: [seed_cindex(seed, changes) for seed in SEEDS] for key, changes in arms.items()}
    )
