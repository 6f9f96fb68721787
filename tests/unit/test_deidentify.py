"""What no study ever sees: direct identifiers, true dates, ages over 89."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.sources.deidentify import (
    AgesCapped,
    DeidentificationRules,
    Deidentified,
    looks_like_identifier,
)
from client.sources.reading import read_records
from common.dictionary import Dictionary
from common.errors import DataError
from common.readers import Arrays
from common.sources import ColumnMapping, CsvSource
from common.tables import Table

KEY = b"k" * 32
STAY = Dictionary.model_validate_json(
    """{"patient_id": "pid", "label": {"name": "ill", "classes": [[0], [1]]},
        "columns": [{"name": "age", "kind": "numeric", "range": [0, 120], "unit": "years"},
                    {"name": "stay", "kind": "numeric", "range": [0, 60], "unit": "days"}]}"""
)
DERIVE = {
    "age": {"start": "born", "end": "came", "unit": "years"},
    "stay": {"start": "came", "end": "left"},
}


def read(
    folder: Path, text: str, dictionary: Dictionary = STAY, key: bytes = KEY, **settings: Any
) -> Table:
    (folder / "x.csv").write_text(text, encoding="utf-8")
    rules = DeidentificationRules.model_validate(settings.pop("rules", {}))
    spec = CsvSource.model_validate_json(json.dumps({"kind": "csv", "path": "x.csv", **settings}))
    return read_records(spec, dictionary, folder, rules=rules, secret=lambda: key)


def shifted(patients: list[str], dates: list[str], key: bytes = KEY, **rules: Any) -> Any:
    source = Arrays("x", {"who": np.array(patients, object), "day": np.array(dates, object)})
    clean = Deidentified(
        source,
        ColumnMapping(),
        DeidentificationRules(dates=("day",), **rules),
        patient="who",
        secret=lambda: key,
    )
    (chunk,) = clean.chunks(["day"])
    return (chunk["day"] - np.array(dates, "datetime64[s]")).astype("timedelta64[D]").astype(int)


IDENTIFIERS = (
    "name Surname patient_name FirstName home_phone e-mail SSN zip_code postal-code MRN "
    "next_of_kin IPAddress mothersMaidenName work_fax birthplace"
)
MEASUREMENTS = (
    "age drug_name chol thal mean_radius time_in_hospital medical_specialty payer_code smiles "
    "source_site number_diagnoses admission_type_id insulin country"
)


@pytest.mark.parametrize("column", IDENTIFIERS.split())
def test_identifiers_are_known_by_name(column: str) -> None:
    assert looks_like_identifier(column)


@pytest.mark.parametrize("column", MEASUREMENTS.split())
def test_measurements_are_no_identifiers(column: str) -> None:
    assert not looks_like_identifier(column)


def test_an_identifier_is_refused_unless_the_hospital_says_it_is_none(tmp_path: Path) -> None:
    text = "pid,phone,stay,ill\n1,44,3,0\n2,45,4,1\n"
    with pytest.raises(DataError, match=r"'phone' is a direct identifier.*keep = \['phone'\]"):
        read(tmp_path, text, rename={"age": "phone"})
    kept = read(tmp_path, text, rename={"age": "phone"}, rules={"keep": ("phone",)})
    assert kept.values["age"].tolist() == [44, 45]
    with pytest.raises(DataError, match="direct identifier"):
        read(tmp_path, text, rename={"age": "phone"}, rules={"keep": ("phone",), "drop": ("pho*",)})


def test_the_patient_may_be_an_identifier_and_the_rest_is_listed(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        "mrn,name,ssn,ward_no,age,stay,ill\n7,Ada,1,4,50,3,0\n7,Ada,1,4,51,4,1\n",
        rename={"pid": "mrn"},
        rules={"drop": ("ward_*",)},
    )
    assert table.patients.tolist() == ["7", "7"]
    assert table.report.deidentified == ("never read, as direct identifiers: name, ssn, ward_no",)


def test_intervals_survive_the_shift_and_dates_do_not(tmp_path: Path) -> None:
    text = (
        "pid,born,came,left,ill\n"
        "1,1950-06-01,2010-06-01,2010-06-08,0\n"
        "2,1915-01-01,2010-01-01,2010-01-02,1\n"
        "2,1915-01-01,2011-01-01,bad,1\n"
    )
    table = read(tmp_path, text, derive=DERIVE)
    np.testing.assert_allclose(table.values["age"], [60.0, 90.0, 90.0], atol=0.01)
    np.testing.assert_allclose(table.values["stay"], [7, 1, np.nan])
    done = "\n".join(table.report.deidentified)
    assert "dates shifted by a secret offset of each patient's own" in done
    assert "born, came, left" in done
    assert "age: 2 ages over 89 read as 90" in done
    assert any("left: 1 cells are no dates" in one for one in table.report.problems)


@given(st.lists(st.text("abcde123", min_size=1, max_size=4), min_size=1, max_size=30))
def test_a_patients_dates_move_together_by_a_secret(patients: list[str]) -> None:
    dates = [f"2001-02-{1 + index % 28:02d}" for index in range(len(patients))]
    moved = shifted(patients, dates)
    by_patient = {who: set(moved[np.array(patients) == who]) for who in patients}
    assert all(len(days) == 1 for days in by_patient.values())
    assert (moved != 0).all()
    assert (np.abs(moved) <= 365).all()
    assert moved.tolist() == shifted(patients, dates).tolist()


def test_another_key_or_patient_moves_dates_elsewhere() -> None:
    people = [f"p{index}" for index in range(50)]
    days = ["2001-02-03"] * 50
    mine, other = shifted(people, days), shifted(people, days, b"o" * 32)
    assert len(set(mine)) > 30
    assert (mine != other).sum() > 40
    assert np.abs(shifted(people, days, shift_days=3)).max() <= 3


def test_dates_in_other_writing_and_zones(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        "pid,born,came,left,ill\n1,01.06.1950,01.06.2010,08.06.2010,0\n",
        derive=DERIVE,
        date_format="%d.%m.%Y",
    )
    assert table.values["stay"].tolist() == [7]
    zones = read(
        tmp_path,
        "pid,born,came,left,ill\n1,1950-01-01,2010-06-01T22:00:00-02:00,2010-06-03T00:00:00Z,0\n",
        derive=DERIVE,
    )
    assert zones.values["stay"].tolist() == [1]


@pytest.mark.parametrize(
    ("column", "unit", "cells", "expected"),
    [
        (
            "age",
            None,
            ["89", "90", "101.5", "?", "abc", "999"],
            ["89", "90", "90", "?", "abc", "999"],
        ),
        ("age_at_visit", None, [89.0, 97.0, np.nan], [89.0, 90.0, np.nan]),
        ("ageMonths", "mo", ["1068", "1200"], ["1068", "1080"]),
        ("dosage", None, ["95"], ["95"]),
    ],
)
def test_ages_over_89_are_90(
    column: str, unit: str | None, cells: list[Any], expected: Any
) -> None:
    mapping = ColumnMapping(units={column: unit} if unit else {})
    array = np.array(cells, object if isinstance(cells[0], str) else float)
    capped = AgesCapped(Arrays("x", {column: array}), mapping, DeidentificationRules())
    (chunk,) = capped.chunks([column])
    np.testing.assert_array_equal(chunk[column], np.array(expected, array.dtype))


def test_cells_that_reach_somebody_are_emptied(tmp_path: Path) -> None:
    dictionary = STAY.model_copy(
        update={
            "columns": (
                STAY.columns[0].model_copy(
                    update={"kind": "categorical", "categories": ("a", "b"), "range": None}
                ),
            )
        }
    )
    table = read(
        tmp_path,
        "pid,age,ill\n1,a,0\n2,ada@example.org,0\n3,078-05-1120,1\n4,+44 20 7946 0958,1\n5,c,0\n",
        dictionary,
    )
    assert table.report.columns[0].unmapped_examples == ("c",)
    assert table.report.columns[0].missing == 4
    assert "age: 3 cells with a telephone number, e-mail or the like were emptied" in (
        table.report.deidentified
    )


def test_the_key_is_asked_for_only_when_there_are_dates(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("pid,age,stay,ill\n1,50,3,0\n")

    def secret() -> bytes:
        raise AssertionError("asked for")

    spec = CsvSource(kind="csv", path="x.csv")
    rules = DeidentificationRules()
    assert len(read_records(spec, STAY, tmp_path, rules=rules, secret=secret)) == 1
    with pytest.raises(AssertionError, match="asked for"):
        read_records(
            spec, STAY, tmp_path, rules=DeidentificationRules(dates=("stay",)), secret=secret
        )
