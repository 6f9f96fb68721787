"""How accurate the finished student is, on real patients, over several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.study import load_study
from simulations.bench.accuracy_imaging import imaging
from simulations.bench.accuracy_molecules import molecules
from simulations.bench.accuracy_notes import notes
from simulations.bench.accuracy_prognosis import prognosis
from simulations.bench.accuracy_treatment import treatment
from simulations.bench.trained import (
    EXAMPLES,
    NON_PRIVATE,
    SEEDS,
    figures,
    find_folder,
    student_scores,
)
from simulations.evaluation import together

_FEW_SEEDS = (0, 1, 2)


def wisconsin(_: Path) -> dict[str, Any]:
    """AUC of the student over all hospitals' test patients; one quarter tested, per seed."""
    study = load_study(EXAMPLES / "wisconsin.toml").revised(evaluation__epsilon=None)
    arms: dict[str, Mapping[str, Any]] = {
        "eps3_auc": {"privacy__epsilon": 3.0},
        "eps1_auc": {"privacy__epsilon": 1.0},
        "nonprivate_auc": NON_PRIVATE,
    }
    return figures(
        {
            key: [
                together(student_scores(study.revised(seed=seed, **changes), Path())).figures["auc"]
                for seed in SEEDS
            ]
            for key, changes in arms.items()
        }
    )


def heart(data_folder: Path) -> dict[str, Any] | None:
    """Mean of the four hospitals' accuracy under 5-fold cross-validation, per seed."""
    folder = find_folder(data_folder, "heart", "processed.cleveland.data")
    if folder is None:
        return None
    study = load_study(EXAMPLES / "heart.toml")
    arms: dict[str, Mapping[str, Any]] = {
        "nonprivate_acc_mean4": NON_PRIVATE,
        "eps1_acc_mean4": {"privacy__epsilon": 1.0},
    }

    def seed_accuracy(seed: int, changes: Mapping[str, Any]) -> float:
        folds = [
            student_scores(study.revised(seed=seed, evaluation__fold=fold, **changes), folder)
            for fold in range(study.evaluation.folds)
        ]
        # A hospital's accuracy counts every one of its patients once, over all folds.
        each = [together(parts).figures["accuracy"] for parts in zip(*folds, strict=True)]
        return float(np.mean(each))

    return figures(
        {key: [seed_accuracy(seed, changes) for seed in SEEDS] for key, changes in arms.items()}
    )


def diabetes(data_folder: Path) -> dict[str, Any] | None:
    """AUC of the student over all test patients of ten sites, and at the worst site, per seed."""
    folder = find_folder(data_folder, "diabetes130", "diabetic_data.csv.gz")
    if folder is None:
        return None
    study = load_study(EXAMPLES / "diabetes.toml")
    arms: dict[str, Mapping[str, Any]] = {
        "eps3_auc": {"privacy__epsilon": 3.0},
        "nonprivate_auc": {**NON_PRIVATE, "federation__hospitals": None},
    }
    values: dict[str, list[float]] = {}
    for key, changes in arms.items():
        for seed in _FEW_SEEDS:
            scores = student_scores(study.revised(seed=seed, **changes), folder)
            values.setdefault(key, []).append(together(scores).figures["auc"])
            worst = min(one.figures["auc"] for one in scores)
            values.setdefault(f"{key}_worst_site", []).append(worst)
    return figures(values, _FEW_SEEDS)


# One row for each kind of data; None where its files are not found.
ROWS: dict[str, Callable[[Path], dict[str, Any] | None]] = {
    "wisconsin": wisconsin,
    "heart": heart,
    "diabetes": diabetes,
    "imaging": imaging,
    "molecules": molecules,
    "prognosis": prognosis,
    "treatment": treatment,
    "notes": notes,
}


def accuracy(data_folder: Path) -> dict[str, Any]:
    """The bars' figures, row by row."""
    return {name: row(data_folder) for name, row in ROWS.items()}
