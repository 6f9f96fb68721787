"""How well effects of a treatment are found, where the truth is known: IHDP and ACIC 2016.

``python -m simulations.bench.accuracy_treatment FOLDER OUT`` joins ACIC's two tables into the one
that ``deploy/examples/acic.toml`` reads.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.study import Study, load_study
from simulations.arms import under_one_roof
from simulations.bench.trained import (
    EXAMPLES,
    NON_PRIVATE,
    figures,
    find_folder,
    over_seeds,
    student_scores,
)
from simulations.evaluation import Scores, together
from simulations.hospitals import pooled

Arm = Callable[[Study, Path], list[Scores]]
"""Who trains: the scores that a study ends with at every hospital."""

REPLICATES = tuple(range(1, 11))
# Where no budget limits them, width and local steps cost computing only. Chosen by the error of the
# outcome that is seen, which is no part of the figure, on one replicate split by another seed.
_ACIC_FREE: Mapping[str, Any] = {
    **NON_PRIVATE,
    "teacher__hidden": [128, 64],
    "student__hidden": [16],
    "finetune__rounds": 200,
    "finetune__local_steps": 5,
    "finetune__sampling_rate": 0.3,
    "finetune__optimiser": {
        "kind": "adamw",
        "learning_rate": 4e-3,
        "weight_decay": 1.0,
        "schedule": "cosine",
    },
    "federation__rule": "fedavg",
}
_SPREADS = 10  # outcomes are held within so many spreads of their middle


def treatment(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """√PEHE and ATE error of the student over all hospitals' test patients, mean over ten
    replicates each: trained together, together with targeted regularisation, on pooled data, and
    (over all patients) by each hospital alone."""
    ihdp = find_folder(data_folder, "treatment_effect/ihdp", "ihdp_npci_1.csv")
    acic = find_folder(data_folder, "treatment_effect/acic2016", "zymu_1.csv")
    if ihdp is None or acic is None:
        return None
    rows: dict[str, Any] = {"replicates": len(REPLICATES)}
    for score in (partial(_ihdp, folder=ihdp), partial(_acic, folder=acic)):
        values = over_seeds(score, _ARMS, REPLICATES, jobs=jobs)
        rows |= figures(values, REPLICATES) | _medians(values)
    return rows


def _ihdp(arm: Arm, number: int, *, folder: Path) -> Mapping[str, float]:
    study = load_study(EXAMPLES / "ihdp.toml").revised(**NON_PRIVATE)
    return _errors("ihdp", arm(ihdp_replicate(study, folder, number), folder))


def _acic(arm: Arm, number: int, *, folder: Path) -> Mapping[str, float]:
    study = load_study(EXAMPLES / "acic.toml").revised(**_ACIC_FREE)
    with tempfile.TemporaryDirectory(prefix="consilium-acic-") as temporary:
        out = Path(temporary)
        study = acic_replicate(study, folder, number, out)
        return _errors("acic", arm(study, out))


def _errors(name: str, scores: list[Scores]) -> Mapping[str, float]:
    found = together(scores).figures
    return {f"{name}_{key}{{}}": found[key] for key in ("sqrt_pehe", "ate_error")}


def _trained_together(study: Study, data_folder: Path) -> list[Scores]:
    return student_scores(study, data_folder)


def _trained_targeted(study: Study, data_folder: Path) -> list[Scores]:
    return student_scores(study.revised(task="treatment-targeted"), data_folder)


def _trained_pooled(study: Study, data_folder: Path) -> list[Scores]:
    return student_scores(under_one_roof(study), data_folder, cast=lambda all_: [pooled(all_)])


def _trained_alone(study: Study, data_folder: Path) -> list[Scores]:
    """Each hospital's own patients' scores by the student that it trained alone."""
    lone = under_one_roof(study)
    assert study.simulation is not None  # noqa: S101
    return [
        student_scores(lone, data_folder, cast=itemgetter(slice(number, number + 1)))[number]
        for number in range(len(study.simulation.names))
    ]


_ARMS: Mapping[str, Arm] = {
    "": _trained_together,
    "_targeted": _trained_targeted,
    "_pooled": _trained_pooled,
    "_alone": _trained_alone,
}


def ihdp_replicate(study: Study, folder: Path, number: int) -> Study:
    """The study of one replicate."""
    path = folder / f"ihdp_npci_{number}.csv"
    outcome = pd.read_csv(path, header=None)[1].to_numpy()
    return _scaled(study, path.name, outcome, seed=number)


def acic_replicate(study: Study, folder: Path, number: int, out: Path) -> Study:
    """The study of one replicate, whose joined table is written into ``out``."""
    table = acic_table(folder, number)
    table.to_csv(out / f"acic_{number}.csv", index=False)
    return _scaled(study, f"acic_{number}.csv", table["y"].to_numpy(), seed=number)


def acic_table(folder: Path, number: int) -> pd.DataFrame:
    """Covariates, treatment ``z``, the outcome ``y`` that was seen, and the truth."""
    covariates = pd.read_csv(folder / "x.csv")
    known = pd.read_csv(folder / f"zymu_{number}.csv")
    seen = np.where(known["z"] == 1, known["y1"], known["y0"])
    return covariates.assign(z=known["z"], y=seen, mu0=known["mu0"], mu1=known["mu1"])


def _scaled(study: Study, path: str, outcome: NDArray[Any], *, seed: int) -> Study:
    """The study of a file whose outcomes have units of their own: each replicate is another
    simulation, whose middle and spread, to the nearest whole, take the place of the literature."""
    middle, spread = float(np.round(outcome.mean())), float(max(1, np.round(outcome.std())))
    return study.revised(
        seed=seed,
        simulation__source__path=path,
        dictionary__label__typical=[middle, spread],
        dictionary__label__range=[middle - _SPREADS * spread, middle + _SPREADS * spread],
    )


def _medians(values: Mapping[str, list[float]]) -> dict[str, float]:
    """Replicates differ much: one of them can make a mean."""
    return {f"{key}_median": float(np.median(each)) for key, each in values.items()}


if __name__ == "__main__":
    source, target = (Path(word) for word in sys.argv[1:])
    for one in REPLICATES:
        acic_table(source, one).to_csv(target / f"acic_{one}.csv", index=False)
