"""What hospitals' texts add to a model of language that learned on published ones."""

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
    trained,
)
from simulations.evaluation import score, together

_SEEDS = (0, 1, 2)
_NO_SPEED = 1e-12


def language(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """Bits per byte over all hospitals' test patients, over seeds that draw hospitals anew.

    ``teacher_…``: of the teacher, which learned from patients; the others: of its student.
    ``public``: of models that no patient taught. None without the files of both data sets.
    """
    folder = find_folder(data_folder, "text", "mtsamples_descriptions.csv")
    if folder is None or not (folder / "mts_dialog" / "train.csv").is_file():
        return None
    study = load_study(EXAMPLES / "language.toml")
    free = study.revised(**NON_PRIVATE, federation__hospitals=None)
    arms = {
        "public": free.revised(finetune__rounds=1, finetune__optimiser__learning_rate=_NO_SPEED),
        "nonprivate": free,
        "eps8": study.revised(privacy__epsilon=8.0),
        "eps3": study.revised(privacy__epsilon=3.0),
    }
    return figures(over_seeds(partial(_bits, folder=folder), arms, _SEEDS, jobs=jobs), _SEEDS)


def _bits(study: Study, seed: int, *, folder: Path) -> Mapping[str, float]:
    study = study.revised(seed=seed)
    done = trained(study, folder)
    return {
        key: together(score(model, study, done.features, done.hospitals)).figures["bits"]
        for key, model in (("teacher_{}_bits", done.teacher), ("{}_bits", done.student))
    }
