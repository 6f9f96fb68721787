"""Does pre-training help? The same studies with and without it, everything else equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.study import Study, load_study
from simulations.bench.trained import EXAMPLES, SEEDS, figures, find_folder, student_scores
from simulations.evaluation import together


def pretraining(data_folder: Path) -> dict[str, Any]:
    """Student AUC at ε = 3 with the pre-trained and with the random encoder, and the difference.

    ``wisconsin`` and, where their files are found, ``heart`` and ``pneumonia`` (null elsewhere).
    """
    homes = {
        "wisconsin": data_folder,
        "heart": find_folder(data_folder, "heart", "processed.cleveland.data"),
        "pneumonia": find_folder(data_folder, "images", "pneumoniamnist.npz"),
    }
    return {
        name: None if home is None else _ablation(load_study(EXAMPLES / f"{name}.toml"), home)
        for name, home in homes.items()
    }


def _ablation(study: Study, folder: Path) -> dict[str, Any]:
    study = study.revised(privacy__epsilon=3.0, evaluation__epsilon=None)
    with_it, without = (
        [
            together(student_scores(study.revised(seed=seed, **changes), folder)).figures["auc"]
            for seed in SEEDS
        ]
        for changes in ({}, {"pretrain__steps": 0})
    )
    paired = [one - other for one, other in zip(with_it, without, strict=True)]
    return figures({"pretrained_auc": with_it, "random_auc": without, "difference": paired})
