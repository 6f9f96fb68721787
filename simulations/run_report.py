"""The report of a single simulated run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from client.hospital import Hospital
from common.learning.metrics import mean_interval
from common.study import Study
from common.tasks import Measure
from server.store import RunFolder
from simulations.comparison import CurvePoint
from simulations.cost import measured_stages, model_costs, ratios
from simulations.cost_words import cost_section
from simulations.display import TEACHER_ROW, Role, model_cells, released_words
from simulations.evaluation import finished_models, round_curve, score, together
from simulations.markup import Content, Html, data_table, element, listed, note, page, paragraph
from simulations.markup import section as part
from simulations.measures import (
    capital,
    direction_note,
    leading,
    measures_of,
    missing_note,
    number,
    worst_key,
)
from simulations.outcome_sections import outcome_sections
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
from simulations.tables import titles

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
    summary, measures = summarise(run), measures_of(study)
    rows = sorted(summary["hospitals"], key=lambda row: _worst_first(row, measures[0]))
    sizes = {row["hospital"]: f"≈ {row['declared_patients']}" for row in summary["hospitals"]}
    everybody = summary["all"]
    tested = {row["hospital"]: row["test_patients"] for row in rows}
    text = page(
        f"{study.name}: one run",
        element("h1", f"{study.name}: one run"),
        element("p", *_run_headline(study, summary), class_="answer"),
        study_section(study, sizes, result, [study.seed]),
        part(
            "Hospital by hospital",
            data_table(
                "Exact scores of the student at each hospital's own test patients, worst first",
                ("hospital", "tests on", *titles(measures)),
                [
                    *(_run_row(row, measures, "student") for row in [*rows, everybody]),
                    _run_row(everybody | {"hospital": TEACHER_ROW}, measures, "teacher"),
                ],
            ),
            *_run_released(summary),
            note(f"{missing_note(measures)} {direction_note(measures)}".strip()),
        ),
        *_rounds(run, study, hospitals),
        *_outcomes(run, study, hospitals),
        *scenario_section(study, summary),
        cost_section(ratios(*model_costs(study)), measured_stages(run)),
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
    """The round curve; nothing when no figure exists."""
    measure = leading(study)
    stages = ["finetune", *(["distill"] if study.distill.on == "patients" else [])]
    curves = {
        stage: [
            CurvePoint(number, mean_interval([value]))
            for number, value in round_curve(run, study, hospitals, stage)
        ]
        for stage in stages
    }
    drawn = round_plot(curves, measure, title=f"{capital(measure.title)} after each round")
    if drawn is None:
        return []
    words, caption = curve_words(curves, measure), curve_caption(study)
    shown = saved_picture(run.path, "rounds", drawn, alt=words, caption=caption)
    return [part("Round by round", shown)]


def _outcomes(run: RunFolder, study: Study, hospitals: list[Hospital]) -> list[Html]:
    """What this kind of outcome has to show beside its measures."""
    _, student, features = finished_models(run, study)
    return outcome_sections(run.path, together(score(student, study, features, hospitals)))


def _run_headline(study: Study, summary: dict[str, Any]) -> Iterator[Content]:
    row, measures = summary["all"], measures_of(study)
    measure = next((one for one in measures if row["student"][one.key] is not None), measures[0])
    direction = "" if measure.higher_is_better else ", where lower is better,"
    budget = (
        "without any guarantee of privacy"
        if not summary["guaranteed"]
        else f"at ε = {summary['epsilon']:.3g} per {study.privacy.unit.value}"
    )
    yield element(
        "strong",
        f"Trained together by {len(summary['hospitals'])} hospitals {budget}, "
        f"the student reaches {measure.title} {number(row['student'][measure.key])}{direction} "
        f"on {row['test_patients']} test patients",
    )
    teacher = number(row["teacher"][measure.key])
    ratio = summary["teacher_parameters"] / summary["student_parameters"]
    yield f"; its teacher, {ratio:.0f} times larger, reaches {teacher}."


def _worst_first(row: dict[str, Any], measure: Measure) -> tuple[bool, float]:
    value = row["student"][measure.key]
    return worst_key(measure, math.nan if value is None else value)


def _run_row(row: dict[str, Any], measures: Sequence[Measure], role: Role) -> tuple[str, ...]:
    return row["hospital"], str(row["test_patients"]), *model_cells(row, measures, role)


def _run_released(summary: dict[str, Any]) -> list[Html]:
    if summary["released"] is None:
        return []
    said = released_words(summary) or "nothing"
    return [
        paragraph(
            f"A coordinator of real hospitals would have seen, from {summary['released_from']}: "
            f"{said}. The intervals are what that noise alone explains."
        )
    ]
