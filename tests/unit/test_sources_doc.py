"""docs/sources.md is true: its examples are files that ship, and each reads data of its kind."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from client.hospitalfile import HospitalFile
from client.sources.reading import read_records
from common.dictionary import Dictionary
from common.strict import parse_strict
from common.tables import Table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = {path.stem: path for path in (ROOT / "deploy/examples/hospitals").glob("*.toml")}

VISITS = parse_strict(Dictionary, tomllib.loads(BLOCKS[0])["dictionary"], origin="sources.md")
XRAYS = Dictionary.model_validate_json(
    """{"label": {"name": "pneumonia", "classes": [[0], [1]]},
        "columns": [{"name": "xray", "kind": "image", "shape": [64, 64]}]}"""
)


def read(folder: Path, kind: str, dictionary: Dictionary = VISITS, **source: Any) -> Table:
    tree = tomllib.loads(EXAMPLES[kind].read_text(encoding="utf-8"))
    tree["source"] = {
        key: value for key, value in (tree["source"] | source).items() if value is not None
    }
    settings = parse_strict(HospitalFile, tree, origin=kind)
    return read_records(
        settings.source, dictionary, folder, rules=settings.deidentify, secret=lambda: b"k" * 32
    )


def assert_three_visits(table: Table) -> None:
    """The same three visits of two patients, whichever way they came."""
    np.testing.assert_allclose(table.values["age"], [60, 61, 90], atol=0.01)
    np.testing.assert_allclose(table.values["creatinine"], [1.0, 2.0, np.nan], atol=2e-3)
    np.testing.assert_allclose(table.values["stay"], [7, 2, 1])
    assert table.values["sex"].tolist() == [0, 0, 1]
    assert table.labels.tolist() == [1, 0, 0]
    owners = table.patients.tolist()
    assert owners[0] == owners[1] != owners[2]
    assert "age: 1 ages over 89 read as 90" in table.report.deidentified


def test_every_example_is_in_the_page_and_every_kind_has_one() -> None:
    assert {path.read_text(encoding="utf-8") for path in EXAMPLES.values()} == set(BLOCKS[1:])
    assert set(EXAMPLES) == {"csv", "parquet", "sql", "omop", "fhir", "dicom", "images"}


def test_csv(tmp_path: Path) -> None:
    text = (
        "PID;Name;Station 1;Geschlecht;Geburt;Aufnahme;Entlassung;Krea;Wiederaufnahme\n"
        "7;Müller;X;w;01.06.1950;01.06.2010;08.06.2010;88,5;ja\n"
        "7;Müller;X;w;01.06.1950;02.06.2011;04.06.2011;177,0;nein\n"
        "8;Groß;Y;m;01.01.1915;01.01.2010;02.01.2010;n/a;nein\n"
    )
    (tmp_path / "export.csv.gz").write_bytes(gzip.compress(text.encode("latin-1")))
    table = read(tmp_path, "csv")
    assert_three_visits(table)
    assert table.report.columns[2].conversion == "umol/L × 0.0113 = mg/dL"
    assert "never read, as direct identifiers: Name, Station 1" in table.report.deidentified


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (consilium[parquet])")
    visits = tmp_path / "warehouse" / "visits"
    visits.mkdir(parents=True)
    frame = pd.DataFrame(
        {
            "patient_key": [7, 7, 8],
            "sex": ["female", "female", "male"],
            "age": [60, 61, 95],
            "admitted_at": pd.to_datetime(["2010-06-01", "2011-06-02", "2010-01-01"]),
            "discharged_at": pd.to_datetime(["2010-06-08", "2011-06-04", "2010-01-02"]),
            "crea_mg_dl": [1.0, 2.0, None],
            "readmitted": [1, 0, 0],
        }
    )
    frame.iloc[:2].to_parquet(visits / "2010.parquet")
    frame.iloc[2:].to_parquet(visits / "2011.parquet")
    assert_three_visits(read(tmp_path, "parquet"))


def test_sql(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ward.db") as database:
        database.execute(
            "CREATE TABLE visits (patient, sex, born, admitted, discharged, crea, readmitted)"
        )
        database.executemany(
            "INSERT INTO visits VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (8, "male", "1915-01-01", "2010-01-01", "2010-01-02", None, 0),
                (7, "female", "1950-06-01", "2011-06-02", "2011-06-04", 2.0, 0),
                (7, "female", "1950-06-01", "2010-06-01", "2010-06-08", 1.0, 1),
            ],
        )
    database.close()
    where = {"url": "sqlite:///ward.db", "password": None, "table": "visits"}
    assert_three_visits(read(tmp_path, "sql", **where))


def test_omop(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "omop.db") as database:
        database.executescript(
            """
            CREATE TABLE person (person_id, gender_concept_id, year_of_birth, month_of_birth,
                                 day_of_birth);
            CREATE TABLE visit_occurrence (visit_occurrence_id, person_id, visit_concept_id,
                                           visit_start_date, visit_end_date);
            CREATE TABLE measurement (measurement_id, person_id, measurement_concept_id,
                measurement_date, value_as_number, value_as_concept_id, unit_concept_id,
                unit_source_value);
            CREATE TABLE condition_occurrence (condition_occurrence_id, person_id,
                                               condition_concept_id, condition_start_date);
            CREATE TABLE concept_ancestor (ancestor_concept_id, descendant_concept_id);
            INSERT INTO person VALUES (7, 8532, 1950, 6, 1), (8, 8507, 1915, 1, 1);
            INSERT INTO visit_occurrence VALUES
                (1, 7, 9201, '2010-06-01', '2010-06-08'), (2, 7, 9201, '2011-06-02', '2011-06-04'),
                (3, 7, 9202, '2012-01-01', '2012-01-01'), (4, 8, 9201, '2010-01-01', '2010-01-02');
            INSERT INTO measurement VALUES
                (1, 7, 3016723, '2010-06-02', 10, NULL, NULL, 'mg/L'),
                (2, 7, 3016723, '2011-06-03', 2.0, NULL, NULL, 'mg/dL');
            INSERT INTO condition_occurrence VALUES (1, 7, 4229440, '2010-06-20');
            INSERT INTO concept_ancestor VALUES (316139, 4229440);
            """
        )
    database.close()
    where = {"url": "sqlite:///omop.db", "password": None, "cdm_schema": None}
    assert_three_visits(read(tmp_path, "omop", **where))


def test_fhir(tmp_path: Path) -> None:
    def visit(who: str, start: str, end: str) -> dict[str, Any]:
        return {
            "resourceType": "Encounter",
            "class": {"code": "IMP"},
            "subject": {"reference": f"Patient/{who}"},
            "period": {"start": start, "end": end},
        }

    def creatinine(value: float, unit: str, day: str) -> dict[str, Any]:
        return {
            "resourceType": "Observation",
            "code": {"coding": [{"system": "http://loinc.org", "code": "2160-0"}]},
            "subject": {"reference": "Patient/7"},
            "effectiveDateTime": day,
            "valueQuantity": {"value": value, "unit": unit},
        }

    bundles = {
        "a": [
            {"resourceType": "Patient", "id": "7", "gender": "female", "birthDate": "1950-06-01"},
            visit("7", "2010-06-01", "2010-06-08"),
            visit("7", "2011-06-02", "2011-06-04"),
            creatinine(10, "mg/L", "2010-06-02"),
            creatinine(2.0, "mg/dL", "2011-06-03"),
            {
                "resourceType": "Condition",
                "code": {"coding": [{"system": "http://snomed.info/sct", "code": "84114007"}]},
                "subject": {"reference": "Patient/7"},
                "onsetDateTime": "2010-06-20",
            },
        ],
        "b": [
            {"resourceType": "Patient", "id": "8", "gender": "male", "birthDate": "1915-01-01"},
            visit("8", "2010-01-01", "2010-01-02"),
        ],
    }
    (tmp_path / "bundles").mkdir()
    for name, resources in bundles.items():
        entries = [{"resource": one} for one in resources]
        text = json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entries})
        (tmp_path / "bundles" / f"{name}.json").write_text(text)
    assert_three_visits(read(tmp_path, "fhir"))


def test_dicom(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed (consilium[dicom])")
    from pydicom.data import get_testdata_file

    folder = tmp_path / "pacs-export" / "2010"
    folder.mkdir(parents=True)
    lines = ["sop_instance_uid,finding"]
    for number, (patient, finding) in enumerate((("7", "none"), ("7", "pneumonia"))):
        made = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
        made.Modality, made.PatientID, made.SOPInstanceUID = "DX", patient, f"1.2.3.{number}"
        made.save_as(folder / f"{number}.dcm")
        lines.append(f"{made.SOPInstanceUID},{finding}")
    (tmp_path / "findings.csv").write_text("\n".join(lines) + "\n")
    table = read(tmp_path, "dicom", XRAYS)
    assert table.labels.tolist() == [0, 1]
    assert table.patients.tolist() == ["7", "7"]
    assert 0.1 < table.values["xray"].mean() < 0.9


def test_images(tmp_path: Path) -> None:
    for finding, name in (("NORMAL", "person1_a.png"), ("PNEUMONIA", "person1_b.png")):
        (tmp_path / "x-rays" / finding).mkdir(parents=True)
        grey = np.full((100, 80), 51, np.uint8)
        Image.fromarray(grey).save(tmp_path / "x-rays" / finding / name)
    table = read(tmp_path, "images", XRAYS)
    assert table.labels.tolist() == [0, 1]
    assert table.patients.tolist() == ["1", "1"]
    assert table.values["xray"][0, 32, 32] == pytest.approx(0.2)
    assert table.values["xray"][0, 32, 0] == 0
