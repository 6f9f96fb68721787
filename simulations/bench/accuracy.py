"""How accurate the finished student is, on real patients, over several seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from client.hospital import Hospital
from common.learning.metrics import Interval, mean_interval
from common.randomness import SecretNoise
from common.study import Study, load_study
from server.store import RunFolder
from simulations.evaluation import Scores, finished_models, score, together
from simulations.hospitals import build_world, open_world, secret_noise
from simulations.simulate import run_in_process

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"
SEEDS = (0, 1, 2, 3, 4)
NON_PRIVATE: dict[str, Any] = {
    "privacy__trust": "none",
    "privacy__epsilon": None,
    "privacy__delta": None,
}


def wisconsin(_: Path) -> dict[str, Any]:
    """AUC of the student over all hospitals' test patients; one quarter tested, per seed."""
    study = load_study(EXAMPLES / "wisconsin.toml").revised(evaluation__epsilon=None)
    arms: dict[str, dict[str, Any]] = {
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
    arms: dict[str, dict[str, Any]] = {
        "nonprivate_acc_mean4": NON_PRIVATE,
        "eps1_acc_mean4": {"privacy__epsilon": 1.0},
    }

    def seed_accuracy(seed: int, changes: dict[str, Any]) -> float:
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


def prognosis(data_folder: Path) -> dict[str, Any] | None:
    """See ``accuracy_prognosis``."""
    from simulations.bench.accuracy_prognosis import brca  # noqa: PLC0415  (it builds on this)

    return brca(data_folder)


def treatment(data_folder: Path) -> dict[str, Any] | None:
    """See ``accuracy_treatment``."""
    from simulations.bench.accuracy_treatment import effects  # noqa: PLC0415  (it builds on this)

    return effects(data_folder)


def student_scores(
    study: Study, data_folder: Path, *, cast: Callable[[list[Hospital]], list[Hospital]] = list
) -> list[Scores]:
    """Run ``study`` from beginning to end with fresh secret noise; its student's scores at every
    hospital. ``cast``: which of the hospitals train it."""
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as temporary:
        world = build_world(study, data_folder)
        run = RunFolder.create(Path(temporary) / "run", study)
        noise = secret_noise(SecretNoise.generate().key, [site.name for site in world.sites])
        hospitals = open_world(world, noise)
        run_in_process(study, run, cast(hospitals), world.corpus, lambda _: None)
        _, student, features = finished_models(run, study)
        return score(student, study, features, hospitals)


def find_folder(data_folder: Path, name: str, file: str) -> Path | None:
    """The folder that holds ``file``: ``data_folder`` itself or its ``name``; None if neither."""
    for folder in (data_folder, data_folder / name):
        if (folder / file).is_file():
            return folder
    return None


def figures(values: dict[str, list[float]]) -> dict[str, Any]:
    """Mean and 95 % interval of each figure over the seeds."""
    rows: dict[str, Any] = {}
    for key, each in values.items():
        interval: Interval = mean_interval(each)
        rows[key] = interval.mean
        rows[f"{key}_ci"] = [interval.low, interval.high]
    rows["seeds"] = list(SEEDS)
    return rows


# One row for each kind of data; None where its files are not found.
ROWS: dict[str, Callable[[Path], dict[str, Any] | None]] = {
    "wisconsin": wisconsin,
    "heart": heart,
    "prognosis": prognosis,
    "treatment": treatment,
}


def accuracy(data_folder: Path) -> dict[str, Any]:
    """The bars' figures, row by row."""
    return {name: row(data_folder) for name, row in ROWS.items()}
