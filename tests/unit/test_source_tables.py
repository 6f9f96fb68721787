"""CSV and Parquet as hospitals have them: in chunks, in other words and other units."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.sources.reading import read_public
from common.columns import KINDS, ColumnReport, NumericReading
from common.dictionary import Column, Dictionary
from common.errors import DataError
from common.readers import CsvTable, ParquetTable, chunk_rows
from common.sources import ColumnMapping, CsvSource, ParquetSource
from common.tables import Table, harmonise, read_table

LAB = Dictionary.model_validate_json(
    """{"patient_id": "pid", "label": {"name": "ill", "classes": [["no"], ["yes"]]},
        "columns": [
          {"name": "chol", "kind": "numeric", "range": [80, 610], "unit": "mg/dL", "missing": [0]},
          {"name": "temp", "kind": "numeric", "range": [30, 44], "unit": "Cel"},
          {"name": "sex", "kind": "binary", "categories": ["f", "m"]}]}"""
)


def csv(folder: Path, text: str, **spec: Any) -> CsvSource:
    (folder / "x.csv").write_text(text, encoding=spec.get("encoding", "utf-8"))
    return CsvSource.model_validate_json(json.dumps({"kind": "csv", "path": "x.csv", **spec}))


def assert_alike(one: Table, other: Table) -> None:
    for name, column in one.values.items():
        np.testing.assert_array_equal(column, other.values[name])
        assert column.dtype == other.values[name].dtype
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.patients.tolist() == other.patients.tolist()
    assert one.report == other.report


def test_another_hospitals_export_reads_alike(tmp_path: Path) -> None:
    plain = read_public(
        csv(tmp_path, "pid,chol,temp,sex,ill\n1,200,37,f,no\n2,0,38.5,m,yes\n"), LAB, tmp_path
    )
    german = csv(
        tmp_path,
        "Fall;Cholesterin;Temperatur;Geschlecht;krank;Straße\n"
        "1;5,1706;98,6;weiblich;nein;x\n2;0;101,3;männlich;ja;y\n",
        delimiter=";",
        decimal=",",
        encoding="latin-1",
        rename={
            "pid": "Fall",
            "chol": "Cholesterin",
            "temp": "Temperatur",
            "sex": "Geschlecht",
            "ill": "krank",
        },
        recode={"sex": {"weiblich": "f", "männlich": "m"}, "ill": {"ja": "yes", "nein": "no"}},
        units={"chol": "mmol/L", "temp": "degF"},
        factor={"chol": 38.67},
    )
    other = read_public(german, LAB, tmp_path)
    np.testing.assert_allclose(other.values["chol"], plain.values["chol"], rtol=1e-3)
    np.testing.assert_allclose(other.values["temp"], plain.values["temp"], rtol=1e-6)
    assert other.values["sex"].tolist() == plain.values["sex"].tolist() == [0, 1]
    chol, temp, sex = other.report.columns
    assert (chol.source, chol.conversion) == ("Cholesterin", "mmol/L × 38.67 = mg/dL")
    assert temp.conversion == "degF × 0.555556 -17.7778 = Cel"
    assert sex.conversion == "2 values recoded"


def test_a_point_that_may_mark_thousands_is_reported(tmp_path: Path) -> None:
    spec = csv(tmp_path, "pid;chol;temp;sex;ill\n1;1.200;37,5;f;no\n", delimiter=";", decimal=",")
    table = read_public(spec, LAB, tmp_path)
    assert np.isnan(table.values["chol"]).all()
    assert any("1.200" in one and "recode" in one for one in table.report.problems)


def test_mass_and_amount_need_a_factor(tmp_path: Path) -> None:
    spec = csv(tmp_path, "pid,chol,temp,sex,ill\n1,5,37,f,no\n", units={"chol": "mmol/L"})
    with pytest.raises(DataError, match=r"units.chol: .*substance.*factor = \{ chol"):
        read_public(spec, LAB, tmp_path)


def test_labels_of_no_class_are_named(tmp_path: Path) -> None:
    spec = csv(tmp_path, "pid,chol,temp,sex,ill\n1,200,37,f,no\n2,200,37,f,perhaps\n3,200,37,f,\n")
    table = read_public(spec, LAB, tmp_path)
    assert table.report.unlabelled == 2
    assert [one for one in table.report.problems if "perhaps" in one] == [
        "ill: 1 rows have values of no class (perhaps) and are left out; recode them if they are "
        "meant"
    ]


cells = st.sampled_from(["", "?", "0", "120", "1e3", "-4", "abc", "37.5", "nan", "f", "m", " f "])
rows = st.lists(
    st.tuples(cells, cells, cells, st.sampled_from(["no", "yes", "", "9"])), min_size=1, max_size=25
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows, size=st.integers(1, 7))
def test_chunks_of_any_size_give_one_table(tmp_path: Path, rows: list[Any], size: int) -> None:
    lines = [",".join([f"p{index // 2}", *row]) for index, row in enumerate(rows)]
    spec = csv(tmp_path, "\n".join(["pid,chol,temp,sex,ill", *lines]) + "\n")
    try:
        whole = read_table(spec, LAB, tmp_path)
    except DataError:
        with pytest.raises(DataError, match="found none"):
            harmonise(CsvTable(spec, tmp_path, rows=size), spec, LAB)
        return
    assert_alike(whole, harmonise(CsvTable(spec, tmp_path, rows=size), spec, LAB))
    low, high = LAB.columns[0].range or (0, 0)
    seen = whole.values["chol"][~np.isnan(whole.values["chol"])]
    assert ((seen >= low) & (seen <= high)).all()


def test_chunks_stay_small_however_wide_the_table() -> None:
    assert chunk_rows(3) == 50_000
    assert chunk_rows(1_000) == 500
    assert chunk_rows(10**7) == 100


class TimeAndEvent:
    """A kind of column that reads two cells of a row: what a new kind has to provide."""

    def __init__(self, column: Column, mapping: ColumnMapping) -> None:
        self._parts = [NumericReading(column, mapping), NumericReading(column, mapping)]
        self.names = (column.name, f"{column.name}_seen")

    def read(self, *cells: Any) -> Any:
        return np.stack([part.read(one) for part, one in zip(self._parts, cells, strict=True)], 1)

    def report(self) -> ColumnReport:
        return self._parts[0].report()


def test_a_new_kind_of_column_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "numeric", TimeAndEvent)
    survival = Dictionary.model_validate_json(
        """{"label": {"name": "ill", "classes": [["no"], ["yes"]]},
            "columns": [{"name": "days", "kind": "numeric", "range": [0, 900]}]}"""
    )
    spec = csv(tmp_path, "days,seen,ill\n5,1,no\n9,0,yes\n,1,no\n", rename={"days_seen": "seen"})
    table = harmonise(CsvTable(spec, tmp_path, rows=2), spec, survival)
    np.testing.assert_array_equal(table.values["days"], [[5, 1], [9, 0], [np.nan, 1]])


# Parquet

FRAME = pd.DataFrame(
    {
        "pid": [1, 1, 2, 3],
        "name": ["A", "A", "B", "C"],
        "chol": [200.0, None, 0.0, 700.0],
        "temp": [37, 38, 39, 40],
        "sex": ["f", "m", None, "x"],
        "ill": ["no", "yes", "yes", "no"],
    }
)


def parquet(folder: Path, frame: pd.DataFrame, name: str = "x.parquet") -> ParquetSource:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (consilium[parquet])")
    frame.to_parquet(folder / name)
    return ParquetSource(kind="parquet", path=name)


def test_parquet_reads_as_csv_does(tmp_path: Path) -> None:
    spec = parquet(tmp_path, FRAME)
    columnar = read_public(spec, LAB, tmp_path)
    text = csv(tmp_path, FRAME.to_csv(index=False))
    assert_alike(read_public(text, LAB, tmp_path), columnar)
    assert columnar.patients.tolist() == ["1", "1", "2", "3"]
    small = harmonise(ParquetTable(spec, tmp_path, rows=1), spec, LAB)
    np.testing.assert_array_equal(small.values["chol"], [200, np.nan, np.nan, 610])


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    parquet(tmp_path, FRAME.iloc[:2], "parts/1.parquet")
    parquet(tmp_path, FRAME.iloc[2:], "parts/2.parquet")
    spec = ParquetSource(kind="parquet", path="parts")
    assert len(read_public(spec, LAB, tmp_path)) == 4
    parquet(tmp_path, FRAME.iloc[2:].drop(columns="sex"), "parts/3.parquet")
    with pytest.raises(DataError, match="'sex' is in other files of this folder, not in this one"):
        read_public(spec, LAB, tmp_path)


def test_dates_in_parquet_are_shifted_and_intervals_hold(tmp_path: Path) -> None:
    frame = FRAME.assign(
        came=pd.to_datetime(["2020-01-01"] * 4), left=pd.to_datetime(["2020-03-01"] * 4)
    ).drop(columns="temp")
    parquet(tmp_path, frame)
    spec = ParquetSource.model_validate_json(
        json.dumps(
            {
                "kind": "parquet",
                "path": "x.parquet",
                "derive": {"temp": {"start": "came", "end": "left"}},
            }
        )
    )
    table = read_public(spec, LAB, tmp_path)
    assert (table.values["temp"] == 44).all()  # 60 days, clipped to the range
    assert "came, left" in "".join(table.report.deidentified)


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    spec = parquet(tmp_path, FRAME)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet") as caught:
        read_public(spec, LAB, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_its_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow.*pip install 'consilium\[parquet\]'"):
        read_public(ParquetSource(kind="parquet", path="x.parquet"), LAB, tmp_path)
