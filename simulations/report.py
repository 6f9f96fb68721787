"""Self-contained HTML reports: the answer first, then what it rests on and where it ends."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from common.learning.metrics import Interval
from common.privacy.units import Trust
from common.tasks import Measure
from server.store import RunFolder
from simulations.comparison import Comparison, span
from simulations.markup import Content, Html, data_table, element, listed, note, page, paragraph
from simulations.markup import section as part
from simulations.measures import capital, existing, gain, in_words, leading, number
from simulations.plots import epsilon_plot, hospital_plot, round_plot
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
from simulations.tables import (
    Rows,
    against_alone,
    arm_rows,
    difference_rows,
    hospital_rows,
    interval_note,
    released_rows,
)

_READING = (
    "“Each hospital alone” is the mean over the hospitals of one model each, tested on all "
    "hospitals' patients; its worst hospital uses its own model on its own patients. The worst "
    "hospital is the one with the {worst} mean."
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
        element("p", *_headline(comparison, guaranteed=statement["guaranteed"]), class_="answer"),
        study_section(study, sizes, result, comparison.seeds),
        part(
            "The comparison",
            rows_table(arm_rows(comparison)),
            rows_table(difference_rows(comparison)),
            note(
                _READING.format(
                    worst="lowest" if leading(study).higher_is_better else "highest",
                )
            ),
            note(interval_note(seeds, comparison.measures)),
        ),
        part(
            "Hospital by hospital",
            *(rows_table(hospital_rows(comparison, one)) for one in comparison.measures),
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
    return write_page(comparison.folder, text)


def _headline(comparison: Comparison, *, guaranteed: bool) -> Iterator[Content]:
    """The answer: how good, against each hospital alone, against pooled data."""
    arms, study = comparison.arms, comparison.study
    measure = existing(comparison.measures, arms["federated"].student.together)
    direction = "" if measure.higher_is_better else ", where lower is better,"

    def value(arm: str) -> Interval:
        return arms[arm].student.together[measure.key]

    budget = (
        "without privacy"
        if study.privacy.epsilon is None
        else f"at ε = {study.privacy.epsilon:g} per {study.privacy.unit.value}"
    )
    yield element(
        "strong",
        f"Trained together by {len(comparison.hospitals)} hospitals {budget}, the "
        f"student reaches {measure.title} {in_words(value('federated'), measure)}{direction} on "
        f"all hospitals' test patients.",
    )
    for difference in comparison.differences:
        gap = _verdict(difference.together[measure.key], measure)
        if difference.second == "alone":
            yield (
                f" A model trained by one hospital alone averages "
                f"{number(value('alone').mean)} on the same patients; {gap}."
            )
        elif difference.second == "pooled":
            same = "" if study.privacy.epsilon is None else " at the same ε"
            yield f" Training on pooled data{same} gives {number(value('pooled').mean)}; {gap}."
    yield f" {_winners(comparison)}"
    if not guaranteed:
        yield element("strong", " No privacy is guaranteed for any of it.")


def _verdict(gap: Interval, measure: Measure) -> str:
    size = number(gap.mean, signed=True)
    if gap.count < 2:
        return f"the difference is {size}, from one seed"
    size += f" ({number(gap.low, signed=True)} to {number(gap.high, signed=True)})"
    if gap.low <= 0 <= gap.high:
        return f"the difference of {size} is not distinguishable from none"
    if measure.higher_is_better:
        return f"training together {'adds' if gap.low > 0 else 'costs'} {size}"
    return f"training together {'worsens' if gap.low > 0 else 'improves'} it: {size}"


def _winners(comparison: Comparison) -> str:
    """How many hospitals gain at home, by every measure: they need not agree."""
    said = []
    hospitals = against_alone(comparison).hospitals.values()
    for measure in comparison.measures:
        each = [one[measure.key] for one in hospitals]
        known = [gain(measure, one.mean) for one in each if one.count]
        better, worse = sum(one > 0 for one in known), sum(one < 0 for one in known)
        text = f"{measure.title}: {better} better, {worse} worse"
        if same := len(known) - better - worse:
            text += f", {same} the same"
        if absent := len(hospitals) - len(known):
            text += f", {absent} without one"
        said.append(text)
    return (
        f"At home, on each hospital's own test patients, the shared student against the "
        f"hospital's own: {'; '.join(said)}."
    )


def _pictures(comparison: Comparison) -> Iterator[Html]:
    seeds, measure = len(comparison.seeds), leading(comparison.study)
    title = capital(measure.title)
    band = "" if seeds == 1 else f" The band is the 95 % interval over {seeds} seeds."
    if (drawn := epsilon_plot(comparison)) is not None:
        words = ", ".join(
            f"ε = {one.epsilon:g}: {in_words(one.student[measure.key], measure)}"
            for one in comparison.sweep
        )
        yield saved_picture(
            comparison.folder,
            "epsilon",
            drawn,
            alt=f"{title} of the federated student by ε. {words}.",
            caption=f"{title} of the federated student when its training is granted each ε. The "
            "lines are pooled data without privacy (the best one could hope for) and the mean "
            f"over hospitals of training alone.{band}",
        )
    if (drawn := round_plot(comparison.curves, measure)) is not None:
        yield saved_picture(
            comparison.folder,
            "rounds",
            drawn,
            alt=curve_words(comparison.curves, measure),
            caption=curve_caption(comparison.study) + band,
        )
    words = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{arm} " + in_words(comparison.arms[arm].student.hospitals[name][measure.key], measure)
            for arm in ("federated", "alone", "pooled")
        )
        for name in comparison.hospitals
    )
    bars = (
        ""
        if seeds == 1
        else " Bars are 95 % intervals over the seeds, within what the figure can be."
    )
    yield saved_picture(
        comparison.folder,
        "hospitals",
        hospital_plot(comparison),
        alt=f"{title} of the student by hospital. {words}.",
        caption=f"{title} of the student at each hospital's own test patients, the worst at the "
        f"top.{bars}",
    )


def _released_part(comparison: Comparison) -> Html:
    rows = released_rows(comparison)
    if rows is None:
        return part(
            "What leaves the hospitals",
            paragraph(
                "The study grants evaluation no ε: in a deployment no figure of quality would "
                "leave any hospital."
            ),
        )
    return part(
        "What leaves the hospitals", rows_table(rows), paragraph(_released_words(comparison))
    )


def _released_words(comparison: Comparison) -> str:
    study = comparison.study
    cost = f"ε = {study.evaluation.epsilon:g} charged to the test patients"
    never = "The exact figures never leave a real hospital."
    if study.privacy.trust is Trust.DISTRIBUTED:
        return (
            f"{never} One histogram of the student's scores does, of all hospitals together and "
            f"with noise of all in it, at {cost}; no hospital's own can be read, and “released” is "
            f"computed from it. The fewer test patients, the more the noise hides. Trained under "
            f"one roof, the model is tested with that roof's own noise."
        )
    return (
        f"{never} One histogram of the student's scores does, noised at each hospital with {cost}; "
        f"“released” is computed from the sum of those alone. The more hospitals and the fewer "
        f"test patients, the more the noise hides."
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
    yield SIMULATED
    if comparison.study.simulation is not None and comparison.study.simulation.source is not None:
        yield (
            "The hospitals are parts of one data set, cut by the study file. Real hospitals "
            "differ in their patients, devices and habits, which usually makes it harder. "
            "Each seed cuts anew: a hospital's name stands for a size, not for the same patients."
        )
    if seeds == 1:
        yield "One seed: none of the differences can be told from chance."
    else:
        yield (
            f"{seeds} seeds: each draws new splits, new starts and new noise. The same patients "
            f"return in every seed, so the intervals are somewhat too narrow, and they say "
            f"nothing of patients from elsewhere."
        )
    yield from small_hospitals(
        {name: one.test_patients[0] for name, one in comparison.hospitals.items()}
    )
    rarest = {name: one.rarest for name, one in comparison.hospitals.items()}
    lacking = [name for name, counts in rarest.items() if counts and counts[0] == 0]
    if lacking:
        yield (
            f"In at least one seed a class is missing among the test records of "
            f"{', '.join(lacking)}; a figure that needs it rests on the remaining seeds."
        )
    yield "Every arm uses the study's own settings; each might do better if tuned by itself."


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


def rows_table(rows: Rows) -> Html:
    """The rows for a page."""
    return data_table(rows.title, rows.headings, rows.rows, names=rows.names)
