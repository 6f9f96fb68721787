"""How accurate the finished student is, on real patients, over several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.study import Study, load_study
from simulations.bench.accuracy_imaging import imaging
from simulations.bench.accuracy_language import language
from simulations.bench.accuracy_molecules import molecules
from simulations.bench.accuracy_notes import notes
from simulations.bench.accuracy_prognosis import prognosis
from simulations.bench.accuracy_treatment import treatment
from simulations.bench.trained import (
    EXAMPLES,
    NON_PRIVATE,
    figures,
    find_folder,
    over_seeds,
    student_scores,
)
from simulations.evaluation import together

Row = Callable[[Path, int], dict[str, Any] | None]
"""Figures from the data's folder, by so many processes; None where the files are not found."""

_FEW_SEEDS = (0, 1, 2)


def wisconsin(_: Path, jobs: int) -> dict[str, Any]:
    """AUC of the student over all hospitals' test patients; one quarter tested, per seed."""
    study = load_study(EXAMPLES / "wisconsin.toml").revised(evaluation__epsilon=None)
    arms = {
        "eps3": study.revised(privacy__epsilon=3.0),
        "eps1": study.revised(privacy__epsilon=1.0),
        "nonprivate": study.revised(**NON_PRIVATE),
    }
    return figures(over_seeds(_auc, arms, jobs=jobs))


def _auc(study: Study, seed: int) -> Mapping[str, float]:
    return {"{}_auc": together(student_scores(study.revised(seed=seed), Path())).figures["auc"]}


def heart(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """Mean of the four hospitals' accuracy under 5-fold cross-validation, per seed."""
    folder = find_folder(data_folder, "heart", "processed.cleveland.data")
    if folder is None:
        return None
    study = load_study(EXAMPLES / "heart.toml")
    arms = {
        "nonprivate": study.revised(**NON_PRIVATE),
        "eps1": study.revised(privacy__epsilon=1.0),
    }
    return figures(over_seeds(partial(_accuracy, folder=folder), arms, jobs=jobs))


def _accuracy(study: Study, seed: int, *, folder: Path) -> Mapping[str, float]:
    folds = [
        student_scores(study.revised(seed=seed, evaluation__fold=fold), folder)
        for fold in range(study.evaluation.folds)
    ]
    # A hospital's accuracy counts every one of its patients once, over all folds.
    each = [together(parts).figures["accuracy"] for parts in zip(*folds, strict=True)]
    return {"{}_acc_mean4": float(np.mean(each))}


def diabetes(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """AUC of the student over all test patients of ten sites, and at the worst site, per seed."""
    folder = find_folder(data_folder, "diabetes130", "diabetic_data.csv.gz")
    if folder is None:
        return None
    study = load_study(EXAMPLES / "diabetes.toml")
    arms = {
        "eps3": study.revised(privacy__epsilon=3.0),
        # Unclipped gradients are larger: the example's rate would overshoot.
        "nonprivate": study.revised(
            **NON_PRIVATE,
            federation__hospitals=None,
            finetune__rounds=300,
            finetune__optimiser__learning_rate=0.3,
        ),
    }
    score = partial(_site_aucs, folder=folder)
    return figures(over_seeds(score, arms, _FEW_SEEDS, jobs=jobs), _FEW_SEEDS)


def _site_aucs(study: Study, seed: int, *, folder: Path) -> Mapping[str, float]:
    scores = student_scores(study.revised(seed=seed), folder)
    return {
        "{}_auc": together(scores).figures["auc"],
        "{}_auc_worst_site": min(one.figures["auc"] for one in scores),
    }


# One row for each kind of data.
ROWS: dict[str, Row] = {
    "wisconsin": wisconsin,
    "heart": heart,
    "diabetes": diabetes,
    "imaging": imaging,
    "molecules": molecules,
    "prognosis": prognosis,
    "treatment": treatment,
    "notes": notes,
    "language": language,
}


def accuracy(data_folder: Path, jobs: int) -> dict[str, Any]:
    """The bars' figures, row by row."""
    return {name: row(data_folder, jobs) for name, row in ROWS.items()}
