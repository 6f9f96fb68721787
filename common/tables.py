"""Reading records in the dictionary's terms, and saying plainly what did not fit."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.dictionary import Column, Dictionary, Scalar
from common.errors import DataError, nearest
from common.sources import SourceSpec

_SKLEARN = {"breast_cancer"}


@dataclass(frozen=True)
class ColumnReport:
    """What was found in one column: counts of rows."""

    name: str
    missing: int = 0
    out_of_range: int = 0
    unmapped: int = 0
    unmapped_examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableReport:
    """What a hospital sees of its own data before a study; it never leaves the hospital."""

    rows: int
    patients: int
    unlabelled: int
    columns: tuple[ColumnReport, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Records in the dictionary's terms.

    ``values``: numeric columns as float64 [rows] with NaN for missing; binary and categorical as
    category indices int64 [rows] with -1 for missing; images as float32 [rows, height, width].
    ``labels``: class indices int64 [rows]; -1 throughout for public records without labels.
    ``patients``: the identifier of each row's patient, as text [rows].
    """

    dictionary: Dictionary
    values: Mapping[str, NDArray[Any]]
    labels: NDArray[np.int64]
    patients: NDArray[np.object_]
    report: TableReport = field(compare=False)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.labels)

    @cached_property
    def by_patient(self) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
        """The patients in the order of their first row, and each row's patient among them."""
        index: dict[str, int] = {}
        owners = np.array([index.setdefault(one, len(index)) for one in self.patients], np.int64)
        return np.array(list(index), dtype=object), owners

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all rows; only ever mixed into a keyed derivation, never sent."""
        running = hashlib.sha256()
        running.update(f"{len(self)}|".encode())
        for name in sorted(self.values):
            running.update(np.ascontiguousarray(self.values[name]).tobytes())
        running.update(self.labels.tobytes())
        running.update(self.by_patient[1].tobytes())
        return running.hexdigest()

    def take(self, rows: NDArray[np.int64]) -> Table:
        """The table of these rows, in this order."""
        return Table(
            dictionary=self.dictionary,
            values={name: column[rows] for name, column in self.values.items()},
            labels=self.labels[rows],
            patients=self.patients[rows],
            report=self.report,
        )


def concatenate(tables: list[Table]) -> Table:
    """The rows of several tables of one dictionary, one after the other."""
    first = tables[0]
    patients = np.concatenate([table.patients for table in tables])
    return Table(
        dictionary=first.dictionary,
        values={
            name: np.concatenate([table.values[name] for table in tables]) for name in first.values
        },
        labels=np.concatenate([table.labels for table in tables]),
        patients=patients,
        report=TableReport(
            rows=len(patients), patients=len(set(patients)), unlabelled=0, columns=()
        ),
    )


def read_table(
    source: SourceSpec, dictionary: Dictionary, folder: Path, *, labelled: bool = True
) -> Table:
    """Read ``source`` below ``folder``; rows without a known label are left out and counted.

    Raises DataError when a file or column is absent; what is merely odd in a cell is reported.
    """
    raw = _READERS[source.kind](source, folder)
    values: dict[str, NDArray[Any]] = {}
    reports = []
    for column in dictionary.columns:
        cells = _cells(raw, source, column.name)
        values[column.name], report = _READ_KIND[column.kind](cells, column, source)
        reports.append(report)
    rows = len(values[dictionary.columns[0].name])
    if labelled:
        labels = _labels(_cells(raw, source, dictionary.label.name), dictionary, source)
    else:
        labels = np.full(rows, -1, dtype=np.int64)
    if dictionary.patient_id:
        patients = _patients(_cells(raw, source, dictionary.patient_id), source)
    else:
        patients = np.array([f"row-{row}" for row in range(rows)], dtype=object)
    lengths = {len(column) for column in (*values.values(), labels, patients)}
    if len(lengths) > 1:
        raise DataError(
            f"{source.path}: expected columns of one length, found lengths {sorted(lengths)}"
        )
    keep = np.flatnonzero(labels >= 0) if labelled else np.arange(rows)
    if len(keep) == 0:
        raise DataError(
            f"{source.path}: expected records with a known {dictionary.label.name!r}, found none "
            f"in {rows} rows; check the label's classes in the dictionary"
        )
    report_all = TableReport(
        rows=rows,
        patients=len(set(patients)),
        unlabelled=rows - len(keep),
        columns=tuple(reports),
        problems=tuple(_problems(reports, dictionary, rows)),
    )
    return Table(dictionary, values, labels, patients, report_all).take(keep)


def _problems(reports: list[ColumnReport], dictionary: Dictionary, rows: int) -> list[str]:
    columns = {column.name: column for column in dictionary.columns}
    found = []
    for report in reports:
        if report.missing and not columns[report.name].optional:
            found.append(
                f"{report.name}: {report.missing} of {rows} values missing, but the dictionary "
                f"says optional = false; they are read as the typical value"
            )
        if report.missing == rows:
            found.append(f"{report.name}: empty throughout; the model sees it as not measured")
        if report.out_of_range:
            found.append(
                f"{report.name}: {report.out_of_range} values outside the plausible range; "
                f"they are clipped to it"
            )
        if report.unmapped:
            found.append(
                f"{report.name}: {report.unmapped} values not in the dictionary "
                f"({', '.join(report.unmapped_examples)}); they are read as missing"
            )
    return found


def _read_csv(source: SourceSpec, folder: Path) -> dict[str, NDArray[Any]]:
    path = _existing(source, folder)
    try:
        with warnings.catch_warnings():
            # Rows longer than the header: pandas would shift or drop columns, with a warning.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                header=None if source.header else 0,
                names=list(source.header) or None,
                index_col=False,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
            )
    except pd.errors.ParserWarning:
        raise DataError(
            f"{path}: rows have more cells than the header has names; name every column"
        ) from None
    except (ValueError, OSError, EOFError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as CSV: {reason}") from None
    return {str(name): frame[name].to_numpy(dtype=object) for name in frame.columns}


def _read_npz(source: SourceSpec, folder: Path) -> dict[str, NDArray[Any]]:
    path = _existing(source, folder)
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as an npz of plain arrays: {error}") from None


def _read_sklearn(source: SourceSpec, folder: Path) -> dict[str, NDArray[Any]]:  # noqa: ARG001
    if source.path not in _SKLEARN:
        raise DataError(
            f"unknown scikit-learn data set {source.path!r}; {nearest(source.path, _SKLEARN)}"
        )
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  (slow to import)

    bunch = load_breast_cancer()
    columns: dict[str, NDArray[Any]] = {
        str(name): bunch.data[:, index] for index, name in enumerate(bunch.feature_names)
    }
    columns["diagnosis"] = np.array([str(bunch.target_names[t]) for t in bunch.target], object)
    columns["patient"] = np.array([f"wdbc-{row}" for row in range(len(bunch.target))], object)
    return columns


def _existing(source: SourceSpec, folder: Path) -> Path:
    path = folder / source.path
    if not path.is_file():
        raise DataError(
            f"{path}: no such data file; name the folder that holds it with --data FOLDER"
        )
    return path


def _cells(raw: Mapping[str, NDArray[Any]], source: SourceSpec, name: str) -> NDArray[Any]:
    wanted = source.rename.get(name, name)
    if wanted not in raw:
        raise DataError(
            f"{source.path}: column {wanted!r} not found; {nearest(wanted, raw)}, or map it with "
            f'rename = {{ {name} = "the file\'s name for it" }}'
        )
    return raw[wanted]


def _key(value: Any) -> str:
    """One spelling for the same value: 3, 3.0, "3" and " 3.0" are alike."""
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else repr(number)


def _read_numeric(
    cells: NDArray[Any], column: Column, source: SourceSpec
) -> tuple[NDArray[np.float64], ColumnReport]:
    assert column.range is not None  # noqa: S101  (the dictionary refuses it otherwise)
    blanks = set(source.missing)
    absent_codes = {_key(code) for code in column.missing}
    if cells.dtype.kind in "OSU":
        text = pd.Series(cells).astype(str).str.strip()
        is_blank = text.isin(blanks).to_numpy()
        numbers = pd.to_numeric(text.mask(is_blank), errors="coerce").to_numpy(dtype=float)
    else:
        numbers = cells.astype(np.float64)
        is_blank = np.isnan(numbers)
        text = pd.Series(numbers).astype(str)
    unmapped = np.isnan(numbers) & ~is_blank
    if absent_codes:
        coded = np.array([_key(number) in absent_codes for number in numbers])
        numbers = np.where(coded, np.nan, numbers)
    low, high = column.range
    outside = (numbers < low) | (numbers > high)
    return np.clip(numbers, low, high), ColumnReport(
        name=column.name,
        missing=int(np.isnan(numbers).sum()),
        out_of_range=int(outside.sum()),
        unmapped=int(unmapped.sum()),
        unmapped_examples=tuple(sorted(set(text[unmapped]))[:3]),
    )


def _read_category(
    cells: NDArray[Any], column: Column, source: SourceSpec
) -> tuple[NDArray[np.int64], ColumnReport]:
    index = {_key(category): code for code, category in enumerate(column.categories)}
    recode = {_key(raw): _key(value) for raw, value in source.recode.get(column.name, {}).items()}
    absent = {_key(code) for code in column.missing} | set(source.missing)
    keys = [_key(cell) for cell in cells]
    keys = [recode.get(key, key) for key in keys]
    codes = np.array([index.get(key, -1) for key in keys], dtype=np.int64)
    unmapped = {row: key for row, key in enumerate(keys) if codes[row] < 0 and key not in absent}
    return codes, ColumnReport(
        name=column.name,
        missing=int((codes < 0).sum()),
        unmapped=len(unmapped),
        unmapped_examples=tuple(sorted(set(unmapped.values()))[:3]),
    )


def _read_image(
    cells: NDArray[Any], column: Column, source: SourceSpec
) -> tuple[NDArray[np.float32], ColumnReport]:
    if column.shape is None or cells.shape[1:] != column.shape:
        raise DataError(
            f"{source.path}: column {column.name!r} expected images of shape {column.shape}, "
            f"found {cells.shape[1:]}"
        )
    scale = float(np.iinfo(cells.dtype).max) if cells.dtype.kind in "ui" else 1.0
    pixels = cells.astype(np.float64) / scale
    absent = np.isnan(pixels)
    outside = (pixels < 0) | (pixels > 1)
    return np.clip(np.nan_to_num(pixels, nan=0.0), 0.0, 1.0).astype(np.float32), ColumnReport(
        name=column.name,
        missing=int(absent.any(axis=(1, 2)).sum()),
        out_of_range=int(outside.any(axis=(1, 2)).sum()),
    )


def _patients(cells: NDArray[Any], source: SourceSpec) -> NDArray[np.object_]:
    """Each row's patient. A row of nobody is refused: it could belong to a patient twice."""
    names = np.array([str(cell).strip() for cell in cells.astype(str)], dtype=object)
    nameless = int(np.isin(names, list(source.missing)).sum())
    if nameless:
        raise DataError(
            f"{source.path}: expected a patient identifier in every row, found {nameless} rows "
            f"without; whose records they are decides what protects them"
        )
    return names


def _labels(cells: NDArray[Any], dictionary: Dictionary, source: SourceSpec) -> NDArray[np.int64]:
    index: dict[str, int] = {}
    for number, group in enumerate(dictionary.label.classes):
        index.update({_key(value): number for value in group})
    raw_recode: Mapping[str, Scalar] = source.recode.get(dictionary.label.name, {})
    recode = {_key(raw): _key(value) for raw, value in raw_recode.items()}
    keys = [_key(cell) for cell in (cells if cells.ndim == 1 else cells[:, 0])]
    return np.array([index.get(recode.get(key, key), -1) for key in keys], dtype=np.int64)


_READERS = {"csv": _read_csv, "npz": _read_npz, "sklearn": _read_sklearn}
_READ_KIND: dict[str, Any] = {
    "numeric": _read_numeric,
    "binary": _read_category,
    "categorical": _read_category,
    "image": _read_image,
}
