"""The budget report: what was spent, by whom, what remains, and how many rounds still fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from client.ledger import Ledger
from client.ledger_records import Entry
from client.spend import Charge, Limits, Spent, spent

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
_MOST_ROUNDS = 4096


@dataclass(frozen=True, kw_only=True)
class StudySpend:
    """What one stage of one study would have cost by itself. These do not add up to the total."""

    study: str
    stage: str
    releases: int
    unresolved: int
    epsilon_alone: float


@dataclass(frozen=True, kw_only=True)
class CohortBudget:
    """One cohort; its figures are those of its worst-off patient.

    ``rounds_left``: how many more rounds like its last one fit, as of now.
    """

    cohort: str
    patients: int
    spent_lifetime: float
    spent_year: float
    left_lifetime: float
    left_year: float
    rounds_left: int
    studies: tuple[StudySpend, ...]


@dataclass(frozen=True, kw_only=True)
class Quantile:
    """A fraction ``share`` of all patients spent at most this."""

    share: float
    spent_lifetime: float
    spent_year: float


@dataclass(frozen=True, kw_only=True)
class BudgetReport:
    """Everything at the limits' δ. ε where remaining budget is a difference, not a composition."""

    limits: Limits
    patients: int
    cohorts: tuple[CohortBudget, ...]
    quantiles: tuple[Quantile, ...]


def budget_report(ledger: Ledger, limits: Limits, now: datetime) -> BudgetReport:
    """What ``ledger`` says under ``limits``. Unresolved reservations count as spent."""
    by_cohort: dict[int, list[Entry]] = {}
    for entry in ledger.entries():
        by_cohort.setdefault(entry.cohort, []).append(entry)
    spends: dict[frozenset[int], Spent] = {}

    def charges(history: frozenset[int]) -> list[Charge]:
        return [entry.charge for each in sorted(history) for entry in by_cohort.get(each, ())]

    def spend(history: frozenset[int]) -> Spent:
        charged = frozenset(each for each in history if each in by_cohort)
        if charged not in spends:
            spends[charged] = spent(charges(charged), limits=limits, now=now)
        return spends[charged]

    rows = []
    for cohort in ledger.cohorts():
        entries = by_cohort.get(cohort.id)
        if not entries:
            continue
        histories = list(ledger.patient_groups(cohort))
        life = max(spend(history).lifetime for history in histories)
        year = max(spend(history).year for history in histories)
        rows.append(
            CohortBudget(
                cohort=cohort.digest[:12],
                patients=cohort.patients,
                spent_lifetime=life,
                spent_year=year,
                left_lifetime=max(0.0, limits.epsilon_lifetime - life),
                left_year=max(0.0, limits.epsilon_per_year - year),
                rounds_left=min(
                    rounds_left(charges(history), entries[-1].charge, limits, now)
                    for history in histories
                ),
                studies=_by_study(entries, limits),
            )
        )
    groups = ledger.patient_groups()
    return BudgetReport(
        limits=limits,
        patients=sum(groups.values()),
        cohorts=tuple(rows),
        quantiles=_quantiles([(spend(history), count) for history, count in groups.items()]),
    )


def rounds_left(charges: Sequence[Charge], one_round: Charge, limits: Limits, now: datetime) -> int:
    """How many more times ``one_round`` fits now; at most 4,096 are looked for."""

    def fits(rounds: int) -> bool:
        events = tuple(replace(event, steps=event.steps * rounds) for event in one_round.events)
        more = replace(one_round, events=events, time=now)
        after = spent([*charges, more], limits=limits, now=now)
        return after.lifetime <= limits.epsilon_lifetime and after.year <= limits.epsilon_per_year

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= _MOST_ROUNDS and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _by_study(entries: Sequence[Entry], limits: Limits) -> tuple[StudySpend, ...]:
    stages: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        stages.setdefault((entry.study, entry.stage), []).append(entry)
    return tuple(
        StudySpend(
            study=study,
            stage=stage,
            releases=len(group),
            unresolved=sum(entry.state == "reserved" for entry in group),
            epsilon_alone=spent(
                [entry.charge for entry in group], limits=limits, now=group[-1].charge.time
            ).lifetime,
        )
        for (study, stage), group in stages.items()
    )


def _quantiles(spends: Sequence[tuple[Spent, int]]) -> tuple[Quantile, ...]:
    total = sum(count for _, count in spends)

    def at(share: float, values: list[tuple[float, int]]) -> float:
        seen, wanted = 0, max(1, math.ceil(share * total))
        for value, count in sorted(values):
            seen += count
            if seen >= wanted:
                return value
        return 0.0

    return tuple(
        Quantile(
            share=share,
            spent_lifetime=at(share, [(one.lifetime, count) for one, count in spends]),
            spent_year=at(share, [(one.year, count) for one, count in spends]),
        )
        for share in _QUANTILES
    )
