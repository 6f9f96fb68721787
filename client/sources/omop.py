"""The OMOP common data model (https://ohdsi.github.io/CommonDataModel/): its tables become rows.

Four tables are read: person, visit_occurrence, measurement, condition_occurrence; besides, death
and, for units and descendants, concept and concept_ancestor. Some hundred persons at a time, in one
snapshot, and only concepts that the hospital's mapping names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, TableClause, column, inspect, select, table

from client.sources.clinical import PATIENT, ROW_COLUMNS, Event, Person, Visit, chunks_of
from client.sources.databases import open_database, quoted, reading
from client.sources.skipped import Skipped
from client.sources.specs import OmopSource
from common.errors import DataError
from common.readers import Chunk

_PERSONS = 500
_SEX = {8507: "male", 8532: "female"}
_VISIT = {9201: "IMP", 9202: "AMB", 9203: "EMER", 262: "EMER"}
_TABLES = {
    "person": "person_id gender_concept_id year_of_birth month_of_birth day_of_birth",
    "death": "person_id death_date",
    "visit_occurrence": "visit_occurrence_id person_id visit_concept_id visit_start_date "
    "visit_end_date",
    "measurement": "measurement_id person_id measurement_concept_id measurement_date "
    "value_as_number value_as_concept_id unit_concept_id unit_source_value",
    "condition_occurrence": "condition_occurrence_id person_id condition_concept_id "
    "condition_start_date",
    "concept": "concept_id concept_code",
    "concept_ancestor": "ancestor_concept_id descendant_concept_id",
}


class OmopTables:
    """Rows made of an OMOP database."""

    patient = PATIENT

    def __init__(self, spec: OmopSource, folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self.origin = spec.cdm_schema or "omop"
        self.columns = (*ROW_COLUMNS, *spec.columns)
        self._records_out = Skipped("records")
        with reading(open_database(spec, folder), self.origin) as connection:
            present = set(inspect(connection).get_table_names(schema=spec.cdm_schema or None))
            present |= set(inspect(connection).get_view_names(schema=spec.cdm_schema or None))
        absent = {"person", "visit_occurrence", "measurement", "condition_occurrence"} - present
        if absent:
            raise DataError(
                f"{self.origin}: expected OMOP tables, found no {', '.join(sorted(absent))}; "
                f"set cdm_schema, or let this account read them"
            )
        self._has = {name: name in present for name in ("death", "concept")}

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Rows with the columns ``wanted``, by person and time."""
        with reading(open_database(self._spec, self._folder), self.origin) as connection:
            yield from chunks_of(self._people(connection), self._spec, wanted, self._records_out)

    def notes(self) -> tuple[str, ...]:
        """Records that were left out."""
        return self._records_out.lines()

    def _table(self, name: str) -> TableClause:
        columns: list[Any] = [column(quoted(one)) for one in _TABLES[name].split()]
        schema = quoted(self._spec.cdm_schema) if self._spec.cdm_schema else None
        return table(quoted(name), *columns, schema=schema)

    def _people(self, connection: Connection) -> Iterator[Person]:
        person = self._table("person")
        measured, diagnosed = self._concepts(connection)
        last: int | None = None
        while True:
            statement = select(person).order_by(person.c.person_id).limit(_PERSONS)
            if last is not None:
                statement = statement.where(person.c.person_id > last)
            rows = connection.execute(statement).all()
            if not rows:
                return
            people = {row.person_id: _person(row) for row in rows}
            first, last = rows[0].person_id, rows[-1].person_id
            self._add_visits(connection, people, (first, last))
            self._add_deaths(connection, people, (first, last))
            self._add_measurements(connection, people, (first, last), measured)
            self._add_conditions(connection, people, (first, last), diagnosed)
            yield from people.values()

    def _concepts(self, connection: Connection) -> tuple[set[int], dict[int, set[int]]]:
        """The measurements that are needed, and each diagnosis with the concepts it stands for."""
        columns = self._spec.columns.values()
        measured = {int(code) for one in columns for code in one.observation}
        diagnosed = {int(code) for one in columns for code in one.condition}
        stands_for = {code: {code} for code in diagnosed}
        if self._spec.descendants and diagnosed:
            ancestor = self._table("concept_ancestor")
            statement = select(ancestor).where(ancestor.c.ancestor_concept_id.in_(diagnosed))
            for row in connection.execute(statement):
                stands_for.setdefault(row.descendant_concept_id, set()).add(row.ancestor_concept_id)
        return measured, stands_for

    def _add_visits(
        self, connection: Connection, people: dict[int, Person], span: tuple[int, int]
    ) -> None:
        visit = self._table("visit_occurrence")
        for row in connection.execute(_of(select(visit), visit, span)):
            start = _moment(row.visit_start_date)
            if row.person_id not in people or start is None:
                self._records_out.add("visit_occurrence without a person or a start")
                continue
            end = _moment(row.visit_end_date) or start
            kind = _VISIT.get(row.visit_concept_id, str(row.visit_concept_id))
            people[row.person_id].visits.append(Visit(start, max(start, end), kind))

    def _add_deaths(
        self, connection: Connection, people: dict[int, Person], span: tuple[int, int]
    ) -> None:
        if not self._has["death"]:
            return
        death = self._table("death")
        for row in connection.execute(_of(select(death), death, span)):
            if row.person_id in people:
                people[row.person_id].death = _moment(row.death_date)
                people[row.person_id].is_deceased = True

    def _add_measurements(
        self,
        connection: Connection,
        people: dict[int, Person],
        span: tuple[int, int],
        wanted: set[int],
    ) -> None:
        if not wanted:
            return
        measurement = self._table("measurement")
        statement: Select[Any] = select(measurement)
        if self._has["concept"]:
            unit = self._table("concept").alias("unit")
            statement = select(measurement, unit.c.concept_code).join_from(
                measurement, unit, measurement.c.unit_concept_id == unit.c.concept_id, isouter=True
            )
        statement = _of(statement, measurement, span).where(
            measurement.c.measurement_concept_id.in_(wanted)
        )
        for row in connection.execute(statement.order_by(measurement.c.measurement_id)):
            when = _moment(row.measurement_date)
            if row.person_id not in people or when is None:
                self._records_out.add("measurement without a person or a date")
                continue
            code = getattr(row, "concept_code", None) if row.unit_concept_id else None
            value: float | str | None = None
            if row.value_as_number is not None:
                value = float(row.value_as_number)
            elif row.value_as_concept_id:
                value = str(row.value_as_concept_id)
            if value is not None:
                codes = frozenset({str(row.measurement_concept_id)})
                people[row.person_id].observations.append(
                    Event(codes, when, value, str(code or row.unit_source_value or ""))
                )

    def _add_conditions(
        self,
        connection: Connection,
        people: dict[int, Person],
        span: tuple[int, int],
        stands_for: dict[int, set[int]],
    ) -> None:
        if not stands_for:
            return
        condition = self._table("condition_occurrence")
        statement = _of(select(condition), condition, span).where(
            condition.c.condition_concept_id.in_(stands_for)
        )
        codes = defaultdict(
            frozenset,
            {
                concept: frozenset(str(one) for one in wanted)
                for concept, wanted in stands_for.items()
            },
        )
        for row in connection.execute(statement.order_by(condition.c.condition_occurrence_id)):
            when = _moment(row.condition_start_date)
            if row.person_id not in people or when is None:
                self._records_out.add("condition_occurrence without a person or a date")
                continue
            people[row.person_id].conditions.append(Event(codes[row.condition_concept_id], when))


def _of(statement: Select[Any], source: TableClause, span: tuple[int, int]) -> Select[Any]:
    return statement.where(source.c.person_id.between(*span))


def _person(row: Any) -> Person:
    birth = None
    if row.year_of_birth:
        birth = datetime(row.year_of_birth, row.month_of_birth or 7, row.day_of_birth or 1)
    return Person(
        patient=str(row.person_id),
        sex=_SEX.get(row.gender_concept_id, "unknown"),
        birth=birth,
    )


def _moment(value: date | str | None) -> datetime | None:
    """SQLite keeps dates as text."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return value.replace(tzinfo=None)
    if isinstance(value, date):
        return datetime.combine(value, time())
    try:
        return datetime.fromisoformat(value).replace(tzinfo=None)
    except ValueError:
        return None
