"""Records in the dictionary's terms, and saying plainly what did not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.columns import KINDS, ColumnReport, Reading, absent_words
from common.derive import Derived
from common.dictionary import Dictionary
from common.errors import DataError, nearest
from common.outcomes import outcome_of
from common.readers import Chunk, Source, open_table
from common.sources import ColumnMapping, TableSource


@dataclass(frozen=True)
class TableReport:
    """What a hospital sees of its own data before a study; it never leaves the hospital.

    ``problems``: one line each, with what is done and what may be done about it.
    ``deidentified``: what was removed or changed before anything else saw a row.
    """

    rows: int
    patients: int
    unlabelled: int
    columns: tuple[ColumnReport, ...]
    problems: tuple[str, ...] = ()
    deidentified: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Records in the dictionary's terms.

    ``values``: numeric columns as float32 [rows] with NaN for missing; binary and categorical as
    category indices [rows] (the smallest integer type) with -1 for missing; images as float32
    [rows, height, width]; texts as token ids int32 [rows, length], 0 behind a text's end; molecules
    as canonical SMILES, bytes [rows].
    ``labels`` [rows, …]: as the dictionary's kind of label has them; unknown throughout for public
    records.
    ``patients``: the identifier of each row's patient, as text [rows]. A molecule is its own: all
    records of one compound are one privacy unit, unless the dictionary or the source names others.
    """

    dictionary: Dictionary
    values: Mapping[str, NDArray[Any]]
    labels: NDArray[Any]
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


def compounds_of(table: Table) -> list[str]:
    """The compound of each patient, by its first record, in the order of ``by_patient``."""
    owners = table.by_patient[1]
    _, first = np.unique(owners, return_index=True)
    structures = table.values[table.dictionary.columns[0].name]
    return [one.decode() for one in structures[first]]


def read_table(
    source: TableSource, dictionary: Dictionary, folder: Path, *, labelled: bool = True
) -> Table:
    """Read a public table below ``folder``. A hospital's own go through `client.sources`.

    Raises DataError when a file or column is absent; what is merely odd in a cell is reported.
    """
    opened = Derived(open_table(source, folder), source)
    return harmonise(opened, source, dictionary, labelled=labelled)


def harmonise(
    source: Source, mapping: ColumnMapping, dictionary: Dictionary, *, labelled: bool = True
) -> Table:
    """All of a source's rows in the dictionary's terms, a chunk at a time.

    Rows without a known label or a readable structure are left out and counted. Only the
    dictionary's columns are kept, in compact types, so that memory grows with what a study uses and
    not with the source.
    """
    readings = [KINDS[column.kind](column, mapping) for column in dictionary.columns]
    owners = _Owners(source, mapping, dictionary)
    outcome = outcome_of(dictionary.label, mapping) if labelled else None
    names = [name for one in (*readings, owners, outcome) if one for name in one.names]
    found = {name: _found(source, mapping, name) for name in names}
    values = [_Growing() for _ in readings]
    kept_labels, kept_owners, rows, unlabelled = _Growing(), _Growing(), 0, 0
    asked = [*found.values(), *([source.patient] if source.patient else [])]
    for chunk in source.chunks(list(dict.fromkeys(asked))):
        parts = [_read(one, chunk, found, source) for one in readings]
        count = len(parts[0])
        labels, keep = dictionary.label.unknown(count), np.ones(count, dtype=bool)
        if outcome is not None:
            cells = [chunk[found[name]] for name in outcome.names]
            labels, keep = outcome.read(*(cells or parts))
        unlabelled += int((~keep).sum())
        if dictionary.modality == "molecule":
            keep = keep & (parts[0] != b"")
        who = owners.read(chunk, found, range(rows, rows + count), parts[0])
        for grown, part in zip(values, parts, strict=True):
            grown.append(part[keep])
        kept_labels.append(labels[keep])
        kept_owners.append(who[keep])
        rows += count
    if rows == 0 or len(kept_labels) == 0:
        raise DataError(
            f"{source.origin}: expected records with a known {dictionary.label.name!r}, found none "
            f"in {rows} rows; check the label's values in the dictionary"
            + "".join(f" ({one})" for one in source.notes()[:1])
        )
    columns = tuple(one.report() for one in readings)
    problems = [*_problems(columns, dictionary, rows), *(outcome.problems() if outcome else ())]
    report = TableReport(
        rows=rows,
        patients=owners.count,
        unlabelled=unlabelled,
        columns=columns,
        problems=(*problems, *source.notes()),
    )
    return Table(
        dictionary=dictionary,
        values={
            column.name: grown.finish()
            for column, grown in zip(dictionary.columns, values, strict=True)
        },
        labels=kept_labels.finish(),
        patients=kept_owners.finish(),
        report=report,
    )


def _found(source: Source, mapping: ColumnMapping, name: str) -> str:
    """The source's own name for a study column; raises DataError when it has none."""
    wanted = mapping.rename.get(name, name)
    if wanted not in source.columns:
        raise DataError(
            f"{source.origin}: column {wanted!r} not found; {nearest(wanted, source.columns)}, or "
            f'map it with rename = {{ {name} = "the file\'s name for it" }}'
        )
    return wanted


def _read(reading: Reading, chunk: Chunk, found: Mapping[str, str], source: Source) -> NDArray[Any]:
    try:
        return reading.read(*(chunk[found[name]] for name in reading.names))
    except DataError as error:
        raise DataError(f"{source.origin}: {error}") from None


class _Growing:
    """An array that grows at its end, without a second copy of the whole."""

    def __init__(self) -> None:
        self._array: NDArray[Any] | None = None
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, part: NDArray[Any]) -> None:
        """Add ``part`` [rows, …]."""
        if self._array is None:
            self._array, self._rows = part.copy(), len(part)
            return
        needed = self._rows + len(part)
        if needed > len(self._array):
            self._resize(max(needed, len(self._array) + len(self._array) // 4))
        self._array[self._rows : needed] = part
        self._rows = needed

    def finish(self) -> NDArray[Any]:
        """All rows."""
        assert self._array is not None  # noqa: S101  (an empty source is refused before)
        self._resize(self._rows)
        return self._array

    def _resize(self, rows: int) -> None:
        assert self._array is not None  # noqa: S101
        self._array.resize((rows, *self._array.shape[1:]), refcheck=False)


class _Owners:
    """Whose each row is. A row of nobody is refused: it could belong to a patient twice."""

    def __init__(self, source: Source, mapping: ColumnMapping, dictionary: Dictionary) -> None:
        self._origin, self._blank = source.origin, absent_words(mapping)
        # A source that knows its patients decides: no study can make the privacy unit smaller.
        self._column = source.patient
        is_named = bool(dictionary.patient_id) and not source.patient
        self.names: tuple[str, ...] = (dictionary.patient_id,) if is_named else ()
        self._are_compounds = dictionary.modality == "molecule"
        self._known: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many different patients were seen; a row without a structure is nobody's."""
        return len(self._known.keys() - {""})

    def read(
        self, chunk: Chunk, found: Mapping[str, str], rows: Sequence[int], first: NDArray[Any]
    ) -> NDArray[np.object_]:
        """The identifiers of one chunk, one object for each patient. ``first``: the values of the
        first column, which are the identifiers where these are compounds."""
        if not (self.names or self._column) and self._are_compounds:
            names = [one.decode() for one in first]
        elif not (self.names or self._column):
            names = [f"row-{row}" for row in rows]
        else:
            cells = chunk[self._column or found[self.names[0]]]
            names = [str(cell).strip() for cell in cells]
            nameless = sum(name in self._blank for name in names)
            if nameless:
                raise DataError(
                    f"{self._origin}: expected a patient identifier in every row, found "
                    f"{nameless} rows without; whose records they are decides what protects them"
                )
        return np.array([self._known.setdefault(name, name) for name in names], dtype=object)


def _problems(reports: Sequence[ColumnReport], dictionary: Dictionary, rows: int) -> list[str]:
    columns = {column.name: column for column in dictionary.columns}
    found = []
    for report in reports:
        if columns[report.name].kind == "molecule":
            found += _molecule_problems(report, rows)
            continue
        if report.missing and not columns[report.name].optional:
            found.append(
                f"{report.name}: {report.missing} of {rows} values missing, but the dictionary "
                f"says optional = false; they are read as the typical value: fill them in, or ask "
                f"for optional = true"
            )
        if report.missing == rows:
            found.append(
                f"{report.name}: empty throughout; the model sees it as not measured: check rename"
            )
        if report.out_of_range:
            found.append(
                f"{report.name}: {report.out_of_range} values outside the plausible range; "
                f"they are clipped to it: check units, or list codes for 'not measured' in missing"
            )
        if report.unmapped:
            found.append(
                f"{report.name}: {report.unmapped} values not in the dictionary "
                f"({', '.join(report.unmapped_examples)}); they are read as missing: recode them"
            )
    return found


def _molecule_problems(report: ColumnReport, rows: int) -> list[str]:
    found = []
    if report.missing:
        examples = f" ({', '.join(report.unmapped_examples)})" if report.unmapped else ""
        found.append(
            f"{report.name}: {report.missing} of {rows} structures are empty or cannot be read"
            f"{examples}; these rows are left out: correct the SMILES"
        )
    if report.out_of_range:
        found.append(
            f"{report.name}: {report.out_of_range} molecules have more atoms or tokens than the "
            f"dictionary's atoms and tokens; what is behind is cut"
        )
    return found
