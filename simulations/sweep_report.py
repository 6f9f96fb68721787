"""The report of a sweep: what each setting brings, and what choosing would cost."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.tasks import Measure
from server.store import RunFolder
from simulations.combinations import value_words
from simulations.comparison import SweepPoint
from simulations.drawing import STYLES
from simulations.markup import Content, Html, element, listed, note, page, paragraph
from simulations.markup import section as part
from simulations.measures import capital, in_words, leading, number
from simulations.report import rows_table
from simulations.report_sections import (
    SIMULATED,
    reproduce_section,
    saved_picture,
    study_section,
    write_page,
)
from simulations.sweep import Sweep
from simulations.sweep_plots import EPSILON, rounds_plot, setting_plot, traffic_plot
from simulations.sweep_tables import nothing_chosen, price_rows, sweep_rows
from simulations.tables import interval_note

_KEPT_ALIKE = (
    "“ε” is what a run's training is granted; each run keeps it by itself. kB per hospital: the "
    "contents of all messages about patients that one hospital receives and sends."
)


def write_sweep_report(found: Sweep) -> Path:
    """Write ``report.html`` and ``plots/`` into the sweep's folder; the report's path."""
    first = RunFolder(found.folder / found.points[0].arm / f"seed-{found.seeds[0]}")
    result, statement, environment = (
        first.read_json(name) for name in ("result.json", "privacy.json", "environment.json")
    )
    study, exact = found.study, not statement["secret_noise"] and study_is_private(found)
    sizes = {name: f"≈ {patients}" for name, patients in found.hospitals.items()}
    text = page(
        f"{study.name}: a sweep",
        element("h1", f"{study.name}: what does each setting bring?"),
        element("p", *_headline(found), class_="answer"),
        _promise(exact=exact),
        study_section(study, sizes, result, found.seeds),
        part(
            "Every combination",
            rows_table(sweep_rows(found)),
            note(_KEPT_ALIKE),
            note(interval_note(len(found.seeds), found.measures)),
        ),
        part("In pictures", *_pictures(found)),
        part("What choosing would cost", *_price(found)),
        part("Limits", listed(_limits(found))),
        reproduce_section(
            _command(found, exact=exact),
            environment,
            where=f"{found.points[0].arm}/seed-{found.seeds[0]}/study.toml",
            exact=exact,
        ),
    )
    return write_page(found.folder, text)


def study_is_private(found: Sweep) -> bool:
    """Whether any run of the sweep promises something."""
    return any(one.epsilon is not None for one in found.points)


def _headline(found: Sweep) -> Iterator[Content]:
    words = " and ".join(
        f"{one.key} ({', '.join(value_words(value) for value in one.values)})"
        for one in found.settings
    )
    measure = next(
        (m for m in found.measures if any(one.student[m.key].count for one in found.points)),
        found.measures[0],
    )
    known = [value for one in found.points if (value := one.student[measure.key]).count]
    low, high = min(one.mean for one in known), max(one.mean for one in known)
    yield element(
        "strong",
        f"{len(found.points)} combinations of {words}, {len(found.seeds)} "
        f"{'seed' if len(found.seeds) == 1 else 'seeds'} each: the student's mean "
        f"{measure.title} lies between {number(low)} and {number(high)}.",
    )
    if not measure.higher_is_better:
        yield " Lower is better."
    yield " Nothing was chosen: see what choosing would cost."


def _promise(*, exact: bool) -> Html:
    return (
        element(
            "p",
            element("strong", "No privacy is guaranteed for any of it. "),
            "The noise came from a seed (test noise): whoever knows the seed can remove it.",
            class_="alarm",
        )
        if exact
        else note(
            "Each run keeps its own promise, stated in its folder's PRIVACY.md; all of them "
            "together keep a weaker one."
        )
    )


def _pictures(found: Sweep) -> Iterator[Html]:
    seeds, measure = len(found.seeds), leading(found.study)
    title = capital(measure.title)
    band = (
        ""
        if seeds == 1
        else (
            f" Bands or bars are 95 % intervals over {seeds} seeds; bars are moved aside a "
            f"little where they would cover each other."
        )
    )
    drawn_any = False
    for setting in (one for one in found.settings if len(one.values) > 1):
        name = "ε" if setting.key == EPSILON else setting.key
        drawn = setting_plot(
            found.points,
            setting.key,
            measure=measure,
            unit=found.study.privacy.unit.value,
            title=f"What does {name} bring?" if name != "ε" else "What does privacy cost?",
        )
        if drawn is not None:
            drawn_any = True
            yield saved_picture(
                found.folder,
                "epsilon" if setting.key == EPSILON else setting.key.replace(".", "-"),
                drawn,
                alt=f"{title} of the student by {name}. {_point_words(found.points, measure)}",
                caption=f"{title} of the student by {name}, a line for each choice of the other "
                f"settings.{band}",
            )
    if (drawn := traffic_plot(found.points, measure)) is not None:
        drawn_any = True
        yield saved_picture(
            found.folder,
            "bytes",
            drawn,
            alt=f"{title} of the student by bytes per hospital. "
            + _point_words(found.points, measure, traffic=True),
            caption=f"{title} of the student against what one hospital receives and sends in the "
            f"whole study.{band}",
        )
    if (drawn := rounds_plot(found.curves, measure)) is not None:
        drawn_any = True
        yield saved_picture(
            found.folder,
            "rounds",
            drawn,
            alt=f"The teacher's {measure.title} after each round. "
            + "; ".join(
                f"{name}: round {points[-1].round} {number(points[-1].figure.mean)}"
                for name, points in found.curves.items()
                if points
            )
            + ".",
            caption=f"{title} of the teacher on all hospitals' test patients after each round; "
            "means over the seeds.",
        )
    if not drawn_any:
        yield paragraph(
            f"No picture: no {measure.title} exists, or there are more than {len(STYLES)} lines to "
            f"tell apart. All figures are in results.csv."
        )


def _point_words(points: Sequence[SweepPoint], measure: Measure, *, traffic: bool = False) -> str:
    def about(one: SweepPoint) -> str:
        size = f" ({one.bytes_per_hospital.mean / 1e3:.0f} kB)" if traffic else ""
        return f"{one.arm}{size}: {in_words(one.student[measure.key], measure)}"

    return "; ".join(about(one) for one in points) + "."


def _price(found: Sweep) -> Iterator[Html]:
    yield paragraph(nothing_chosen(found))
    if found.price is None:
        return
    yield rows_table(price_rows(found.price, found.study.privacy.unit.value))
    yield note(
        "Composition is by privacy loss distributions. A private selection releases the best "
        "trial alone, judged by its noised histogram; the number of trials is drawn secretly from "
        "a law of the given mean, and every combination is charged as the costliest one (theorems "
        "2 and 6 of Papernot & Steinke 2022, arXiv 2110.03620). A Poisson law may draw no trial."
    )


def _limits(found: Sweep) -> Iterator[str]:
    yield SIMULATED
    yield (
        "Settings were looked at on the very patients they are judged by: the best of many rows "
        "looks better than it will be on others."
    )
    if len(found.seeds) == 1:
        yield "One seed: no difference between rows can be told from chance."
    else:
        yield (
            f"{len(found.seeds)} seeds: each draws new splits, new starts and new noise. The same "
            f"patients return in every seed, so the intervals are somewhat too narrow."
        )


def _command(found: Sweep, *, exact: bool) -> str:
    words = ["consilium", "sweep", "study.toml", "--data", "FOLDER"]
    for one in found.settings:
        words += ["--set", f"{one.key}={','.join(value_words(value) for value in one.values)}"]
    words += ["--seeds", str(len(found.seeds))]
    return shlex.join(words + (["--noise-seed", "N"] if exact else []))
