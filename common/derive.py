"""Columns worked out from dates: ages, lengths of stay, times to an event."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.readers import Chunk, Source
from common.sources import ColumnMapping

_UNIT_S = {"hours": 3600.0, "days": 86_400.0, "years": 365.25 * 86_400.0}


def to_dates(cells: NDArray[Any], mapping: ColumnMapping) -> tuple[NDArray[Any], int]:
    """Cells as datetime64 (NaT where there is none), and how many were no dates at all.

    Times with a zone are read in UTC, so that differences hold.
    """
    if cells.dtype.kind == "M":
        return cells.astype("datetime64[s]"), 0
    text = pd.Series(cells, dtype=object).astype(str).str.strip()
    blank = text.isna() | text.isin([*mapping.missing, "None", "nan", "NaT", "<NA>"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dates = pd.to_datetime(
            text.mask(blank),
            format=mapping.date_format or "ISO8601",
            errors="coerce",
            utc=True,
        )
    unread = int((dates.isna() & ~blank).sum())
    return dates.dt.tz_localize(None).to_numpy().astype("datetime64[s]"), unread


def unread_lines(unread: Mapping[str, int]) -> tuple[str, ...]:
    """What to do about cells that are no dates, by column."""
    return tuple(
        f"{name}: {count} cells are no dates and were read as missing; set date_format"
        for name, count in unread.items()
        if count
    )


class Derived:
    """A source with its mapping's ``derive`` columns added."""

    def __init__(self, source: Source, mapping: ColumnMapping) -> None:
        self._source, self._mapping = source, mapping
        self._unread: dict[str, int] = {}
        self.origin, self.patient = source.origin, source.patient

    @property
    def columns(self) -> tuple[str, ...]:
        """The source's columns and the derived ones."""
        return (*self._source.columns, *self._mapping.derive)

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """The same rows; derived columns as float64 with NaN for unknown."""
        derive = self._mapping.derive
        asked = [name for name in wanted if name not in derive]
        spans = [derive[name] for name in wanted if name in derive]
        dates = [each for span in spans for each in (span.start, span.end)]
        for chunk in self._source.chunks(list(dict.fromkeys([*asked, *dates]))):
            found = {name: chunk[name] for name in asked}
            found |= {name: self._interval(name, chunk) for name in wanted if name in derive}
            yield found

    def notes(self) -> tuple[str, ...]:
        """The source's, and the dates that could not be read."""
        return (*self._source.notes(), *unread_lines(self._unread))

    def _interval(self, name: str, chunk: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        spec = self._mapping.derive[name]
        ends = []
        for column in (spec.start, spec.end):
            dates, unread = to_dates(chunk[column], self._mapping)
            self._unread[column] = self._unread.get(column, 0) + unread
            ends.append(dates)
        between = (ends[1] - ends[0]).astype("timedelta64[s]")
        seconds = np.where(np.isnat(between), np.nan, between.astype(np.int64).astype(np.float64))
        return seconds / _UNIT_S[spec.unit]
