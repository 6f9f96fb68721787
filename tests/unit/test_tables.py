"""Reading records: every oddity is read as said, and reported; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.dictionary import Dictionary
from common.errors import DataError
from common.sources import CsvSource, NpzSource, SklearnSource
from common.tables import Table, concatenate, read_table

HEART = Dictionary.model_validate_json(
    """{
    "label": {"name": "num", "classes": [[0], [1, 2, 3, 4]]},
    "columns": [
      {"name": "age", "kind": "numeric", "range": [20, 80], "optional": false},
      {"name": "chol", "kind": "numeric", "range": [80, 610], "missing": [0]},
      {"name": "sex", "kind": "binary", "categories": [0, 1]},
      {"name": "thal", "kind": "categorical", "categories": [3, 6, 7]}
    ]}"""
)
IDENTIFIED = HEART.model_copy(update={"patient_id": "pid"})
HEADER = ("age", "chol", "sex", "thal", "num")

Read = Callable[..., Table]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def run(text: str, dictionary: Dictionary = HEART, **source: Any) -> Table:
        (tmp_path / "x.csv").write_text(text, encoding="utf-8")
        return read_table(
            CsvSource(kind="csv", path="x.csv", **source),
            dictionary,
            tmp_path,
            labelled=bool(dictionary.label.name != "absent"),
        )

    return run


def test_further_files_follow_the_first(read: Read, tmp_path: Path) -> None:
    header = "age,chol,sex,thal,num\n"
    (tmp_path / "y.csv").write_text("num,thal,sex,chol,age\n0,3,1,210,61\n", encoding="utf-8")
    table = read(header + "60,200,1,3,0\n", also=("y.csv",))
    np.testing.assert_array_equal(table.values["age"], [60, 61])
    (tmp_path / "z.csv").write_text("age,sex,thal,num\n61,1,3,0\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"z\.csv: column 'chol' is in x\.csv, not in this file"):
        read(header + "60,200,1,3,0\n", also=("z.csv",))
    with pytest.raises(DataError, match=r"absent\.csv: no such data file"):
        read(header + "60,200,1,3,0\n", also=("absent.csv",))


def problems(table: Table) -> str:
    return "\n".join(table.report.problems)


def test_a_heart_file_with_every_oddity(read: Read) -> None:
    table = read(
        "63.0,233.0,1.0,6.0,0\n"
        "67, 0 ,0,?,2\n"  # a cholesterol of 0 was not measured
        "?,?,1,3.0,4\n"
        "15,700,2,9,1\n"  # below, above, and two codes no dictionary knows
        "50,abc,-9,7,3\n"
        "50,200,1,7,?\n"  # no label: left out
        "51,201,0,7,9\n",  # a label of no class: left out
        header=HEADER,
    )
    assert len(table) == 5
    assert table.report.unlabelled == 2
    assert table.labels.tolist() == [0, 1, 1, 1, 1]
    np.testing.assert_array_equal(table.values["age"], [63, 67, np.nan, 20, 50])
    np.testing.assert_array_equal(table.values["chol"], [233, np.nan, np.nan, 610, np.nan])
    assert table.values["sex"].tolist() == [1, 0, 1, -1, -1]
    assert table.values["thal"].tolist() == [1, -1, 0, -1, 2]
    age, chol, sex, thal = table.report.columns
    assert (age.missing, age.out_of_range, age.unmapped) == (1, 1, 0)
    assert (chol.missing, chol.out_of_range, chol.unmapped) == (3, 1, 1)
    assert chol.unmapped_examples == ("abc",)
    assert (sex.missing, sex.unmapped, sex.unmapped_examples) == (2, 2, ("-9", "2"))
    assert (thal.missing, thal.unmapped, thal.unmapped_examples) == (2, 1, ("9",))
    assert "age: 1 of 7 values missing, but the dictionary says optional = false" in problems(table)
    assert "chol: 1 values outside the plausible range" in problems(table)
    assert "thal: 1 values not in the dictionary (9)" in problems(table)


def test_an_empty_column_is_missing_throughout(read: Read) -> None:
    table = read("60,,1,3,0\n61,?,0,3,1\n", header=HEADER)
    assert np.isnan(table.values["chol"]).all()
    assert "chol: empty throughout" in problems(table)


def test_infinity_is_out_of_range_and_never_passes(read: Read) -> None:
    table = read("inf,1e999,1,3,0\n-inf,100,1,3,1\n", header=HEADER)
    assert table.values["age"].tolist() == [80, 20]
    assert table.values["chol"].tolist() == [610, 100]
    assert [one.out_of_range for one in table.report.columns[:2]] == [2, 1]


def test_renamed_and_recoded_columns_read_alike(read: Read) -> None:
    plain = read("age,chol,sex,thal,num\n60,200,1,3,0\n61,201,0,7,1\n")
    other = read(
        "sex,years,outcome,chol,thal\nM,60,no,200,normal\nF,61,yes,201,7\n",
        rename={"age": "years", "num": "outcome"},
        recode={"sex": {"M": 1, "F": 0}, "thal": {"normal": 3}, "num": {"no": 0, "yes": 1}},
    )
    for name in plain.values:
        np.testing.assert_array_equal(plain.values[name], other.values[name])
    np.testing.assert_array_equal(plain.labels, other.labels)


def test_an_absent_column_names_the_nearest(read: Read) -> None:
    with pytest.raises(DataError, match=r"column 'chol' not found; did you mean 'cholest'\?"):
        read("age,cholest,sex,thal,num\n60,200,1,3,0\n")


@pytest.mark.parametrize(
    "text",
    [
        "age,chol,sex,thal,num\n60,200,1,3,0,\n61,200,1,3,0,\n",  # a comma at every end
        "age,chol,sex,thal,num\n9,60,200,1,3,0\n9,61,200,1,3,0\n",  # a column without a name
        "age,chol,sex,thal,num\n60,200,1,3,0\n61,200,1,3,0,9\n",
    ],
)
def test_columns_are_never_shifted(read: Read, text: str) -> None:
    """pandas alone would take the first column as an index and read age from cholesterol."""
    with pytest.raises(DataError, match="cells|cannot be read"):
        read(text)


def test_fewer_header_names_than_columns_are_refused(read: Read) -> None:
    with pytest.raises(DataError, match="more cells than the header has names"):
        read("1,60,200,1,3,0\n", header=HEADER)


def test_nothing_readable_is_one_line(read: Read, tmp_path: Path) -> None:
    for text, says in (
        ("", "cannot be read as CSV"),
        ("age,chol,sex,thal,num\n", "found none in 0 rows"),
        ("age,chol,sex,thal,num\n60,200,1,3,9\n", "found none in 1 rows"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            read(text)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="--data FOLDER"):
        read_table(CsvSource(kind="csv", path="absent.csv"), HEART, tmp_path)


def test_patients_are_trimmed_text_and_never_absent(read: Read) -> None:
    header = "pid,age,chol,sex,thal,num\n"
    table = read(header + "7 ,60,200,1,3,0\n 7,61,200,1,3,0\n8,62,200,1,3,1\n", IDENTIFIED)
    assert table.patients.tolist() == ["7", "7", "8"]
    assert table.report.patients == 2
    with pytest.raises(DataError, match="found 1 rows without"):
        read(header + "7,60,200,1,3,0\n?,61,200,1,3,0\n", IDENTIFIED)


def test_without_identifier_every_row_is_another_patient(read: Read) -> None:
    table = read("60,200,1,3,0\n60,200,1,3,0\n", header=HEADER)
    assert len(set(table.patients)) == 2


# Arrays

IMAGES = Dictionary.model_validate_json(
    """{"label": {"name": "y", "classes": [[0], [1], [2]]}, "patient_id": "",
        "columns": [{"name": "x", "kind": "image", "shape": [4, 6]}]}"""
)


def images(folder: Path, dictionary: Dictionary = IMAGES, **arrays: Any) -> Table:
    np.savez(folder / "x.npz", **arrays)
    return read_table(NpzSource(kind="npz", path="x.npz"), dictionary, folder)


def test_images_are_grey_values_from_0_to_1(tmp_path: Path) -> None:
    pixels = np.arange(5 * 24, dtype=np.uint8).reshape(5, 4, 6)
    labels = np.array([[0], [1], [2], [9], [0]])  # as MedMNIST has them: [rows, 1]
    table = images(tmp_path, x=pixels, y=labels)
    assert table.labels.tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(table.values["x"], pixels[[0, 1, 2, 4]] / 255, rtol=1e-6)
    assert table.values["x"].dtype == np.float32
    deep = images(tmp_path, x=pixels.astype(np.uint16) * 257, y=labels)
    np.testing.assert_array_equal(deep.values["x"], table.values["x"])


def test_odd_pixels_are_held_within_the_range_and_reported(tmp_path: Path) -> None:
    pixels = np.full((2, 4, 6), 0.5)
    pixels[0, 0, :3] = [np.nan, np.inf, -3]
    table = images(tmp_path, x=pixels, y=np.array([0, 1]))
    assert table.values["x"][0, 0].tolist() == [0, 1, 0, 0.5, 0.5, 0.5]
    assert (table.report.columns[0].missing, table.report.columns[0].out_of_range) == (1, 1)


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected images of shape \(4, 6\), found \(6, 4\)"):
        images(tmp_path, x=np.zeros((2, 6, 4)), y=np.zeros(2))


def test_arrays_of_other_lengths_are_refused_or_ignored(tmp_path: Path) -> None:
    unrelated = np.zeros(99)  # the validation part of the same file, say
    table = images(tmp_path, a=unrelated, x=np.zeros((3, 4, 6)), y=np.zeros(3))
    assert (len(table), table.report.rows, len(table.patients)) == (3, 3, 3)
    with pytest.raises(DataError, match=r"found lengths \[2, 3\]"):
        images(tmp_path, x=np.zeros((3, 4, 6)), y=np.zeros(2))


def test_an_npz_of_a_table_may_hold_text(tmp_path: Path) -> None:
    table = images(
        tmp_path,
        HEART,
        age=np.array(["60", "?", "x"]),
        chol=np.array([0, 200, 210]),
        sex=np.array([0.0, 1.0, np.nan]),
        thal=np.array(["3", "7", "?"]),
        num=np.array([0, 3, 4]),
    )
    np.testing.assert_array_equal(table.values["age"], [60, np.nan, np.nan])
    np.testing.assert_array_equal(table.values["chol"], [np.nan, 200, 210])
    assert table.values["sex"].tolist() == [0, 1, -1]
    assert table.report.columns[0].unmapped_examples == ("x",)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"not an archive at all"])
def test_a_damaged_archive_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as an npz"):
        read_table(NpzSource(kind="npz", path="x.npz"), IMAGES, tmp_path)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="plain arrays"):
        images(tmp_path, x=np.array([{"an": "object"}], dtype=object), y=np.zeros(1))


def test_concatenated_tables_keep_rows_and_patients(read: Read) -> None:
    header = "pid,age,chol,sex,thal,num\n"
    first = read(header + "1,60,200,1,3,0\n", IDENTIFIED)
    second = read(header + "2,61,0,0,7,1\n3,62,210,1,?,1\n", IDENTIFIED)
    both = concatenate([first, second])
    assert both.patients.tolist() == ["1", "2", "3"]
    np.testing.assert_array_equal(both.values["chol"], [200, np.nan, 210])
    assert both.report.patients == 3


def test_scikit_learn_data_are_read_and_others_named(tmp_path: Path) -> None:
    source = SklearnSource(kind="sklearn", path="breast-cancer")
    with pytest.raises(DataError, match="did you mean 'breast_cancer'"):
        read_table(source, HEART, tmp_path)
