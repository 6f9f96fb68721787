"""How well the finished student orders patients by their survival, on TCGA-BRCA's six regions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from client.hospital import split_patients
from common.features import FeatureMap, range_scaling
from common.learning.survival_metrics import concordance
from common.study import Study, load_study
from common.tables import concatenate
from simulations.bench.cox import cox_risks
from simulations.bench.trained import (
    EXAMPLES,
    NON_PRIVATE,
    figures,
    find_folder,
    over_seeds,
    student_scores,
)
from simulations.evaluation import together
from simulations.hospitals import build_world

_FILE = "brca.csv"
# Without noise more steps cost nothing; without clipping they must be smaller.
_LONGER: dict[str, Any] = {
    "finetune__rounds": 60,
    "finetune__optimiser__learning_rate": 0.3,
}
_RIDGE = 0.01  # of the tried ones (.001 to .1) the best for the pooled reference, to its advantage


def prognosis(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """C-index over all patients, each predicted by the student whose fold left it out, per seed.

    ``pooled_cox_cindex``: a ridge-penalised Cox model of all pooled patients, in the same folds.
    """
    folder = find_folder(data_folder, "tcga_brca", _FILE)
    if folder is None:
        return None
    study = load_study(EXAMPLES / "brca.toml")
    arms = {
        "nonprivate": study.revised(**NON_PRIVATE, **_LONGER),
        "eps3": study.revised(privacy__epsilon=3.0),
    }
    found = over_seeds(partial(_cindex, folder=folder), arms, jobs=jobs)
    pooled = over_seeds(partial(_cox, folder=folder), {"pooled_cox": study}, jobs=jobs)
    return figures(found | pooled)


def _cindex(study: Study, seed: int, *, folder: Path) -> Mapping[str, float]:
    scores = [
        one
        for fold in range(study.evaluation.folds)
        for one in student_scores(study.revised(seed=seed, evaluation__fold=fold), folder)
    ]
    return {"{}_cindex": together(scores).figures["cindex"]}


def _cox(study: Study, seed: int, *, folder: Path) -> Mapping[str, float]:
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    risks, outcomes = [], []
    for fold in range(study.evaluation.folds):
        binding = study.revised(seed=seed, evaluation__fold=fold)
        split = [
            split_patients(site.table, binding.evaluation, seed=seed, name=site.name)
            for site in build_world(binding, folder).sites
        ]
        train, test = (concatenate(list(tables)) for tables in zip(*split, strict=True))
        inputs, tested = (features.encode(one).double().numpy() for one in (train, test))
        times, seen = train.labels.astype(np.float64).T
        risks.append(cox_risks(inputs, times, seen > 0, tested, ridge=_RIDGE))
        outcomes.append(test.labels.astype(np.float64))
    times, seen = np.concatenate(outcomes).T
    return {"{}_cindex": concordance(times, seen > 0, np.concatenate(risks))}
