"""FHIR R4 bundles: Patient, Encounter, Observation and Condition become rows.

Of a patient only what a row may hold is taken from a bundle; names, addresses, identifiers and
free text are never looked at. A file at a time is in memory.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from client.sources.clinical import PATIENT, ROW_COLUMNS, Event, Person, Visit, chunks_of, moment
from client.sources.skipped import Skipped
from common.errors import DataError
from common.readers import Chunk
from common.sources import FhirSource

_VOID = {"entered-in-error", "cancelled", "refuted", "planned", "registered"}

Resource = Mapping[str, Any]


class FhirBundles:
    """All bundles below a folder, in the order of their names."""

    patient = PATIENT

    def __init__(self, spec: FhirSource, folder: Path) -> None:
        self._spec, self._root = spec, folder / spec.path
        if not self._root.is_dir():
            raise DataError(f"{self._root}: no such folder; expected one with bundles (*.json)")
        self._files = sorted(self._root.rglob("*.json"))
        if not self._files:
            raise DataError(f"{self._root}: expected FHIR bundles (*.json), found none")
        self.origin = spec.path
        self.columns = (*ROW_COLUMNS, *spec.columns)
        self._files_out, self._records_out = Skipped("files"), Skipped("records")

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Rows with the columns ``wanted``; dates as datetime64, the rest as found."""
        return chunks_of(self._people(), self._spec, wanted, self._records_out)

    def notes(self) -> tuple[str, ...]:
        """Files and records that were left out."""
        return (*self._files_out.lines(), *self._records_out.lines())

    def _people(self) -> Iterator[Person]:
        for path in self._files:
            resources = self._resources(path)
            people = list(_read_bundle(resources, self._records_out))
            if resources and not people:
                self._files_out.add("they hold no patient; nothing to do", path.name)
            yield from people

    def _resources(self, path: Path) -> list[tuple[str, Resource]]:
        try:
            bundle = json.loads(path.read_text(encoding="utf-8"))
            if bundle["resourceType"] != "Bundle":
                self._files_out.add("they are no bundles; export bundles of patients", path.name)
                return []
            return [
                (str(entry.get("fullUrl", "")), entry["resource"])
                for entry in bundle.get("entry", [])
                if isinstance(entry.get("resource"), dict)
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._files_out.add("they are not valid FHIR in JSON; export them again", path.name)
            return []


def _read_bundle(resources: Sequence[tuple[str, Resource]], skipped: Skipped) -> Iterator[Person]:
    people: dict[str, Person] = {}
    by_type: dict[str, list[Resource]] = defaultdict(list)
    for url, resource in resources:
        kind = resource.get("resourceType")
        if kind == "Patient" and resource.get("id"):
            person = _person(resource)
            people[url or f"Patient/{person.patient}"] = person
            people[f"Patient/{person.patient}"] = person
        elif isinstance(kind, str):
            by_type[kind].append(resource)
    readers: tuple[tuple[str, Callable[[Person, Resource], bool]], ...] = (
        ("Encounter", _add_visit),
        ("Observation", _add_observation),
        ("Condition", _add_condition),
    )
    for kind, read in readers:
        for resource in by_type[kind]:
            try:
                if _is_void(resource):
                    continue
                whose = _subject(resource, people)
                if whose is None:
                    skipped.add(
                        f"{kind} of a patient who is not in the same bundle; export whole patients"
                    )
                elif not read(whose, resource):
                    skipped.add(f"{kind} without a usable date")
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                skipped.add(f"{kind} that is not valid FHIR R4")
    # Each is known under two names.
    return iter({id(person): person for person in people.values()}.values())


def _subject(resource: Resource, people: Mapping[str, Person]) -> Person | None:
    reference = str((resource.get("subject") or {}).get("reference", ""))
    # An absolute address ends like a relative one.
    return people.get(reference) or people.get("/".join(reference.split("/")[-2:]))


def _is_void(resource: Resource) -> bool:
    verification = _codes(resource.get("verificationStatus"))
    return bool({str(resource.get("status")), *verification} & _VOID)


def _person(resource: Resource) -> Person:
    death = moment(resource.get("deceasedDateTime"))
    return Person(
        patient=str(resource["id"]),
        sex=str(resource.get("gender") or "unknown"),
        birth=moment(resource.get("birthDate")),
        death=death,
        is_deceased=death is not None or resource.get("deceasedBoolean") is True,
    )


def _add_visit(person: Person, resource: Resource) -> bool:
    period = resource.get("period") or {}
    start = moment(period.get("start"))
    if start is None:
        return False
    end = moment(period.get("end")) or start
    person.visits.append(Visit(start, max(start, end), str(resource["class"].get("code", ""))))
    return True


def _add_condition(person: Person, resource: Resource) -> bool:
    date = (
        moment(resource.get("onsetDateTime"))
        or moment((resource.get("onsetPeriod") or {}).get("start"))
        or moment(resource.get("recordedDate"))
    )
    if date is None:
        return False
    person.conditions.append(Event(_codes(resource.get("code")), date))
    return True


def _add_observation(person: Person, resource: Resource) -> bool:
    date = (
        moment(resource.get("effectiveDateTime"))
        or moment(resource.get("effectiveInstant"))
        or moment((resource.get("effectivePeriod") or {}).get("end"))
    )
    if date is None:
        return False
    for part in (resource, *resource.get("component", [])):
        value, unit = _measured(part)
        if value is not None:
            person.observations.append(Event(_codes(part.get("code")), date, value, unit))
    return True


def _measured(part: Resource) -> tuple[float | str | None, str]:
    if quantity := part.get("valueQuantity"):
        # "<5" is no measurement of 5.
        if "value" not in quantity or quantity.get("comparator"):
            return None, ""
        return float(quantity["value"]), str(quantity.get("code") or quantity.get("unit") or "")
    if concept := part.get("valueCodeableConcept"):
        coding = (concept.get("coding") or [{}])[0]
        return (str(coding["code"]) if coding.get("code") else None), ""
    for key in ("valueInteger", "valueBoolean"):
        if key in part:
            return float(part[key]), ""
    return None, ""


def _codes(concept: Resource | None) -> frozenset[str]:
    """``code`` and ``system|code`` of every coding."""
    codings = (concept or {}).get("coding") or []
    codes = [(str(one.get("system", "")), str(one["code"])) for one in codings if one.get("code")]
    return frozenset(form for system, code in codes for form in (code, f"{system}|{code}"))
