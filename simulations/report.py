"""Self-contained HTML reports: the answer first, then what it rests on and where it ends."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.learning.metrics import Interval, mean_interval
from common.study import Study
from common.tensors import write_atomically
from server.store import RunFolder
from simulations.comparison import Comparison, CurvePoint, Difference, span
from simulations.evaluation import round_curve
from simulations.markup import Content, Html, data_table, element, listed, page, paragraph, picture
from simulations.markup import section as part
from simulations.plots import epsilon_plot, hospital_plot, round_plot
from simulations.report_sections import privacy_section, reproduce_section, study_section
from simulations.simulate import load_hospitals
from simulations.summary import summarise
from simulations.tables import (
    Rows,
    arm_rows,
    difference_rows,
    hospital_rows,
    interval_note,
    released_rows,
)

_FEW_TEST_PATIENTS = 30
_SIMULATED = (
    "This is a simulation: the exact figures can be known because the researcher stands in every "
    "hospital at once. A coordinator of real hospitals would see noised figures at most."
)


def write_report(comparison: Comparison) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into the comparison's folder; the report's path."""
    first = RunFolder(comparison.folder / "federated" / f"seed-{comparison.seeds[0]}")
    result, statement, environment = (
        first.read_json(name) for name in ("result.json", "privacy.json", "environment.json")
    )
    study, seeds = comparison.study, len(comparison.seeds)
    sizes = {name: f"≈ {span(one.declared_patients)}" for name, one in comparison.hospitals.items()}
    text = page(
        f"{study.name}: training together compared",
        element("h1", f"{study.name}: what does training together bring?"),
        element("p", *_headline(comparison), class_="answer"),
        study_section(study, sizes, result, comparison.seeds),
        part(
            "The comparison",
            _table(arm_rows(comparison)),
            _table(difference_rows(comparison)),
            _note(_reading(comparison)),
            _note(interval_note(seeds)),
        ),
        part(
            "Hospital by hospital",
            _table(hospital_rows(comparison, "auc")),
            _table(hospital_rows(comparison, "accuracy")),
        ),
        part("In pictures", *_pictures(comparison)),
        _released_part(comparison),
        privacy_section(statement, extra=_composition(comparison)),
        part("Limits", listed(_limits(comparison))),
        reproduce_section(
            _command(comparison, exact=not statement["secret_noise"]),
            environment,
            where=f"federated/seed-{comparison.seeds[0]}/study.toml",
            exact=not statement["secret_noise"],
        ),
    )
    return _write(comparison.folder, text)


def write_run_report(run_folder: Path) -> Path:
    """Write ``report.html`` for one finished simulated run; the report's path.

    Raises RunError when the run is not finished or not a simulation.
    """
    run, study = RunFolder.open(run_folder)
    result, statement, environment = (
        run.read_json(name) for name in ("result.json", "privacy.json", "environment.json")
    )
    _, hospitals = load_hospitals(run_folder)
    summary = summarise(run)
    stages = ["finetune", *(["distill"] if study.distill.on == "patients" else [])]
    curves = {
        stage: [
            CurvePoint(number, mean_interval([value]))
            for number, value in round_curve(run, study, hospitals, stage)
        ]
        for stage in stages
    }
    png = round_plot(curves, title="AUC after each round")
    drawn = (
        []
        if png is None
        else [
            _saved_picture(
                run_folder, "rounds", png, alt=_curve_words(curves), caption=_curve_caption(study)
            )
        ]
    )
    rows = sorted(
        summary["hospitals"],
        key=lambda row: (row["student_auc"] is None, row["student_auc"] or 0.0),
    )
    sizes = {row["hospital"]: f"≈ {row['declared_patients']}" for row in summary["hospitals"]}
    text = page(
        f"{study.name}: one run",
        element("h1", f"{study.name}: one run"),
        element("p", *_run_headline(study, summary), class_="answer"),
        study_section(study, sizes, result, [study.seed]),
        part(
            "Hospital by hospital",
            data_table(
                "Exact scores at each hospital's own test patients, worst first",
                (
                    "hospital",
                    "tests on",
                    "teacher AUC",
                    "student AUC",
                    "teacher accuracy",
                    "student accuracy",
                ),
                [_run_row(row) for row in [*rows, summary["all"]]],
            ),
            *_run_released(summary),
            _note("— means no AUC exists, because only one class was among the test patients."),
        ),
        *([part("Round by round", *drawn)] if drawn else []),
        privacy_section(statement),
        part(
            "Limits",
            listed(
                [
                    _SIMULATED,
                    "One run with one seed says nothing of chance: another split, another start and other "
                    "noise give other figures. `consilium compare` repeats over seeds and sets the result "
                    "beside each hospital alone and pooled data.",
                    *_small_hospitals(
                        {row["hospital"]: row["test_patients"] for row in summary["hospitals"]}
                    ),
                ]
            ),
        ),
        reproduce_section(
            "consilium simulate study.toml --data FOLDER",
            environment,
            where="study.toml",
            exact=not statement["secret_noise"],
        ),
    )
    return _write(run_folder, text)


def _headline(comparison: Comparison) -> Iterator[Content]:
    """The answer: how good, against each hospital alone, against pooled data."""
    arms, study = comparison.arms, comparison.study
    measure = "auc" if arms["federated"].student.together.auc.count else "accuracy"
    word = "an AUC" if measure == "auc" else "an accuracy"

    def value(arm: str) -> Interval:
        found: Interval = getattr(arms[arm].student.together, measure)
        return found

    budget = (
        "without privacy"
        if study.privacy.epsilon is None
        else f"at ε = {study.privacy.epsilon:g} per {study.privacy.unit.value}"
    )
    yield element(
        "strong",
        f"Trained together by {len(comparison.hospitals)} hospitals {budget}, the "
        f"student reaches {word} of {_figure(value('federated'))} on all hospitals' "
        f"test patients.",
    )
    for difference in comparison.differences:
        gap = getattr(difference.together, measure)
        if difference.second == "alone":
            yield (
                f" A model trained by one hospital alone averages {value('alone').mean:.3f} on "
                f"the same patients; {_verdict(gap)}."
            )
        elif difference.second == "pooled":
            same = "" if study.privacy.epsilon is None else " at the same ε"
            yield (
                f" Training on pooled data{same} gives {value('pooled').mean:.3f}; {_verdict(gap)}."
            )
    yield f" {_winners(comparison, measure)}"
    if study.privacy.epsilon is None:
        yield " No privacy is guaranteed for any of it."


def _verdict(gap: Interval) -> str:
    size = f"{gap.mean:+.3f}".replace("-", "−")
    if gap.count < 2:
        return f"the difference is {size}, from one seed"
    bounds = f"{gap.low:+.3f} to {gap.high:+.3f}".replace("-", "−")
    if gap.low > 0 or gap.high < 0:
        return f"training together differs by {size} ({bounds})"
    return f"the difference of {size} ({bounds}) is not distinguishable from none"


def _winners(comparison: Comparison, measure: str) -> str:
    gains = [getattr(one, measure) for one in _against_alone(comparison).hospitals.values()]
    known = [one.mean for one in gains if one.count]
    better, worse = sum(one > 0 for one in known), sum(one < 0 for one in known)
    text = (
        f"On their own test patients, {better} of {len(gains)} hospitals do better with the "
        f"shared student than with their own, {worse} do worse, "
        f"{len(known) - better - worse} the same"
    )
    absent = len(gains) - len(known)
    return text + (f"; for {absent} no AUC exists." if absent else ".")


def _against_alone(comparison: Comparison) -> Difference:
    return next(one for one in comparison.differences if one.second == "alone")


def _reading(comparison: Comparison) -> str:
    alone = (
        "“Each hospital alone” is the mean over the hospitals of one model each, on all "
        "hospitals' test patients; its worst hospital uses its own model on its own patients. "
    )
    return (
        alone + "The worst hospital is the one with the lowest mean. All arms share splits, "
        "public data and settings, which were not tuned for each arm apart."
    )


def _pictures(comparison: Comparison) -> Iterator[Html]:
    seeds = len(comparison.seeds)
    band = "" if seeds == 1 else f" The band is the 95 % interval over {seeds} seeds."
    if (png := epsilon_plot(comparison)) is not None:
        words = ", ".join(
            f"ε = {one.epsilon:g}: {_figure(one.student.auc)}" for one in comparison.sweep
        )
        yield _saved_picture(
            comparison.folder,
            "epsilon",
            png,
            alt=f"Federated student AUC by ε. {words}.",
            caption="AUC of the federated student when its training is granted each ε. The lines "
            "are pooled data without privacy (the best one could hope for) and the mean "
            f"over hospitals of training alone.{band}",
        )
    if (png := round_plot(dict(comparison.curves))) is not None:
        yield _saved_picture(
            comparison.folder,
            "rounds",
            png,
            alt=_curve_words(dict(comparison.curves)),
            caption=_curve_caption(comparison.study) + band,
        )
    words = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{arm} {_figure(comparison.arms[arm].student.hospitals[name].auc)}"
            for arm in ("federated", "alone", "pooled")
        )
        for name in comparison.hospitals
    )
    bars = "" if seeds == 1 else " Bars are 95 % intervals over the seeds, cut at 1."
    yield _saved_picture(
        comparison.folder,
        "hospitals",
        hospital_plot(comparison),
        alt=f"Student AUC by hospital. {words}.",
        caption="AUC of the student at each hospital's own test patients, the worst at the top."
        + bars,
    )


def _saved_picture(folder: Path, name: str, png: bytes, *, alt: str, caption: str) -> Html:
    """Keep the PNG beside the report, and embed it."""
    path = folder / "plots" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, png)
    return picture(png, alt=alt, caption=caption)


def _curve_words(curves: dict[str, Any]) -> str:
    said = [
        f"{stage}: round {points[0].round} {_figure(points[0].auc)}, "
        f"round {points[-1].round} {_figure(points[-1].auc)}"
        for stage, points in curves.items()
        if points
    ]
    return "AUC after each federated round. " + "; ".join(said) + "."


def _curve_caption(study: Study) -> str:
    tail = study.federation.tail_average
    averaged = (
        f" The last point is the average of the last {tail:.0%} of the rounds, which is "
        f"what the study keeps."
        if tail
        else ""
    )
    return "AUC on all hospitals' test patients after each round." + averaged


def _released_part(comparison: Comparison) -> Html:
    rows = released_rows(comparison)
    if rows is None:
        return part(
            "What leaves the hospitals",
            paragraph(
                "The study grants evaluation no ε: in a deployment no figure of quality would leave "
                "any hospital."
            ),
        )
    return part(
        "What leaves the hospitals",
        _table(rows),
        paragraph(
            f"The exact figures never leave a real hospital. One histogram of the student's "
            f"scores does, noised at each hospital with ε = "
            f"{comparison.study.evaluation.epsilon:g} charged to the test patients; “released” "
            f"is computed from the sum of those alone. The more hospitals and the fewer test "
            f"patients, the more the noise hides."
        ),
    )


def _composition(comparison: Comparison) -> list[str]:
    if comparison.study.privacy.epsilon is None:
        return []
    return [
        "The statement is about the federated arm under one seed. A comparison trains many "
        "models on the same patients, some without any privacy; all of them together keep no "
        "such promise. Publish one arm's model, or run comparisons on public data only."
    ]


def _limits(comparison: Comparison) -> Iterator[str]:
    seeds = len(comparison.seeds)
    yield _SIMULATED
    if comparison.study.simulation is not None and comparison.study.simulation.source is not None:
        yield (
            "The hospitals are parts of one data set, cut by the study file. Real hospitals "
            "differ in their patients, devices and habits, which usually makes it harder."
        )
    if seeds == 1:
        yield "One seed: none of the differences can be told from chance."
    else:
        yield (
            f"{seeds} seeds: each draws new splits, new starts and new noise. The same patients "
            f"return in every seed, so the intervals are somewhat too narrow, and they say "
            f"nothing of patients from elsewhere."
        )
    yield from _small_hospitals(
        {name: one.test_patients[0] for name, one in comparison.hospitals.items()}
    )
    single = [name for name, one in comparison.hospitals.items() if one.rarest_class[0] == 0]
    if single:
        yield (
            f"In at least one seed the test records of {', '.join(single)} are of one class "
            f"only, so no AUC exists there; figures rest on the remaining seeds."
        )
    yield "The settings are the study's own in every arm; each alone might do better if tuned apart."


def _small_hospitals(tested: dict[str, int]) -> list[str]:
    few = {name: count for name, count in tested.items() if count < _FEW_TEST_PATIENTS}
    if not few:
        return []
    smallest = min(few, key=lambda name: (few[name], name))
    return [
        f"{len(few)} of {len(tested)} hospitals test on fewer than {_FEW_TEST_PATIENTS} "
        f"patients. At {smallest}, with {few[smallest]}, one patient more or less classified "
        f"rightly moves accuracy by {1 / few[smallest]:.2f}: single hospitals' figures are "
        f"rough."
    ]


def _command(comparison: Comparison, *, exact: bool) -> str:
    words = [
        "consilium",
        "compare",
        "study.toml",
        "--data",
        "FOLDER",
        "--seeds",
        str(len(comparison.seeds)),
    ]
    if comparison.sweep:
        words += ["--epsilons", ",".join(f"{one.epsilon:g}" for one in comparison.sweep)]
    if exact:
        words += ["--noise-seed", "N"]
    return shlex.join(words)


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
        *("—" if one is None else f"{one:.3f}" for one in figures),
    )


def _run_released(summary: dict[str, Any]) -> list[Html]:
    seen = summary["released"]
    if seen is None:
        return []
    auc, accuracy = (
        "—" if seen[key] is None else f"{seen[key]:.3f}" for key in ("auc", "accuracy")
    )
    return [
        paragraph(
            f"A coordinator of real hospitals would have seen, from noised histograms, "
            f"AUC {auc} and accuracy {accuracy}."
        )
    ]


def _figure(one: Interval) -> str:
    """A figure in a sentence."""
    if one.count == 0:
        return "none"
    if one.count == 1:
        return f"{one.mean:.3f}"
    return f"{one.mean:.3f} (95 % interval {max(0.0, one.low):.3f} to {min(1.0, one.high):.3f})"


def _table(rows: Rows) -> Html:
    return data_table(rows.title, rows.headings, rows.rows, names=rows.names)


def _note(text: str) -> Html:
    return element("p", text, class_="note")


def _write(folder: Path, text: str) -> Path:
    path = folder / "report.html"
    write_atomically(path, text.encode())
    return path
