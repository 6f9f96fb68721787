"""A run's forecast, attack and observer in words: for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from common.study import Study
from common.tasks import Measure
from simulations.markup import Html, data_table, listed, note, section
from simulations.measures import listing, measures_in, number
from simulations.poison import scenario_of

STAGES = {
    "statistics": "scaling statistics",
    "finetune": "fine-tune teacher",
    "distill": "distil student",
    "evaluate": "evaluate student",
}
_KINDS = {
    "label_flip": "flipped labels",
    "backdoor": "a backdoor in their records",
    "sign_flip": "updates turned round",
    "scale": "updates made larger",
    "wrong_vector": "random vectors",
}
_FATES = {
    "answered": "answered",
    "failed": "failed",
    "silent": "dropped out before its work",
    "lost": "dropped out after its work",
    "late": "too late",
    "not_asked": "not asked",
    "not_there": "not there yet",
}


def scenario_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the terminal needs to know; nothing of a run that has no forecast."""
    lines = []
    if summary.get("forecast"):
        lines.append(_forecast_words(summary["forecast"]))
    if summary.get("attack"):
        lines += _attack_words(summary["attack"], measures_in(summary))
    if summary.get("observer"):
        lines.append(_observer_words(summary["observer"]))
    return lines


def scenario_section(study: Study, summary: Mapping[str, Any]) -> list[Html]:
    """What went over the line, what went wrong, and what came of it; empty without a forecast."""
    found = summary.get("forecast")
    if not found:
        return []
    fates = [key for key in _FATES if any(one[key] for one in found["rounds"])]
    return [
        section(
            "Line, time and scenario",
            listed([*scenario_lines(summary), *_told(study)]),
            data_table(
                "Round by round: measured bytes of all hospitals in each, forecast time",
                ("round", "time", "to hospitals", "from hospitals", *map(_FATES.get, fates)),  # type: ignore[arg-type]
                list(_round_rows(found["rounds"], fates)),
            ),
            data_table(
                "Hospital by hospital: measured bytes of the whole run",
                ("hospital", "to it", "from it"),
                [
                    (name, bytes_words(one["bytes_down"]), bytes_words(one["bytes_up"]))
                    for name, one in found["hospitals"].items()
                ],
            ),
            note(
                "Bytes are those of the messages really sent; time is forecast from them, the line "
                "and the speed that the scenario assumes. Work at the coordinator is not in it, "
                "nor are greetings, and the requests around each message."
            ),
        )
    ]


def _round_rows(
    rounds: Sequence[Mapping[str, Any]], fates: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """A row for each round, or for several in turn that look alike."""

    def look(one: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            STAGES.get(one["stage"], one["stage"]),
            time_words(one["duration_s"]),
            bytes_words(one["bytes_down"]),
            bytes_words(one["bytes_up"]),
            *(str(one[key]) for key in fates),
        )

    for (stage, *cells), alike in groupby(rounds, key=look):
        first, *_, last = [one["round"] for one in alike] * 2
        yield (f"{stage} {first}" if first == last else f"{stage} {first} to {last}", *cells)


def _forecast_words(found: Mapping[str, Any]) -> str:
    rounds, line = len(found["rounds"]), found["line"]
    visits = max(1, sum(one["answered"] + one["late"] + one["lost"] for one in found["rounds"]))
    rates = f"{line['downlink_mbit_s']:g}/{line['uplink_mbit_s']:g} Mbit/s (down/up)"
    return (
        f"Forecast over hospital lines of {rates}: {time_words(found['duration_s'])} for {rounds} "
        f"rounds on patients, {time_words(found['duration_s'] / max(1, rounds))} each; "
        f"{bytes_words(found['bytes_down'] / visits)} to and "
        f"{bytes_words(found['bytes_up'] / visits)} from a hospital and round."
    )


def _attack_words(found: Mapping[str, Any], measures: Sequence[Measure]) -> list[str]:
    who = ", ".join(found["hospitals"])
    lines = [f"Attack by {who}: {_KINDS[found['kind']]}."]
    losses = [
        f"{_figure(loss)} of {one.title}"
        for one in measures
        if (loss := found[f"{one.key}_loss"]) is not None
    ]
    if losses:
        lines.append(
            f"It cost the student {listing(losses)} at honest test patients, against the same run "
            f"without it (95 % intervals over patients)."
        )
    for model in ("student", "teacher"):
        key = "backdoor_rate" if model == "student" else "teacher_backdoor_rate"
        if not found.get(key):
            continue
        without = found[f"{key}_without"]
        beside = f"; {_figure(without)} without the attack" if without else ""
        lines.append(
            f"The backdoor's trigger makes the {model} give {_figure(found[key])} of test patients "
            f"of other classes the target class{beside}."
        )
    return lines


def _observer_words(found: Mapping[str, Any]) -> str:
    bound = found["ceiling"]
    most = "" if bound is None else f", where the promised ε allows {bound:.3f} at most"
    return (
        f"A curious coordinator tells {found['members']} training patients from "
        f"{found['others']} others by the updates it saw with AUC "
        f"{_figure(found['with_noise'])}{most}; had no noise been added, with AUC "
        f"{_figure(found['without_noise'])} (0.5 is guessing)."
    )


def _told(study: Study) -> list[str]:
    """The scenario's other parts, as they were set."""
    spec, lines = scenario_of(study), []
    if spec.participation is not None:
        share = spec.participation.fraction
        asked = spec.participation.hospitals
        lines.append(
            f"A round of training asks {asked} hospitals."
            if share is None
            else f"A round of training asks {share:.0%} of the hospitals."
        )
    if spec.dropouts is not None:
        lines.append(
            f"A hospital drops out of a round {spec.dropouts.when} its work with probability "
            f"{spec.dropouts.probability:g}."
        )
    if spec.late is not None:
        lines.append(f"Some hospitals join in round {spec.late.from_round} of the fine-tuning.")
    if spec.missing_columns is not None:
        lines.append(f"Some hospitals never measure {', '.join(spec.missing_columns.columns)}.")
    if spec.stragglers is not None and spec.stragglers.deadline_s is not None:
        lines.append(f"Replies after {spec.stragglers.deadline_s:g} s are dropped.")
    return lines


def _figure(values: Sequence[float | None]) -> str:
    value, low, high = map(number, values)
    return f"{value} ({low} to {high})"


def time_words(seconds: float) -> str:
    """A duration for a reader.

    >>> time_words(0.29), time_words(75), time_words(7320)
    ('0.29 s', '1 min 15 s', '2 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def bytes_words(count: float) -> str:
    """A size for a reader.

    >>> bytes_words(812), bytes_words(53396), bytes_words(4.1e6)
    ('812 B', '53.4 kB', '4.1 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
