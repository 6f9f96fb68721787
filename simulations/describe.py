"""A study and its data in words, before anything runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.sources.reading import read_public
from common.errors import StudyError
from common.features import FeatureMap, range_scaling
from common.models import build_student, build_teacher, count_parameters
from common.privacy.budget import budget_of, evaluation_budget_of
from common.privacy.units import Trust
from common.secagg.plan import check_sums
from common.study import Study


def promise(study: Study) -> str:
    """The study's privacy in half a line."""
    privacy = study.privacy
    if privacy.trust is Trust.NONE:
        return "no privacy (comparison on public data only)"
    return (
        f"ε = {privacy.epsilon:g}, δ = {privacy.delta:g} per {privacy.unit.value}, "
        f"{privacy.trust.value} trust"
    )


def describe(study: Study) -> dict[str, Any]:
    """Sizes and costs of a study, from the study alone."""
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    teacher = count_parameters(build_teacher(study, features))
    student = count_parameters(build_student(study, features))
    budget, testing = budget_of(study), evaluation_budget_of(study)
    check_sums(study)
    return {
        "name": study.name,
        "task": study.task,
        "digest": study.digest(),
        "columns": len(study.dictionary.columns),
        "privacy": promise(study),
        "epsilon_total": budget.total(),
        "noise_multiplier": budget.noise_multiplier,
        "teacher_parameters": teacher,
        "student_parameters": student,
        "ratio": teacher / student,
        "stages": [
            {
                "stage": one.stage,
                "rounds": one.rounds,
                "steps_per_round": one.steps_per_round,
                "epsilon_after": budget.spent(one.stage, one.rounds),
            }
            for one in budget.charges
        ],
        "epsilon_testing": None if testing is None else testing.total(),
    }


def describe_lines(facts: dict[str, Any]) -> list[str]:
    """The same for a person."""
    lines = [
        f"{facts['name']} is a sound study.",
        f"  task      {facts['task']} on {facts['columns']} columns",
        f"  privacy   {facts['privacy']}",
        f"  teacher   {facts['teacher_parameters']:,} parameters",
        f"  student   {facts['student_parameters']:,} parameters "
        f"({facts['ratio']:.0f} times smaller)",
    ]
    for one in facts["stages"]:
        after = one["epsilon_after"]
        cost = "no guarantee" if after is None else f"ε {after:.3f} afterwards"
        lines.append(
            f"  {one['stage']:<9} {one['rounds']} rounds × {one['steps_per_round']} steps, {cost}"
        )
    if facts["epsilon_testing"] is not None:
        lines.append(
            f"  evaluate  one histogram, ε {facts['epsilon_testing']:.3f} of test patients"
        )
    if facts["ratio"] < 10:
        lines.append("  note: a student at least ten times smaller than its teacher is usual")
    return lines


def check_data(study: Study, folder: Path) -> dict[str, Any]:
    """Each hospital's report on its own data."""
    spec = study.simulation
    if spec is None:
        raise StudyError(
            f"{study.name}: has no [simulation] section that says where data are; "
            f"a hospital checks its own with --hospital FOLDER"
        )
    if spec.source is not None:
        return {"all": asdict(read_public(spec.source, study.dictionary, folder).report)}
    return {
        one.name: asdict(read_public(one.source, study.dictionary, folder).report)
        for one in spec.hospital
    }
