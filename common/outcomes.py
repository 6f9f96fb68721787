"""The outcome, read chunk by chunk from a source's cells. One reading for each kind of label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.columns import NumericReading, absent_words, key_of, keys_of, recoding
from common.dictionary import Column
from common.labels import (
    ClassLabel,
    EffectLabel,
    NumberLabel,
    SeveralLabel,
    SurvivalLabel,
    TextLabel,
)
from common.sources import ColumnMapping

_EXAMPLES = 3
_ANY = (-1e30, 1e30)

Booleans = NDArray[np.bool_]


class Outcome(Protocol):
    """Reads one kind of label."""

    @property
    def names(self) -> tuple[str, ...]:
        """The study columns whose cells it needs; none: it is read from the record's own values."""

    def read(self, *cells: NDArray[Any]) -> tuple[NDArray[Any], Booleans]:
        """Labels [rows, …] of one chunk, and which rows have one [rows]."""

    def problems(self) -> list[str]:
        """What was odd in all chunks so far, in words."""


def outcome_of(label: Any, mapping: ColumnMapping) -> Outcome:
    """The reading of ``label`` from a source with ``mapping``."""
    return _OUTCOMES[label.kind](label, mapping)


class Classes:
    """Class indices int64 [rows]."""

    def __init__(self, label: ClassLabel, mapping: ColumnMapping) -> None:
        self.names = label.columns
        self._codes = _Codes(label.name, label.classes, mapping)

    def read(self, *cells: NDArray[Any]) -> tuple[NDArray[np.int64], Booleans]:
        """-1 where unknown."""
        codes = self._codes.read(cells[0])
        return codes, codes >= 0

    def problems(self) -> list[str]:
        """Values of no class."""
        return self._codes.problems("class")


class Survival:
    """Time and event, float32 [rows, 2]."""

    def __init__(self, label: SurvivalLabel, mapping: ColumnMapping) -> None:
        self.names = label.columns
        self._time = _Number(label.name, label.unit, label.range, mapping)
        self._event = _Codes(label.event, (label.censored, label.seen), mapping)

    def read(self, *cells: NDArray[Any]) -> tuple[NDArray[np.float32], Booleans]:
        """Both must be known."""
        time, event = self._time.read(cells[0]), self._event.read(cells[1])
        known = ~np.isnan(time) & (event >= 0)
        return np.stack([time, event], axis=1).astype(np.float32), known

    def problems(self) -> list[str]:
        """Of either column."""
        return [*self._time.problems(), *self._event.problems("meaning")]


class Number:
    """A number, float32 [rows, 1]."""

    def __init__(self, label: NumberLabel, mapping: ColumnMapping) -> None:
        self.names = label.columns
        self._number = _Number(label.name, label.unit, label.range, mapping)

    def read(self, *cells: NDArray[Any]) -> tuple[NDArray[np.float32], Booleans]:
        """NaN where unknown."""
        found = self._number.read(cells[0])
        return found[:, None], ~np.isnan(found)

    def problems(self) -> list[str]:
        """Implausible or unreadable numbers."""
        return self._number.problems()


class Effect:
    """Treatment, outcome and what is known of both arms, float32 [rows, 4]."""

    def __init__(self, label: EffectLabel, mapping: ColumnMapping) -> None:
        self.names = label.columns
        self._arm = _Codes(label.treatment, (label.untreated, label.treated), mapping)
        self._number = _Number(label.name, label.unit, label.range, mapping)
        self._truth = [_Number(name, label.unit, _ANY, mapping) for name in label.truth or ()]

    def read(self, *cells: NDArray[Any]) -> tuple[NDArray[np.float32], Booleans]:
        """Treatment and outcome must be known."""
        arm, found = self._arm.read(cells[0]), self._number.read(cells[1])
        truth = [one.read(column) for one, column in zip(self._truth, cells[2:], strict=True)]
        truth = truth or [np.full(len(found), np.nan)] * 2
        labels = np.stack([arm, found, *truth], axis=1).astype(np.float32)
        return labels, (arm >= 0) & ~np.isnan(found)

    def problems(self) -> list[str]:
        """Of treatment and outcome."""
        return [*self._arm.problems("arm"), *self._number.problems()]


class Several:
    """Yes, no or unknown, float32 [rows, outcomes]."""

    def __init__(self, label: SeveralLabel, mapping: ColumnMapping) -> None:
        self.names = label.columns
        self._each = [
            _Codes(name, (label.negative, label.positive), mapping) for name in label.names
        ]

    def read(self, *cells: NDArray[Any]) -> tuple[NDArray[np.float32], Booleans]:
        """At least one must be known."""
        codes = [one.read(column) for one, column in zip(self._each, cells, strict=True)]
        labels = np.stack(codes, axis=1).astype(np.float32)
        labels[labels < 0] = np.nan
        known = np.logical_not(np.isnan(labels).all(axis=1))
        return labels, np.asarray(known, dtype=bool)

    def problems(self) -> list[str]:
        """Of each outcome."""
        return [line for one in self._each for line in one.problems("meaning")]


class Text:
    """The record's own token ids, int32 [rows, length]."""

    names: tuple[str, ...] = ()

    def __init__(self, label: TextLabel, mapping: ColumnMapping) -> None:
        """Everything is in the record."""

    def read(self, *cells: NDArray[Any]) -> tuple[NDArray[Any], Booleans]:
        """A text of no tokens says nothing."""
        (ids,) = cells
        return ids, np.asarray(ids.any(axis=1), dtype=bool)

    def problems(self) -> list[str]:
        """None of its own."""
        return []


class _Codes:
    """Values looked up in groups: the group's number, or -1."""

    def __init__(self, name: str, groups: Sequence[Sequence[Any]], mapping: ColumnMapping) -> None:
        self._name = name
        self._index = {
            key_of(value): number for number, group in enumerate(groups) for value in group
        }
        self._recode, self._absent = recoding(mapping, name), absent_words(mapping)
        self._strange, self._examples = 0, set[str]()

    def read(self, cells: NDArray[Any]) -> NDArray[np.int64]:
        """Cells of any type, recoded, then looked up."""
        codes, keys = keys_of(cells)
        keys = [self._recode.get(key, key) for key in keys]
        table = np.array([self._index.get(key, -1) for key in keys], dtype=np.int64)
        odd = np.array([key not in self._index and key not in self._absent for key in keys], bool)
        if odd.any():
            self._strange += int(odd[codes].sum())
            strange = {key for key, is_odd in zip(keys, odd, strict=True) if is_odd}
            self._examples = set(sorted(self._examples | strange)[:_EXAMPLES])
        return table[codes] if keys else np.empty(0, np.int64)

    def problems(self, group: str) -> list[str]:
        """Values of no group, in words."""
        if not self._strange:
            return []
        return [
            f"{self._name}: {self._strange} rows have values of no {group} "
            f"({', '.join(sorted(self._examples))}) and are left out; recode them if they are meant"
        ]


class _Number:
    """Numbers as a numeric column's: converted, held within their range, and counted."""

    def __init__(
        self, name: str, unit: str, extent: tuple[float, float], mapping: ColumnMapping
    ) -> None:
        self._reading = NumericReading(
            Column(name=name, kind="numeric", unit=unit, range=extent), mapping
        )
        self._name = name

    def read(self, cells: NDArray[Any]) -> NDArray[np.float32]:
        """NaN where unknown."""
        return self._reading.read(cells)

    def problems(self) -> list[str]:
        """What was clipped or could not be read, in words."""
        found, lines = self._reading.report(), []
        if found.out_of_range:
            lines.append(
                f"{self._name}: {found.out_of_range} values outside the plausible range; they are "
                f"clipped to it: check units"
            )
        if found.unmapped:
            lines.append(
                f"{self._name}: {found.unmapped} rows hold no number "
                f"({', '.join(found.unmapped_examples)}) and are left out"
            )
        return lines


_OUTCOMES: Mapping[str, Callable[[Any, ColumnMapping], Outcome]] = {
    "classes": Classes,
    "survival": Survival,
    "number": Number,
    "effect": Effect,
    "several": Several,
    "text": Text,
}
