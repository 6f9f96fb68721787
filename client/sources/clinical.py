"""A patient's coded records become rows: what FHIR bundles and OMOP databases have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import fmean
from typing import Any

import numpy as np

from client.sources.skipped import Skipped
from common.errors import DataError
from common.readers import Chunk
from common.sources import ClinicalColumn, ClinicalMapping
from common.units import conversion

PATIENT = "patient"
_DATES = ("birth_date", "death_date", "start", "end")
ROW_COLUMNS = (PATIENT, "sex", *_DATES, "deceased", "visit")
_PATIENTS_A_CHUNK = 500


@dataclass(frozen=True)
class Event:
    """A measurement or a diagnosis: its codes, when, and a value with its unit."""

    codes: frozenset[str]
    date: datetime
    value: float | str | None = None
    unit: str = ""


@dataclass(frozen=True)
class Visit:
    """One stay or contact."""

    start: datetime
    end: datetime
    kind: str = ""


@dataclass
class Person:
    """All that a source knows of one patient."""

    patient: str
    sex: str = "unknown"
    birth: datetime | None = None
    death: datetime | None = None
    is_deceased: bool = False
    visits: list[Visit] = field(default_factory=list)
    observations: list[Event] = field(default_factory=list)
    conditions: list[Event] = field(default_factory=list)


def chunks_of(
    people: Iterable[Person], mapping: ClinicalMapping, wanted: Sequence[str], skipped: Skipped
) -> Iterator[Chunk]:
    """Rows of all people, some hundred patients at a time."""
    rows: list[dict[str, Any]] = []
    waiting = 0
    for person in people:
        rows += rows_of(person, mapping, wanted, skipped)
        waiting += 1
        if waiting == _PATIENTS_A_CHUNK:
            yield _chunk(rows, wanted)
            rows, waiting = [], 0
    if waiting:
        yield _chunk(rows, wanted)


def rows_of(
    person: Person, mapping: ClinicalMapping, wanted: Sequence[str], skipped: Skipped
) -> list[dict[str, Any]]:
    """One row a visit, or one in all, in the order of time."""
    visits = sorted(
        (one for one in person.visits if not mapping.visits or one.kind in mapping.visits),
        key=lambda one: (one.start, one.end, one.kind),
    )
    if mapping.row == "patient":
        if mapping.visits and not visits:
            return []
        spans: list[tuple[datetime | None, datetime | None, str]] = [
            (visits[0].start, max(one.end for one in visits), "") if visits else (None, None, "")
        ]
    else:
        spans = [(one.start, one.end, one.kind) for one in visits]
    found = []
    for start, end, kind in spans:
        row: dict[str, Any] = {
            PATIENT: person.patient,
            "sex": person.sex,
            "birth_date": person.birth,
            "death_date": person.death,
            "deceased": int(person.is_deceased or person.death is not None),
            "start": start,
            "end": end,
            "visit": kind or None,
        }
        for name in wanted:
            if name in mapping.columns:
                row[name] = _value(name, mapping.columns[name], person, (start, end), skipped)
        found.append(row)
    return found


def moment(text: str | None) -> datetime | None:
    """A FHIR date or dateTime, in UTC; a year or month alone is read as its middle."""
    if not text:
        return None
    for length, middle in ((4, "-07-01"), (7, "-15")):
        if len(text) == length:
            text += middle
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    offset = found.utcoffset()
    return found.replace(tzinfo=None) - offset if offset is not None else found


def _value(
    name: str,
    column: ClinicalColumn,
    person: Person,
    span: tuple[datetime | None, datetime | None],
    skipped: Skipped,
) -> Any:
    codes = set(column.condition or column.observation)
    events = person.conditions if column.condition else person.observations
    seen = [one for one in events if one.codes & codes and _is_within(one.date, column, span)]
    if column.condition:
        return int(bool(seen))
    values = [
        value
        for one in sorted(seen, key=lambda one: one.date)
        if (value := _in_unit(name, one, column.unit, skipped)) is not None
    ]
    if not values:
        return None
    if column.pick in ("last", "first"):
        return values[-1 if column.pick == "last" else 0]
    numbers = [value for value in values if isinstance(value, float)]
    if len(numbers) < len(values):
        raise DataError(
            f"columns.{name}: pick = {column.pick!r} needs numbers, found words; use 'last'"
        )
    if column.pick == "mean":
        return fmean(numbers)
    return min(numbers) if column.pick == "min" else max(numbers)


def _is_within(
    date: datetime, column: ClinicalColumn, span: tuple[datetime | None, datetime | None]
) -> bool:
    start, end = span
    reach = None if column.within_days is None else timedelta(days=column.within_days)
    if start is None or end is None:
        return column.when == "before"
    if column.when == "after":
        return date > end and (reach is None or date <= end + reach)
    return date <= end and (reach is None or date >= start - reach)


def _in_unit(name: str, event: Event, unit: str, skipped: Skipped) -> float | str | None:
    if not isinstance(event.value, float):
        return event.value
    if event.unit == unit:
        return event.value
    if not unit:
        skipped.add(f"of {name}: in {event.unit!r}, and columns.{name} names no unit; set unit")
        return None
    try:
        found = conversion(event.unit, unit)
    except DataError as error:
        skipped.add(f"of {name}: {error}")
        return None
    return event.value * found.factor + found.offset


def _chunk(rows: list[dict[str, Any]], wanted: Sequence[str]) -> Chunk:
    return {
        name: np.array([row[name] for row in rows], dtype="datetime64[s]")
        if name in _DATES
        else np.array([row[name] for row in rows], dtype=object)
        for name in wanted
    }
