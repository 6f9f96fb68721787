"""How well effects of a treatment are found, where the truth is known: IHDP and ACIC 2016.

``python -m simulations.bench.accuracy_treatment FOLDER OUT`` joins ACIC's two tables into the one
that ``deploy/examples/acic.toml`` reads.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.learning.metrics import mean_interval
from common.study import Study, load_study
from simulations.arms import under_one_roof
from simulations.bench.trained import EXAMPLES, NON_PRIVATE, find_folder, student_scores
from simulations.evaluation import together
from simulations.hospitals import pooled

REPLICATES = tuple(range(1, 11))
_SPREADS = 10  # outcomes are held within so many spreads of their middle


def treatment(data_folder: Path) -> dict[str, Any] | None:
    """√PEHE of the student over all hospitals' test patients, mean over ten replicates each:
    trained together, on pooled data, and (mean over all patients) by each hospital alone."""
    ihdp = find_folder(data_folder, "treatment_effect/ihdp", "ihdp_npci_1.csv")
    acic = find_folder(data_folder, "treatment_effect/acic2016", "zymu_1.csv")
    if ihdp is None or acic is None:
        return None
    rows: dict[str, Any] = {"replicates": len(REPLICATES)}
    study = load_study(EXAMPLES / "ihdp.toml").revised(**NON_PRIVATE)
    rows |= _figures(
        "ihdp_sqrt_pehe", [arms(ihdp_replicate(study, ihdp, one), ihdp) for one in REPLICATES]
    )
    study = load_study(EXAMPLES / "acic.toml").revised(**NON_PRIVATE)
    with tempfile.TemporaryDirectory(prefix="consilium-acic-") as temporary:
        folder = Path(temporary)
        rows |= _figures(
            "acic_sqrt_pehe",
            [arms(acic_replicate(study, acic, one, folder), folder) for one in REPLICATES],
        )
    return rows


def arms(study: Study, data_folder: Path) -> dict[str, float]:
    """√PEHE over all hospitals' test patients of one replicate, by who trained."""
    lone = under_one_roof(study)
    assert study.simulation is not None  # noqa: S101
    alone = [
        student_scores(lone, data_folder, cast=itemgetter(slice(number, number + 1)))[number]
        for number in range(len(study.simulation.names))
    ]
    found = {
        "": student_scores(study, data_folder),
        "_pooled": student_scores(lone, data_folder, cast=lambda all_: [pooled(all_)]),
        "_alone": alone,
    }
    return {arm: together(scores).figures["sqrt_pehe"] for arm, scores in found.items()}


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


def _figures(key: str, each: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and 95 % interval over the replicates, which differ much: the median beside it."""
    rows: dict[str, Any] = {}
    for arm in each[0]:
        values = [one[arm] for one in each]
        interval = mean_interval(values)
        rows[f"{key}{arm}"] = interval.mean
        rows[f"{key}{arm}_ci"] = [interval.low, interval.high]
        rows[f"{key}{arm}_median"] = float(np.median(values))
    return rows


if __name__ == "__main__":
    source, target = (Path(word) for word in sys.argv[1:])
    for one in REPLICATES:
        acic_table(source, one).to_csv(target / f"acic_{one}.csv", index=False)
