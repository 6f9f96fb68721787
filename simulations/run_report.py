"""The report of a single simulated run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.hospital import Hospital
from common.learning.metrics import mean_interval
from common.study import Study
from server.store import RunFolder
from simulations.comparison import CurvePoint
from simulations.evaluation import round_curve
from simulations.markup import Content, Html, data_table, element, listed, note, page, paragraph
from simulations.markup import section as part
from simulations.plots import round_plot
from simulations.report_sections import (
    SIMULATED,
    curve_caption,
    curve_words,
    privacy_section,
    reproduce_section,
    saved_picture,
    small_hospitals,
    study_section,
    write_page,
)
from simulations.scenario_words import scenario_section
from simulations.simulate import load_hospitals
from simulations.summary import summarise

_HEADINGS = (
    "hospital",
    "tests on",
    "teacher AUC",
    "student AUC",
    "teacher accuracy",
    "student accuracy",
)
_ONE_RUN = (
    "One run with one seed says nothing of chance: another split, another start and other noise "
    "give other figures. `consilium compare` repeats over seeds and sets the result beside each "
    "hospital alone and pooled data."
)


def write_run_report(run_folder: Path) -> Path:
    """Write ``report.html`` and ``plots/`` for one finished simulated run; the report's path.

    Raises RunError when the run is not finished or not a simulation.
    """
    run, study = RunFolder.open(run_folder)
    result, statement, environment = (
        run.read_json(name) for name in ("result.json", "privacy.json", "environment.json")
    )
    _, hospitals = load_hospitals(run_folder)
    summary = summarise(run)
    rows = sorted(
        summary["hospitals"],
        key=lambda row: (row["student_auc"] is None, row["student_auc"] or 0.0),
    )
    sizes = {row["hospital"]: f"≈ {row['declared_patients']}" for row in summary["hospitals"]}
    tested = {row["hospital"]: row["test_patients"] for row in rows}
    text = page(
        f"{study.name}: one run",
        element("h1", f"{study.name}: one run"),
        element("p", *_run_headline(study, summary), class_="answer"),
        study_section(study, sizes, result, [study.seed]),
        part(
            "Hospital by hospital",
            data_table(
                "Exact scores at each hospital's own test patients, worst first",
                _HEADINGS,
                [_run_row(row) for row in [*rows, summary["all"]]],
            ),
            *_run_released(summary),
            note("— means no AUC exists, because only one class was among the test patients."),
        ),
        *_rounds(run, study, hospitals),
        *scenario_section(study, summary),
        privacy_section(statement),
        part("Limits", listed([SIMULATED, _ONE_RUN, *small_hospitals(tested)])),
        reproduce_section(
            "consilium simulate study.toml --data FOLDER"
            + ("" if statement["secret_noise"] else " --noise-seed N"),
            environment,
            where="study.toml",
            exact=not statement["secret_noise"],
        ),
    )
    return write_page(run_folder, text)


def _rounds(run: RunFolder, study: Study, hospitals: list[Hospital]) -> list[Html]:
    """The round curve; nothing when no AUC exists."""
    stages = ["finetune", *(["distill"] if study.distill.on == "patients" else [])]
    curves = {
        stage: [
            CurvePoint(number, mean_interval([value]))
            for number, value in round_curve(run, study, hospitals, stage)
        ]
        for stage in stages
    }
    png = round_plot(curves, title="AUC after each round")
    if png is None:
        return []
    words, caption = curve_words(curves), curve_caption(study)
    shown = saved_picture(run.path, "rounds", png, alt=words, caption=caption)
    return [part("Round by round", shown)]


def _run_headline(study: Study, summary: dict[str, Any]) -> Iterator[Content]:
    row = summary["all"]
    measure, word = (
        ("student_accuracy", "an accuracy")
        if row["student_auc"] is None
        else ("student_auc", "an AUC")
    )
    budget = (
        "without any guarantee of privacy"
        if not summary["guaranteed"]
        else f"at ε = {summary['epsilon']:.3g} per {study.privacy.unit.value}"
    )
    yield element(
        "strong",
        f"Trained together by {len(summary['hospitals'])} hospitals {budget}, "
        f"the student reaches {word} of {row[measure]:.3f} on "
        f"{row['test_patients']} test patients",
    )
    teacher = row[measure.replace("student", "teacher")]
    ratio = summary["teacher_parameters"] / summary["student_parameters"]
    yield f"; its teacher, {ratio:.0f} times larger, reaches {teacher:.3f}."


def _run_row(row: dict[str, Any]) -> tuple[str, ...]:
    figures = (
        row[key] for key in ("teacher_auc", "student_auc", "teacher_accuracy", "student_accuracy")
    )
    return (
        row["hospital"],
        str(row["test_patients"]),
        *(_shown(one) for one in figures),
    )


def _run_released(summary: dict[str, Any]) -> list[Html]:
    seen = summary["released"]
    if seen is None:
        return []
    said = " and ".join(
        f"{name} {_shown(mean)} ({_shown(low)} to {_shown(high)})"
        for name, (mean, low, high) in seen.items()
    )
    return [
        paragraph(
            f"A coordinator of real hospitals would have seen, from {summary['released_from']}: "
            f"{said}. The intervals are what that noise alone explains."
        )
    ]


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
