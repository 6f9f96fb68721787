"""How good the finished student is on molecules: three kinds of outcome, private and not."""

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

# The figure of each example, and in how many rounds at which rate its head learns without privacy.
# Both and the examples' own settings were chosen on random splits of other seeds, BBBP's on parts
# of its training scaffolds.
_STUDIES: Mapping[str, tuple[str, int, float]] = {
    "bbbp": ("auc", 60, 5.0),
    "tox21": ("auc", 200, 25.0),
    "esol": ("rmse", 120, 0.5),
}


def molecules(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """BBBP's AUC where the fifth with the rarest scaffolds is tested; Tox21's mean AUC and ESOL's
    RMSE on random fifths. The private arm is the example: ε = 3, distributed trust."""
    folder = find_folder(data_folder, "molecules", "BBBP.csv")
    if folder is None:
        return None
    return _row("bbbp", folder, jobs) | {
        f"{name}_{key}": value
        for name in ("tox21", "esol")
        for key, value in _row(name, folder, jobs).items()
        if key != "seeds"
    }


def _row(name: str, folder: Path, jobs: int) -> dict[str, Any]:
    figure, rounds, rate = _STUDIES[name]
    study = load_study(EXAMPLES / f"{name}.toml").revised(evaluation__epsilon=None)
    longer = {"finetune__rounds": rounds, "finetune__optimiser__learning_rate": rate}
    arms = {
        "nonprivate": study.revised(**NON_PRIVATE, **longer),
        "eps3": study.revised(privacy__epsilon=3.0),
    }
    return figures(over_seeds(partial(_score, figure=figure, folder=folder), arms, jobs=jobs))


def _score(study: Study, seed: int, *, figure: str, folder: Path) -> Mapping[str, float]:
    scores = student_scores(study.revised(seed=seed), folder)
    return {f"{{}}_{figure}": together(scores).figures[figure]}
