"""FHIR bundles become rows: synthetic ones in place, and small ones with every oddity."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.sources.clinical import moment
from client.sources.reading import read_public
from common.dictionary import Dictionary
from common.errors import DataError, StudyError
from common.sources import FhirSource
from common.strict import parse_strict
from common.tables import Table

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data"))

VISITS = Dictionary.model_validate_json(
    """{"label": {"name": "flu_after", "classes": [[0], [1]]},
        "columns": [
          {"name": "age", "kind": "numeric", "range": [0, 120], "unit": "years"},
          {"name": "sex", "kind": "binary", "categories": ["female", "male"]},
          {"name": "weight", "kind": "numeric", "range": [1, 300], "unit": "kg"},
          {"name": "sbp", "kind": "numeric", "range": [50, 260], "unit": "mm[Hg]"},
          {"name": "smoker", "kind": "categorical", "categories": ["yes", "no"]},
          {"name": "asthma", "kind": "binary", "categories": [0, 1]}]}"""
)
SPEC = {
    "kind": "fhir",
    "path": "bundles",
    "derive": {"age": {"start": "birth_date", "end": "start", "unit": "years"}},
    "recode": {"smoker": {"449868002": "yes", "266919005": "no"}},
    "columns": {
        "weight": {"observation": ["29463-7"], "unit": "kg"},
        "sbp": {"observation": ["http://loinc.org|8480-6"], "unit": "mmHg", "pick": "max"},
        "smoker": {"observation": ["72166-2"]},
        "asthma": {"condition": ["195967001"]},
        "flu_after": {"condition": ["6142004"], "when": "after", "within_days": 30},
    },
}


def spec(**changes: Any) -> FhirSource:
    return parse_strict(FhirSource, {**SPEC, **changes}, origin="hospital.toml")


def coded(code: str, system: str = "http://loinc.org") -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code}]}


def quantity(code: str, value: float, unit: str, day: str, **more: Any) -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        "status": "final",
        "code": coded(code),
        "subject": {"reference": "Patient/a"},
        "effectiveDateTime": day,
        "valueQuantity": {"value": value, "code": unit},
    } | more


def condition(code: str, day: str, **more: Any) -> dict[str, Any]:
    return {
        "resourceType": "Condition",
        "code": coded(code, "http://snomed.info/sct"),
        "subject": {"reference": "Patient/a"},
        "onsetDateTime": day,
    } | more


def visit(start: str, end: str | None, who: str = "Patient/a", **more: Any) -> dict[str, Any]:
    period = {"start": start} | ({"end": end} if end else {})
    return {
        "resourceType": "Encounter",
        "status": "finished",
        "class": {"code": "IMP"},
        "subject": {"reference": who},
        "period": period,
    } | more


PATIENT = {
    "resourceType": "Patient",
    "id": "a",
    "gender": "female",
    "birthDate": "1960-01-01",
    "name": [{"family": "CANARY", "given": ["Ada"]}],
    "telecom": [{"value": "+44 20 7946 0958"}],
}
WHOLE = [
    PATIENT,
    visit("2000-01-01T08:00:00Z", "2000-01-03T08:00:00Z"),
    visit("2001-01-01", None),
    visit("2002-01-01", None, status="cancelled"),
    quantity("29463-7", 154.3, "[lb_av]", "2000-01-02"),
    quantity("29463-7", 80.0, "kg", "2000-06-01"),
    quantity("29463-7", 1.0, "stone", "2000-07-01"),
    quantity("29463-7", 300.0, "kg", "2000-08-01", status="entered-in-error"),
    {
        **quantity("55284-4", 0, "", "2000-01-02"),
        "valueQuantity": None,
        "component": [
            {"code": coded("8480-6"), "valueQuantity": {"value": 130, "code": "mm[Hg]"}},
            {"code": coded("8462-4"), "valueQuantity": {"value": 80, "code": "mm[Hg]"}},
        ],
    },
    quantity("8480-6", 16.0, "kPa", "2000-01-02"),
    {**quantity("72166-2", 0, "", "1999"), "valueQuantity": None}
    | {"valueCodeableConcept": coded("266919005", "http://snomed.info/sct")},
    condition("195967001", "2000-05"),
    condition("195967001", "1999-01-01", verificationStatus=coded("refuted", "x")),
    condition("6142004", "2000-01-20"),
]


def bundle(folder: Path, resources: list[Any], name: str = "a.json", **entry: Any) -> None:
    (folder / "bundles").mkdir(exist_ok=True)
    entries = [{"resource": one, **entry} for one in resources]
    text = json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries})
    (folder / "bundles" / name).write_text(text)


def read(folder: Path, **changes: Any) -> Table:
    return read_public(spec(**changes), VISITS, folder)


def test_one_row_a_visit_with_what_was_known_by_its_end(tmp_path: Path) -> None:
    bundle(tmp_path, WHOLE)
    table = read(tmp_path)
    np.testing.assert_allclose(table.values["age"], [40, 41], atol=0.01)
    np.testing.assert_allclose(table.values["weight"], [154.3 * 0.45359237, 80], rtol=1e-6)
    np.testing.assert_allclose(table.values["sbp"], [130, 130])  # 16 kPa are 120
    assert table.values["sex"].tolist() == [0, 0]
    assert table.values["smoker"].tolist() == [1, 1]
    assert table.values["asthma"].tolist() == [0, 1]
    assert table.labels.tolist() == [1, 0]
    assert table.patients.tolist() == ["a", "a"]
    assert any("weight" in one and "'stone' is not known" in one for one in table.report.problems)
    assert "CANARY" not in str(table.report)


def test_one_row_a_patient(tmp_path: Path) -> None:
    bundle(tmp_path, WHOLE)
    table = read(tmp_path, row="patient")
    assert len(table) == 1
    assert table.values["asthma"].tolist() == [1]
    with pytest.raises(DataError, match="found none in 0 rows"):
        read(tmp_path, visits=["EMER"])


def test_what_is_broken_is_named_and_left_out(tmp_path: Path) -> None:
    bundle(tmp_path, WHOLE)
    bundle(tmp_path, [{"resourceType": "Organization", "id": "o"}], "org.json")
    bundle(tmp_path, [{**PATIENT, "id": "b"}, visit("2000-01-01", None, "Patient/zz")], "b.json")
    bundle(
        tmp_path,
        [
            {**PATIENT, "id": "c"},
            {**visit("soon", None, "Patient/c")},
            {"resourceType": "Observation", "subject": "Patient/c"},
        ],
        "c.json",
    )
    for name, text in (
        ("cut.json", '{"resourceType": "Bun'),
        ("list.json", "[1]"),
        ("one.json", json.dumps(PATIENT)),
    ):
        (tmp_path / "bundles" / name).write_text(text)
    table = read(tmp_path)
    assert len(table) == 2
    problems = "\n".join(table.report.problems)
    for words in (
        "2 files left out: they are not valid FHIR in JSON; export them again (cut.json, list",
        "1 files left out: they are no bundles; export bundles of patients (one.json)",
        "1 files left out: they hold no patient; nothing to do (org.json)",
        "1 records left out: Encounter of a patient who is not in the same bundle",
        "1 records left out: Encounter without a usable date",
        "1 records left out: Observation that is not valid FHIR R4",
    ):
        assert words in problems


def test_a_record_of_nobody_is_nobodys(tmp_path: Path) -> None:
    """A bundle without addresses must not give a stray record to whoever comes first."""
    stray = {**condition("6142004", "2000-01-04"), "subject": {}}
    resources = [one for one in WHOLE if one != condition("6142004", "2000-01-20")]
    bundle(tmp_path, [*resources, stray])
    table = read(tmp_path)
    assert table.labels.tolist() == [0, 0]
    assert any("not in the same bundle" in one for one in table.report.problems)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"columns": {"x": {}}}, "columns.x: give either observation"),
        ({"columns": {"x": {"condition": ["1"], "unit": "kg"}}}, "belong to an observation"),
        ({"columns": {"x": {"observation": ["1"], "pick": "lst"}}}, "did you mean 'last'"),
        ({"rows": "visit"}, "rows: unknown key; did you mean 'row'"),
    ],
)
def test_a_wrong_mapping_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        spec(**changes)


def test_no_bundles_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; expected one with bundles"):
        read(tmp_path)
    (tmp_path / "bundles").mkdir()
    with pytest.raises(DataError, match="found none"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1979", "1979-07-01T00:00:00"),
        ("1979-04", "1979-04-15T00:00:00"),
        ("1979-04-25T08:54:18+02:00", "1979-04-25T06:54:18"),
        ("1979-04-25T08:54:18.5Z", "1979-04-25T08:54:18.500000"),
        ("soon", None),
        (None, None),
    ],
)
def test_dates_as_fhir_writes_them(text: str | None, found: str | None) -> None:
    date = moment(text)
    assert (date.isoformat() if date else None) == found


SYNTHEA = Dictionary.model_validate_json(
    """{"label": {"name": "obese", "classes": [[0], [1]]},
        "columns": [
          {"name": "age", "kind": "numeric", "range": [0, 120], "unit": "years"},
          {"name": "bmi", "kind": "numeric", "range": [10, 70], "unit": "kg/m2"},
          {"name": "weight", "kind": "numeric", "range": [2, 660], "unit": "[lb_av]"},
          {"name": "sbp", "kind": "numeric", "range": [60, 260], "unit": "mm[Hg]"}]}"""
)


def test_synthetic_patients_in_place() -> None:
    """Counts from the data's description: 105 encounters of twelve patients."""
    if not (DATA / "fhir_synthea").is_dir():
        pytest.skip(f"needs fhir_synthea below {DATA}; set CONSILIUM_DATA")
    source = parse_strict(
        FhirSource,
        {
            "kind": "fhir",
            "path": "fhir_synthea",
            "derive": {"age": {"start": "birth_date", "end": "start", "unit": "years"}},
            "columns": {
                "bmi": {"observation": ["39156-5"], "unit": "kg/m2"},
                "weight": {"observation": ["29463-7"], "unit": "kg"},
                "sbp": {"observation": ["8480-6"], "unit": "mm[Hg]"},
                "obese": {"condition": ["162864005"]},
            },
            "units": {"weight": "kg"},
        },
        origin="test",
    )
    table = read_public(source, SYNTHEA, DATA)
    assert (table.report.rows, table.report.patients) == (105, 12)
    assert table.report.columns[2].conversion == "kg × 2.20462 = [lb_av]"
    kilos = table.values["weight"] * 0.45359237
    assert 10 < np.nanmin(kilos) < np.nanmax(kilos) < 130
    # The diagnosis says "body mass index 30+".
    heaviest = [
        np.nanmax(table.values["bmi"][table.patients == one]) for one in set(table.patients)
    ]
    obese = [table.labels[table.patients == one].max() for one in set(table.patients)]
    assert sum(obese) == 6
    assert min(bmi for bmi, is_obese in zip(heaviest, obese, strict=True) if is_obese) > 29.5
    assert table.values["age"].max() <= 90
    told = str(table.report)
    assert not any(name in told for name in ("Abbott", "Eichmann", "Springfield"))
