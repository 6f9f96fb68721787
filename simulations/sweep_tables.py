"""A sweep as tables: rows of text once, drawn by the terminal and by the HTML report."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from common.learning.metrics import Interval
from simulations.combinations import value_words
from simulations.comparison import shown
from simulations.price import Cost, Price
from simulations.sweep import Sweep
from simulations.sweep_plots import EPSILON
from simulations.tables import Rows, interval_note, rich_table, titles, worst_words

_LAWS = {
    "logarithmic": "best of a random number of trials, logarithmic law",
    "geometric": "best of a random number of trials, geometric law",
    "poisson": "best of a random number of trials, Poisson law",
}


def sweep_rows(found: Sweep, *, wide: bool = True) -> Rows:
    """One row for each combination, in the order asked: nothing is ranked.

    Without ``wide`` the columns that a terminal of 80 characters has room for.
    """
    seeds, keys, first = len(found.seeds), [one.key for one in found.settings], found.measures[0]
    columns = [key for key in keys if key != EPSILON]
    more = (
        ("charged rounds", f"teacher {first.title}", f"worst hospital, {first.title}")
        if wide
        else ()
    )
    rows = []
    for one in found.points:
        figures = [shown(one.student[measure.key], seeds=seeds) for measure in found.measures]
        if wide:
            figures += [
                str(one.rounds),
                shown(one.teacher[first.key], seeds=seeds),
                worst_words(one.worst[first.key], seeds),
            ]
        rows.append(
            (
                "none" if one.epsilon is None else f"{one.epsilon:g}",
                *(value_words(one.settings[key]) for key in columns),
                *figures,
                _kilobytes(one.bytes_per_hospital),
            )
        )
    return Rows(
        "Every combination: student on all hospitals' test patients",
        ("ε", *columns, *titles(found.measures), *more, "kB per hospital"),
        tuple(rows),
        names=1 + len(columns),
    )


def price_rows(price: Price, unit: str) -> Rows:
    """What choosing by patients' outcomes would cost, each way of doing it."""
    rows = [
        ("one run of each combination, all published", *_costs(price.each_once)),
        *(
            (f"{_LAWS[law]}, mean {price.trials}", *_costs(cost))
            for law, cost in price.selected.items()
        ),
    ]
    return Rows(
        f"What choosing would cost: ε at δ = {price.delta:g}",
        ("way of choosing", f"each training {unit}", f"each test {unit}"),
        tuple(rows),
    )


def nothing_chosen(found: Sweep) -> str:
    """In plain words: the sweep chose nothing, and what it would cost to do so."""
    if found.price is None:
        return (
            "This sweep chose nothing: all combinations are shown as they were asked for. The "
            "study promises no privacy, so that choosing by patients' outcomes breaks none."
        )
    price, unit = found.price, found.study.privacy.unit.value
    once, best = price.each_once.training, price.selected["logarithmic"].training
    return (
        f"This sweep chose nothing: all combinations are shown as they were asked for. Whoever "
        f"picks the best row by patients' outcomes has used those patients once more, and no row's "
        f"own ε covers that. With one run of each combination it would cost {_epsilon(once)} per "
        f"training {unit} (composition of all of them); by a private selection that keeps the "
        f"best of a random number of trials, {_epsilon(best)} (Papernot & Steinke 2022, "
        f"logarithmic law, mean {price.trials}; see --select). All {price.runs} runs of this sweep "
        f"together: {_epsilon(price.all_runs)}. Settings that were chosen on public data are free."
    )


def render_sweep(found: Sweep) -> RenderableType:
    """The sweep for a terminal."""
    parts: list[RenderableType] = [rich_table(sweep_rows(found, wide=False))]
    if found.price is not None:
        parts.append(rich_table(price_rows(found.price, found.study.privacy.unit.value)))
    return Group(
        *parts,
        Text(nothing_chosen(found)),
        Text(interval_note(len(found.seeds), found.measures), style="dim"),
    )


def _costs(cost: Cost) -> tuple[str, str]:
    testing = "no histogram is released" if cost.testing is None else f"{cost.testing:.2f}"
    return ("no bound" if cost.training is None else f"{cost.training:.2f}"), testing


def _epsilon(value: float | None) -> str:
    return "more than any bound" if value is None else f"ε = {value:.2f}"


def _kilobytes(value: Interval) -> str:
    return f"{value.mean / 1e3:.1f}" if value.count else "—"
