"""What a finished simulated run achieved, hospital by hospital."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from common.learning.metrics import Floats, noise_interval
from common.privacy.units import Trust
from common.study import Study
from common.tasks import task_of
from server.store import RunFolder
from simulations.attacks import attack_outcome
from simulations.comparison import seed_figures, without_nan
from simulations.evaluation import Scores, finished_models, score, together
from simulations.measures import measures_of
from simulations.observer import observed
from simulations.simulate import load_hospitals


def summarise(run: RunFolder) -> dict[str, Any]:
    """Scores of teacher and student at every hospital, exact; kept as ``evaluation.json``.

    Figures stand under ``teacher`` and ``student`` by the keys of the task's ``measures``.
    ``released`` holds what a real coordinator would know instead, from the noised histograms
    (``released_from`` says of whom), when the study grants evaluation a budget.
    """
    study, hospitals = load_hospitals(run.path)
    teacher, student, features = finished_models(run, study)
    taught = score(teacher, study, features, hospitals)
    learned = score(student, study, features, hospitals)
    measures = measures_of(study)
    result, privacy = run.read_json("result.json"), run.read_json("privacy.json")
    summary: dict[str, Any] = {
        "study": study.name,
        "measures": [asdict(one) for one in measures],
        "folder": str(run.path),
        "epsilon": privacy["epsilon_spent"],
        "delta": privacy["delta"],
        "guaranteed": privacy["guaranteed"],
        "protected": privacy["released"],
        "teacher_parameters": result["teacher_parameters"],
        "student_parameters": result["student_parameters"],
        "all": _row(together(taught), together(learned), hospitals[0].declared_patients, None),
        "hospitals": [
            _row(one, two, hospital.declared_patients, len(set(hospital.test.patients)))
            for one, two, hospital in zip(taught, learned, hospitals, strict=True)
        ],
        "mean_of_hospitals": {
            "teacher": seed_figures(taught, taught).mean_of_hospitals,
            "student": seed_figures(learned, learned).mean_of_hospitals,
        },
        "released": released(result["evaluation"], study),
        "released_from": released_from(study),
        "forecast": result.get("forecast"),
        "attack": attack_outcome(run, study, hospitals),
        "observer": observed(run, study, hospitals),
    }
    summary["all"]["declared_patients"] = sum(one.declared_patients for one in hospitals)
    summary["all"]["test_patients"] = sum(len(set(one.test.patients)) for one in hospitals)
    summary = {key: without_nan(value) for key, value in summary.items()}
    run.write_json("evaluation.json", summary)
    return summary


def released(histograms: Sequence[Mapping[str, Any]], study: Study) -> dict[str, Any] | None:
    """Each measure from the sum of the released histograms, as [mean, low, high].

    ``histograms``: as ``result.json`` keeps them. None without any; NaN for what they do not show.
    The interval covers the noise alone, not the chance of who was tested.
    """
    if not histograms:
        return None
    total = np.sum([np.array(one["counts"]) for one in histograms], axis=0)
    noise_std = math.hypot(*(one["noise_std"] for one in histograms))
    task, found = task_of(study), {}
    for measure in measures_of(study):

        def figure(counts: Floats, key: str = measure.key) -> float:
            return task.released_figures(counts)[key]

        one = noise_interval(total, noise_std, figure, bounds=measure.bounds)
        found[measure.key] = [one.mean, one.low, one.high]
    return found


def released_from(study: Study) -> str:
    """What a coordinator would have been told, in words."""
    if study.privacy.trust is Trust.DISTRIBUTED:
        return "one noised histogram of all hospitals' test patients together"
    return "each hospital's noised histogram"


def _row(teacher: Scores, student: Scores, declared: int, tested: int | None) -> dict[str, Any]:
    return {
        "hospital": student.hospital,
        "declared_patients": declared,
        "test_patients": tested,
        "teacher": teacher.figures,
        "student": student.figures,
    }
