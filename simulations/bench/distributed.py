"""What summing in secret brings: distributed trust beside local trust, pooled data and none."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from client.hospital import Hospital
from common.randomness import SecretNoise
from common.study import Study, load_study
from server.store import RunFolder
from simulations.arms import under_one_roof
from simulations.bench.trained import EXAMPLES, SEEDS, figures, find_folder
from simulations.evaluation import Scores, finished_models, score, together
from simulations.hospitals import build_world, open_world, pooled, secret_noise
from simulations.simulate import run_in_process

_SHOWN_SEEDS = (0, 1, 2)

Groups = Callable[[list[Hospital]], list[list[Hospital]]]


def distributed(data_folder: Path) -> dict[str, Any]:
    """Wisconsin at ε = 1, and the rows of heart and diabetes (null where their files are not)."""
    heart = find_folder(data_folder, "heart", "processed.cleveland.data")
    diabetes = find_folder(data_folder, "diabetes130", "diabetic_data.csv.gz")
    return wisconsin() | {
        "heart": heart_rows(heart) if heart else None,
        "diabetes": diabetes_rows(diabetes) if diabetes else None,
    }


def wisconsin() -> dict[str, Any]:
    """AUC and accuracy of the student on all hospitals' test patients, five seeds."""
    base = load_study(EXAMPLES / "wisconsin.toml").revised(
        privacy__epsilon=1.0, evaluation__epsilon=None
    )
    values: dict[str, list[float]] = {}
    for arm, study, whom in (
        ("distributed", in_sums(base, 8), _everybody),
        ("pooled", under_one_roof(base), _one_roof),
        ("local", base, _everybody),
    ):
        for seed in SEEDS:
            found = together(_student_scores(study.revised(seed=seed), Path(), whom)).figures
            values.setdefault(f"eps1_{arm}_auc", []).append(found["auc"])
            values.setdefault(f"eps1_{arm}_acc", []).append(found["accuracy"])
    return figures(values)


def heart_rows(folder: Path) -> dict[str, Any]:
    """Accuracy at ε = 1, mean and worst of four hospitals, 5-fold over three seeds."""
    study = load_study(EXAMPLES / "heart.toml")

    def of_seed(arm: Study, whom: Groups, seed: int) -> list[float]:
        folds = [
            _student_scores(arm.revised(seed=seed, evaluation__fold=fold), folder, whom)
            for fold in range(study.evaluation.folds)
        ]
        return [together(parts).figures["accuracy"] for parts in zip(*folds, strict=True)]

    return _rows(study, of_seed, 4)


# Each hospital's own noise is larger than the sum's: it wants fewer and smaller steps.
_LESS_NOISY: dict[str, Any] = {
    "privacy__epsilon": 1.0,
    "finetune__rounds": 60,
    "finetune__optimiser__learning_rate": 1.0,
}


def diabetes_rows(folder: Path) -> dict[str, Any]:
    """AUC at ε = 1, mean and worst of ten sites, three seeds; the unit is the patient."""
    study = load_study(EXAMPLES / "diabetes.toml").revised(**_LESS_NOISY)
    local = study.revised(privacy__trust="local", federation__hospitals=None)

    def of_seed(arm: Study, whom: Groups, seed: int) -> list[float]:
        scores = _student_scores(arm.revised(seed=seed), folder, whom)
        return [one.figures["auc"] for one in scores]

    return _rows(local, of_seed, 10)


def in_sums(study: Study, hospitals: int) -> Study:
    """The study with distributed trust; one hospital may vanish, one may collude."""
    return study.revised(
        privacy__trust="distributed",
        federation__hospitals=hospitals,
        federation__tolerated_dropouts=0 if hospitals < 8 else 1,
        federation__tolerated_colluders=1,
    )


def _rows(study: Study, of_seed: Callable[..., list[float]], hospitals: int) -> dict[str, Any]:
    lone = under_one_roof(study)
    open_study = lone.revised(privacy__trust="none", privacy__epsilon=None, privacy__delta=None)
    arms: tuple[tuple[str, Study, Any], ...] = (
        ("alone", lone, _each_alone),
        ("local", study, _everybody),
        ("distributed", in_sums(study, hospitals), _everybody),
        ("pooled", lone, _one_roof),
        ("pooled_nonprivate", open_study, _one_roof),
    )
    values: dict[str, list[float]] = {}
    for name, arm, whom in arms:
        for seed in _SHOWN_SEEDS:
            each = of_seed(arm, whom, seed)
            values.setdefault(f"{name}_mean", []).append(float(np.nanmean(each)))
            values.setdefault(f"{name}_worst", []).append(float(np.nanmin(each)))
    return figures(values) | {"seeds": list(_SHOWN_SEEDS)}


def _student_scores(study: Study, folder: Path, whom: Groups) -> list[Scores]:
    """Scores at every hospital of the student trained by ``whom``, with fresh secret noise.

    Several groups train a student each, and each is scored at its own hospitals.
    """
    world = build_world(study, folder)
    noise = secret_noise(SecretNoise.generate().key, [site.name for site in world.sites])
    everybody = open_world(world, noise)
    found: list[Scores] = []
    groups = whom(everybody)
    for group in groups:
        with tempfile.TemporaryDirectory(prefix="consilium-bench-") as temporary:
            run = RunFolder.create(Path(temporary) / "run", study)
            run_in_process(study, run, group, world.corpus, lambda _: None)
            _, student, features = finished_models(run, study)
            tested = group if len(groups) > 1 else everybody
            found += score(student, study, features, tested)
    return found


def _everybody(hospitals: list[Hospital]) -> list[list[Hospital]]:
    return [hospitals]


def _one_roof(hospitals: list[Hospital]) -> list[list[Hospital]]:
    return [[pooled(hospitals)]]


def _each_alone(hospitals: list[Hospital]) -> list[list[Hospital]]:
    return [[one] for one in hospitals]
