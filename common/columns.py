"""One column of the dictionary, read chunk by chunk from a source's cells.

A kind of column is one class and one entry in ``KINDS``. It says which study columns it reads (a
pair such as time and event would name two), turns a chunk's cells into values of a compact type,
and counts what was odd.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.dictionary import Column
from common.errors import DataError
from common.molecules import LONGEST, atom_count, check_rdkit, compound
from common.smiles import pieces
from common.sources import ColumnMapping
from common.text import tokeniser_of
from common.units import Conversion, conversion

_EXAMPLES = 3


@dataclass(frozen=True)
class ColumnReport:
    """What was found in one column: counts of rows. ``conversion``: what was done to numbers."""

    name: str
    missing: int = 0
    out_of_range: int = 0
    unmapped: int = 0
    unmapped_examples: tuple[str, ...] = ()
    source: str = ""
    conversion: str = ""


class Reading(Protocol):
    """Reads one column of the dictionary."""

    @property
    def names(self) -> tuple[str, ...]:
        """The study columns whose cells it needs."""

    def read(self, *cells: NDArray[Any]) -> NDArray[Any]:
        """The values of one chunk; what cannot be read is missing, and counted."""

    def report(self) -> ColumnReport:
        """What was found in all chunks so far."""


@dataclass
class Counts:
    """What a reading has seen so far."""

    missing: int = 0
    out_of_range: int = 0
    unmapped: int = 0
    examples: set[str] = field(default_factory=set)

    def report(self, column: Column, mapping: ColumnMapping, changed: str = "") -> ColumnReport:
        """The same as a report."""
        return ColumnReport(
            name=column.name,
            missing=self.missing,
            out_of_range=self.out_of_range,
            unmapped=self.unmapped,
            unmapped_examples=tuple(sorted(self.examples)[:_EXAMPLES]),
            source=mapping.rename.get(column.name, column.name),
            conversion=changed,
        )

    def add_examples(self, found: set[str]) -> None:
        """Keep the first few in alphabetical order."""
        self.examples = set(sorted(self.examples | found)[:_EXAMPLES])


def key_of(value: Any) -> str:
    """One spelling for the same value: 3, 3.0, "3" and " 3.0" are alike."""
    text = str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else repr(number)


def keys_of(cells: NDArray[Any]) -> tuple[NDArray[np.int64], list[str]]:
    """Cells as numbers into the list of their different spellings: few are looked at one by one."""
    flat = cells if cells.ndim == 1 else cells[:, 0]
    codes, different = pd.factorize(flat.astype(object), use_na_sentinel=False)
    return codes.astype(np.int64), [key_of(value) for value in different]


def absent_words(mapping: ColumnMapping) -> set[str]:
    """Cells that mean "not measured", as ``key_of`` spells them."""
    return {*mapping.missing, "None", "nan", "NaT", "<NA>"}


class NumericReading:
    """Numbers as float32, NaN where missing: converted to the dictionary's unit, then clipped."""

    def __init__(self, column: Column, mapping: ColumnMapping) -> None:
        assert column.range is not None  # noqa: S101  (the dictionary refuses it otherwise)
        self._column, self._mapping, self._counts = column, mapping, Counts()
        self._range = column.range
        self._conversion, self._changed = _conversion(column, mapping)
        self._absent = [float(code) for code in column.missing if _is_number(code)]
        self.names = (column.name,)

    def read(self, *cells: NDArray[Any]) -> NDArray[np.float32]:
        """Numbers, or text that says numbers."""
        numbers, is_blank, text = self._numbers(cells[0])
        unmapped = np.isnan(numbers) & ~is_blank
        counts = self._counts
        if unmapped.any():
            counts.unmapped += int(unmapped.sum())
            counts.add_examples(set(text(unmapped)))
        # Codes for "not measured" are the file's: before any unit is converted.
        numbers = np.where(np.isin(numbers, self._absent), np.nan, numbers)
        if self._conversion.changes:
            numbers = numbers * self._conversion.factor + self._conversion.offset
        low, high = self._range
        counts.missing += int(np.isnan(numbers).sum())
        counts.out_of_range += int(((numbers < low) | (numbers > high)).sum())
        return np.clip(numbers, low, high).astype(np.float32)

    def report(self) -> ColumnReport:
        """Counts over all chunks."""
        return self._counts.report(self._column, self._mapping, self._changed)

    def _numbers(
        self, cells: NDArray[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], Callable[[NDArray[np.bool_]], list[str]]]:
        if cells.dtype.kind in "OSUT":
            series = pd.Series(cells).astype(str).str.strip()
            blank = series.isin(absent_words(self._mapping)) | series.isna()
            is_blank, words = blank.to_numpy(dtype=bool), series.mask(blank)
            if self._mapping.decimal == ",":
                # A point could mark thousands: such a cell is reported rather than guessed at.
                words = words.mask(words.str.contains(".", regex=False, na=False))
                words = words.str.replace(",", ".", regex=False)
            numbers = pd.to_numeric(words, errors="coerce").to_numpy(dtype=float)
            return numbers, is_blank, lambda rows: [str(one) for one in series[rows]]
        if cells.dtype.kind not in "biuf" or cells.ndim != 1:
            raise DataError(
                f"{self._column.name}: expected one number a row, found {cells.dtype} of shape "
                f"{cells.shape[1:]}; map the column to another one, or derive it"
            )
        plain = cells.astype(np.float64)
        return plain, np.isnan(plain), lambda _: []


class CategoryReading:
    """Categories as indices, -1 where missing, in the smallest integers that hold them."""

    def __init__(self, column: Column, mapping: ColumnMapping) -> None:
        self._column, self._mapping, self._counts = column, mapping, Counts()
        self._index = {key_of(category): code for code, category in enumerate(column.categories)}
        self._recode = recoding(mapping, column.name)
        self._absent = {key_of(code) for code in column.missing} | absent_words(mapping)
        self._type = np.min_scalar_type(-len(column.categories))
        self.names = (column.name,)

    def read(self, *cells: NDArray[Any]) -> NDArray[Any]:
        """Cells of any type, recoded, then looked up."""
        codes, keys = keys_of(cells[0])
        keys = [self._recode.get(key, key) for key in keys]
        table = np.array([self._index.get(key, -1) for key in keys], dtype=self._type)
        odd = np.array([key not in self._index and key not in self._absent for key in keys], bool)
        values = table[codes] if keys else np.empty(0, self._type)
        counts = self._counts
        counts.missing += int((values < 0).sum())
        if odd.any():
            counts.unmapped += int(odd[codes].sum())
            counts.add_examples({key for key, is_odd in zip(keys, odd, strict=True) if is_odd})
        return values

    def report(self) -> ColumnReport:
        """Counts over all chunks."""
        recoded = f"{len(self._recode)} values recoded" if self._recode else ""
        return self._counts.report(self._column, self._mapping, recoded)


class ImageReading:
    """Grey values from 0 to 1 as float32 [rows, height, width]."""

    def __init__(self, column: Column, mapping: ColumnMapping) -> None:
        self._column, self._mapping, self._counts = column, mapping, Counts()
        self.names = (column.name,)

    def read(self, *cells: NDArray[Any]) -> NDArray[np.float32]:
        """Pixels [rows, height, width]: integers by their type's range, floats as they are."""
        (pixels,) = cells
        if pixels.shape[1:] != self._column.shape:
            raise DataError(
                f"column {self._column.name!r} expected images of shape {self._column.shape}, "
                f"found {pixels.shape[1:]}; resize them before"
            )
        scale = float(np.iinfo(pixels.dtype).max) if pixels.dtype.kind in "ui" else 1.0
        grey = pixels.astype(np.float64) / scale
        self._counts.missing += int(np.isnan(grey).any(axis=(1, 2)).sum())
        self._counts.out_of_range += int(((grey < 0) | (grey > 1)).any(axis=(1, 2)).sum())
        return np.clip(np.nan_to_num(grey, nan=0.0), 0.0, 1.0).astype(np.float32)

    def report(self) -> ColumnReport:
        """Counts over all chunks."""
        return self._counts.report(self._column, self._mapping)


class CodeReading:
    """Codes as buckets of a public hash, -1 where missing, in the smallest integers that hold them.

    A cell ``#12`` names bucket 12 itself: what was written out from a table that was read.
    """

    def __init__(self, column: Column, mapping: ColumnMapping) -> None:
        self._column, self._mapping, self._counts = column, mapping, Counts()
        self._recode = recoding(mapping, column.name)
        self._absent = {key_of(code) for code in column.missing} | absent_words(mapping) | {""}
        assert column.buckets is not None  # noqa: S101  (the dictionary refuses it otherwise)
        self._type = np.min_scalar_type(-column.buckets)
        self.names = (column.name,)

    def read(self, *cells: NDArray[Any]) -> NDArray[Any]:
        """Cells of any type, spelled as they stand: 250.00 and 250 may be different codes."""
        codes, different = pd.factorize(cells[0].astype(object), use_na_sentinel=False)
        words = [str(value).strip() for value in different]
        buckets = [bucket_of(self._column, self._recode.get(word, word)) for word in words]
        table = np.array(
            [
                -1 if word in self._absent else bucket
                for word, bucket in zip(words, buckets, strict=True)
            ],
            dtype=self._type,
        )
        values = table[codes] if words else np.empty(0, self._type)
        self._counts.missing += int((values < 0).sum())
        return values

    def report(self) -> ColumnReport:
        """Counts over all chunks."""
        changed = f"{self._column.buckets} buckets by a public hash"
        return self._counts.report(self._column, self._mapping, changed)


def bucket_of(column: Column, code: str) -> int:
    """The bucket of a code at every hospital: SHA-256 of the column's name and the code's prefix.

    >>> from common.dictionary import Column
    >>> diagnosis = Column(name="diagnosis", kind="code", prefix=3, buckets=64)
    >>> bucket_of(diagnosis, "250.83") == bucket_of(diagnosis, "250")
    True
    """
    assert column.buckets is not None  # noqa: S101
    named = re.fullmatch(r"#(\d+)", code)
    if named and int(named[1]) < column.buckets:
        return int(named[1])
    digest = hashlib.sha256(f"{column.name}|{code[: column.prefix]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % column.buckets


class MoleculeReading:
    """Compounds as canonical SMILES (bytes; see ``molecules.compound``), empty where unreadable.

    ``unmapped`` counts what is no structure, ``out_of_range`` what has more atoms or tokens
    than are read.
    """

    def __init__(self, column: Column, mapping: ColumnMapping) -> None:
        check_rdkit()
        self._column, self._mapping, self._counts = column, mapping, Counts()
        self._absent = {key_of(code) for code in column.missing} | absent_words(mapping)
        self.names = (column.name,)

    def read(self, *cells: NDArray[Any]) -> NDArray[np.bytes_]:
        """Text, each different one parsed once."""
        codes, keys = keys_of(cells[0])
        found = ["" if key in self._absent else compound(key) for key in keys]
        unread = np.array([not one for one in found], bool)
        odd = unread & np.array([key not in self._absent for key in keys], bool)
        atoms, tokens = self._column.atoms, self._column.tokens
        large = np.array(
            [0 < atoms < atom_count(one) or 0 < tokens < len(pieces(one)) for one in found], bool
        )
        counts = self._counts
        if keys:
            counts.missing += int(unread[codes].sum())
            counts.unmapped += int(odd[codes].sum())
            counts.out_of_range += int(large[codes].sum())
            counts.add_examples({key for key, is_odd in zip(keys, odd, strict=True) if is_odd})
        return np.array(found, dtype=f"S{LONGEST}")[codes] if keys else np.empty(0, f"S{LONGEST}")

    def report(self) -> ColumnReport:
        """Counts over all chunks."""
        return self._counts.report(self._column, self._mapping)


class TextReading:
    """Texts as token ids int32 [rows, length], 0 behind a text's end; no text is kept.

    Cells may be ids already: [rows, length] whole numbers, as a study that was laid out has them.
    """

    def __init__(self, column: Column, mapping: ColumnMapping) -> None:
        self._column, self._mapping, self._counts = column, mapping, Counts()
        self._tokeniser, self._absent = tokeniser_of(column), absent_words(mapping)
        self.names = (column.name,)

    def read(self, *cells: NDArray[Any]) -> NDArray[np.int32]:
        """Ids [rows, length]; an empty cell has none."""
        (given,) = cells
        length = self._column.length or 0
        if given.ndim == 1:
            texts = ["" if key_of(one) in self._absent else str(one) for one in given]
            ids = self._tokeniser.encode(texts, length)
            self._counts.missing += texts.count("")
        else:
            ids = self._checked(given, length)
            self._counts.missing += int((~ids.any(axis=1)).sum())
        return ids

    def report(self) -> ColumnReport:
        """Counts over all chunks."""
        return self._counts.report(self._column, self._mapping)

    def _checked(self, given: NDArray[Any], length: int) -> NDArray[np.int32]:
        inside = given.dtype.kind in "iu" and given.shape[1:] == (length,)
        if not inside or (given.size and not 0 <= given.min() <= given.max() < self._size):
            raise DataError(
                f"column {self._column.name!r} expected texts, or {length} token ids below "
                f"{self._size} a row, found {given.dtype} of shape {given.shape[1:]}"
            )
        return given.astype(np.int32)

    @property
    def _size(self) -> int:
        return self._column.vocabulary or 0


KINDS: dict[str, Callable[[Column, ColumnMapping], Reading]] = {
    "numeric": NumericReading,
    "binary": CategoryReading,
    "categorical": CategoryReading,
    "image": ImageReading,
    "code": CodeReading,
    "molecule": MoleculeReading,
    "text": TextReading,
}


def recoding(mapping: ColumnMapping, name: str) -> dict[str, str]:
    """A column's ``recode`` as ``key_of`` spells both sides."""
    return {key_of(raw): key_of(value) for raw, value in mapping.recode.get(name, {}).items()}


def _conversion(column: Column, mapping: ColumnMapping) -> tuple[Conversion, str]:
    factor, unit = mapping.factor.get(column.name), mapping.units.get(column.name)
    wanted = column.unit or "the dictionary's unit"
    if factor is not None:
        return Conversion(factor), f"{unit or 'as found'} × {factor:g} = {wanted}"
    if unit is None:
        return Conversion(1.0), ""
    try:
        found = conversion(unit, column.unit)
    except DataError as error:
        raise DataError(f"units.{column.name}: {error}: factor = {{ {column.name} = … }}") from None
    if not found.changes:
        return found, ""
    shift = f" {found.offset:+g}" if found.offset else ""
    return found, f"{unit} × {found.factor:g}{shift} = {wanted}"


def _is_number(code: Any) -> bool:
    try:
        float(code)
    except (TypeError, ValueError):
        return False
    return True
