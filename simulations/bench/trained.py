"""Studies run from beginning to end for a benchmark, and their figures over several seeds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from client.hospital import Hospital
from common.features import FeatureMap
from common.learning.metrics import Interval, mean_interval
from common.models import Student, Teacher
from common.randomness import SecretNoise
from common.study import Study
from server.store import RunFolder
from simulations.evaluation import Scores, finished_models, score
from simulations.hospitals import build_world, open_world, secret_noise
from simulations.simulate import run_in_process

Cast = Callable[[list[Hospital]], list[Hospital]]
"""Which of the hospitals train."""

Arm = TypeVar("Arm")
"""What tells one arm of a comparison from another: a study, or who trains."""

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"
SEEDS = (0, 1, 2, 3, 4)
NON_PRIVATE: Mapping[str, Any] = {
    "privacy__trust": "none",
    "privacy__epsilon": None,
    "privacy__delta": None,
}


@dataclass(frozen=True)
class Trained:
    """What a study ended with, and the hospitals of its world."""

    teacher: Teacher
    student: Student
    features: FeatureMap
    hospitals: list[Hospital]


def trained(study: Study, data_folder: Path, *, cast: Cast = list) -> Trained:
    """Run ``study`` from beginning to end with fresh secret noise; ``cast`` trains."""
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as temporary:
        world = build_world(study, data_folder)
        run = RunFolder.create(Path(temporary) / "run", study)
        noise = secret_noise(SecretNoise.generate().key, [site.name for site in world.sites])
        hospitals = open_world(world, noise)
        run_in_process(study, run, cast(hospitals), world.corpus, lambda _: None)
        return Trained(*finished_models(run, study), hospitals)


def student_scores(study: Study, data_folder: Path, *, cast: Cast = list) -> list[Scores]:
    """The scores, at every hospital, of the student that a run of ``study`` ends with."""
    done = trained(study, data_folder, cast=cast)
    return score(done.student, study, done.features, done.hospitals)


def find_folder(data_folder: Path, name: str, file: str) -> Path | None:
    """The folder that holds ``file``: ``data_folder`` itself or its ``name``; None if neither."""
    for folder in (data_folder, data_folder / name):
        if (folder / file).is_file():
            return folder
    return None


def over_seeds(
    score: Callable[[Arm, int], Mapping[str, float]],
    arms: Mapping[str, Arm],
    seeds: Sequence[int] = SEEDS,
    *,
    jobs: int = 1,
) -> dict[str, list[float]]:
    """What ``score`` finds for every arm and seed, the seeds of a figure in their order.

    A ``{}`` in a figure's name is where its arm's name goes. ``jobs`` processes share the work:
    ``score`` is a function of a module, or a partial one, and its results do not depend on them.
    """
    works = list(product(arms, seeds))
    of_arm, of_seed = [arms[arm] for arm, _ in works], [seed for _, seed in works]
    if jobs == 1:
        found = list(map(score, of_arm, of_seed))
    else:
        processes = ProcessPoolExecutor(
            min(jobs, len(works)), get_context("spawn"), torch.set_num_threads, (1,)
        )
        with processes as pool:
            found = list(pool.map(score, of_arm, of_seed))
    values: dict[str, list[float]] = {}
    for (arm, _), one in zip(works, found, strict=True):
        for name, value in one.items():
            values.setdefault(name.format(arm), []).append(value)
    return values


def figures(values: Mapping[str, list[float]], seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Mean and 95 % interval of each figure over the seeds."""
    rows: dict[str, Any] = {}
    for key, each in values.items():
        interval: Interval = mean_interval(each)
        rows[key] = interval.mean
        rows[f"{key}_ci"] = [interval.low, interval.high]
    rows["seeds"] = list(seeds)
    return rows
