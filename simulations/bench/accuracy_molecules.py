"""How good the finished student is on molecules: three kinds of outcome, private and not."""

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

# The figure of each example, and at what rate its whole teacher learns without privacy. Rates and
# the examples' own settings were chosen on random splits of other seeds.
_STUDIES: Mapping[str, tuple[str, float]] = {
    "bbbp": ("auc", 0.3),
    "tox21": ("auc", 0.3),
    "esol": ("rmse", 0.01),
}


def molecules(data_folder: Path) -> dict[str, Any] | None:
    """BBBP's AUC where the fifth with the rarest scaffolds is tested; Tox21's mean AUC and ESOL's
    RMSE on random fifths. The private arm is the example: ε = 3, distributed trust."""
    folder = find_folder(data_folder, "molecules", "BBBP.csv")
    if folder is None:
        return None
    return _row("bbbp", folder) | {
        f"{name}_{key}": value
        for name in ("tox21", "esol")
        for key, value in _row(name, folder).items()
        if key != "seeds"
    }


def _row(name: str, folder: Path) -> dict[str, Any]:
    figure, rate = _STUDIES[name]
    study = load_study(EXAMPLES / f"{name}.toml").revised(evaluation__epsilon=None)
    arms: dict[str, Mapping[str, Any]] = {
        "nonprivate": {
            **NON_PRIVATE,
            "finetune__trainable": "all",
            "finetune__optimiser__learning_rate": rate,
        },
        "eps3": {"privacy__epsilon": 3.0},
    }
    return figures(
        {
            f"{arm}_{figure}": [
                together(student_scores(study.revised(seed=seed, **changes), folder)).figures[
                    figure
                ]
                for seed in SEEDS
            ]
            for arm, changes in arms.items()
        }
    )
