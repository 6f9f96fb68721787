"""Reading a source: the one Protocol, and the tables that both sides read.

A source gives its rows in chunks, so that a table larger than memory passes through, and of each
only the columns that are asked for. It knows nothing of the dictionary.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.errors import DataError, nearest
from common.sources import CsvSource, NpzSource, ParquetSource, SklearnSource

Chunk = Mapping[str, NDArray[Any]]

_SKLEARN = {"breast_cancer"}
_CHUNK_CELLS = 500_000
_MOST_ROWS, _FEWEST_ROWS = 50_000, 100


def chunk_rows(columns: int) -> int:
    """Rows a chunk, so that it takes some tens of MB however wide the table is."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS, _CHUNK_CELLS // max(1, columns)))


class Source(Protocol):
    """Somewhere with records."""

    @property
    def origin(self) -> str:
        """Its name in a message."""

    @property
    def patient(self) -> str:
        """The column that says whose a row is, when the source itself knows; else empty."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names it can be asked for."""

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Its rows, in an order that stays the same, part by part: the columns ``wanted``."""

    def notes(self) -> tuple[str, ...]:
        """After reading: what was skipped and why, one line each, with what to do."""


def open_table(spec: CsvSource | ParquetSource | NpzSource | SklearnSource, folder: Path) -> Source:
    """The table that ``spec`` names below ``folder``."""
    if isinstance(spec, CsvSource):
        return CsvTable(spec, folder)
    if isinstance(spec, ParquetSource):
        return ParquetTable(spec, folder)
    if isinstance(spec, NpzSource):
        return _npz(spec, folder)
    return _sklearn(spec)


def needed(module: str, extra: str, what: str) -> Any:
    """An optional library, or the line that installs it."""
    try:
        return import_module(module)
    except ImportError:
        raise DataError(
            f"{what} needs {module.partition('.')[0]}, which is not installed; "
            f"run `pip install 'consilium[{extra}]'`"
        ) from None


def existing(folder: Path, path: str) -> Path:
    """The file ``path`` below ``folder``; raises DataError when there is none."""
    found = folder / path
    if not found.is_file():
        raise DataError(
            f"{found}: no such data file; name the folder that holds it with --data FOLDER"
        )
    return found


class CsvTable:
    """Text, chunk by chunk. Whole rows are parsed, so that a cell too many never goes unseen."""

    patient = ""

    def __init__(self, spec: CsvSource, folder: Path, *, rows: int | None = None) -> None:
        self._spec = spec
        paths = [existing(folder, path) for path in (spec.path, *spec.also)]
        self._files = [(path, tuple(spec.header) or self._header(path)) for path in paths]
        self.origin = spec.path
        self.columns = self._files[0][1]
        self._rows = rows or chunk_rows(len(self.columns))

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Cells as text."""
        for path, columns in self._files:
            absent = set(wanted) - set(columns)
            if absent:
                raise DataError(
                    f"{path}: column {min(absent)!r} is in {self.origin}, not in this file; export "
                    f"all with the same columns"
                )
            with self._parse(path, chunksize=self._rows) as reading:
                while (frame := self._next(path, reading)) is not None:
                    yield {name: frame[name].to_numpy(dtype=object) for name in wanted}

    def notes(self) -> tuple[str, ...]:
        """Nothing: every row is read."""
        return ()

    def _header(self, path: Path) -> tuple[str, ...]:
        frame = self._parse(path, nrows=0)
        return tuple(str(name) for name in frame.columns)

    def _next(self, path: Path, reading: Any) -> pd.DataFrame | None:
        try:
            with warnings.catch_warnings():
                # Rows longer than the header: pandas would shift or drop columns, with a warning.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                return next(reading, None)
        except pd.errors.ParserWarning:
            raise DataError(
                f"{path}: rows have more cells than the header has names; name every column"
            ) from None
        except (ValueError, OSError, EOFError, zlib.error, LookupError) as error:
            raise _unreadable(path, error) from None

    def _parse(self, path: Path, **options: Any) -> Any:
        spec = self._spec
        try:
            return pd.read_csv(
                path,
                header=None if spec.header else 0,
                names=list(spec.header) or None,
                index_col=False,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
                sep=spec.delimiter,
                encoding=spec.encoding,
                **options,
            )
        except (ValueError, OSError, EOFError, zlib.error, LookupError) as error:
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{path}: cannot be read as CSV: {reason}; check delimiter and encoding")


class ParquetTable:
    """A Parquet file or a folder of them: only the columns asked for are ever decoded."""

    patient = ""

    def __init__(self, spec: ParquetSource, folder: Path, *, rows: int | None = None) -> None:
        self._parquet = needed("pyarrow.parquet", "parquet", "kind = 'parquet'")
        self._arrow = needed("pyarrow", "parquet", "kind = 'parquet'")
        self._rows, self.origin = rows, spec.path
        path = folder / spec.path
        self._files = (
            sorted(path.glob("*.parquet")) if path.is_dir() else [existing(folder, spec.path)]
        )
        if not self._files:
            raise DataError(f"{path}: expected a folder with *.parquet files, found none")
        self.columns = tuple(self._open(self._files[0]).schema_arrow.names)

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Cells in the file's own types; missing ones as None or NaN."""
        for path in self._files:
            file = self._open(path)
            absent = set(wanted) - set(file.schema_arrow.names)
            if absent:
                raise DataError(
                    f"{path}: column {min(absent)!r} is in other files of this folder, not in "
                    f"this one; export all with the same columns"
                )
            try:
                rows = self._rows or chunk_rows(len(wanted))
                for batch in file.iter_batches(batch_size=rows, columns=list(wanted)):
                    yield {
                        name: batch.column(name).to_numpy(zero_copy_only=False) for name in wanted
                    }
            except (self._arrow.ArrowException, OSError) as error:
                raise DataError(f"{path}: cannot be read as Parquet: {_first(error)}") from None

    def notes(self) -> tuple[str, ...]:
        """Nothing: every row is read."""
        return ()

    def _open(self, path: Path) -> Any:
        try:
            return self._parquet.ParquetFile(path)
        except (self._arrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {_first(error)}") from None


class Arrays:
    """Columns that are in memory already, as one chunk; [rows] or [rows, height, width]."""

    patient = ""

    def __init__(self, origin: str, arrays: Mapping[str, Any]) -> None:
        self.origin, self._arrays = origin, arrays
        self.columns = tuple(arrays)

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """All rows at once; raises DataError when the columns differ in length."""
        try:
            found = {name: self._arrays[name] for name in wanted}
        except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(
                f"{self.origin}: cannot be read as an npz of plain arrays: {error}"
            ) from None
        lengths = {len(column) for column in found.values()}
        if len(lengths) > 1:
            raise DataError(
                f"{self.origin}: expected columns of one length, found lengths {sorted(lengths)}"
            )
        yield found

    def notes(self) -> tuple[str, ...]:
        """Nothing: every row is read."""
        return ()


class _LazyNpz(Mapping[str, NDArray[Any]]):
    """An npz archive opened for one array at a time; objects are never unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            self._names = list(arrays.files)

    def __getitem__(self, name: str) -> NDArray[Any]:
        with self._path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _npz(spec: NpzSource, folder: Path) -> Arrays:
    path = existing(folder, spec.path)
    try:
        return Arrays(str(path), _LazyNpz(path))
    except (
        ValueError,
        OSError,
        TypeError,
        AttributeError,
        EOFError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(f"{path}: cannot be read as an npz of plain arrays: {error}") from None


def _sklearn(spec: SklearnSource) -> Arrays:
    if spec.path not in _SKLEARN:
        raise DataError(
            f"unknown scikit-learn data set {spec.path!r}; {nearest(spec.path, _SKLEARN)}"
        )
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  (slow to import)

    bunch = load_breast_cancer()
    columns: dict[str, NDArray[Any]] = {
        str(name): bunch.data[:, index] for index, name in enumerate(bunch.feature_names)
    }
    columns["diagnosis"] = np.array([str(bunch.target_names[t]) for t in bunch.target], object)
    columns["patient"] = np.array([f"wdbc-{row}" for row in range(len(bunch.target))], object)
    return Arrays(spec.path, columns)


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
