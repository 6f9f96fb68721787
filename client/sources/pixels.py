"""Grey pictures of one size, and what a table beside them says of each."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.dictionary import Dictionary
from common.errors import DataError, nearest
from common.readers import Chunk
from common.sources import LabelTable

PICTURES_A_CHUNK = 64


def fit(grey: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """A picture [height, width] scaled into ``shape`` as it is, with black beside it.

    Averaging over the area that falls into each pixel, so that nothing thin disappears.
    """
    if grey.shape == shape:
        return grey
    scale = min(shape[0] / grey.shape[0], shape[1] / grey.shape[1])
    height, width = (max(1, round(side * scale)) for side in grey.shape)
    small = Image.fromarray(grey).resize((width, height), Image.Resampling.BOX)
    placed = np.zeros(shape, dtype=np.float32)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    placed[top : top + height, left : left + width] = np.asarray(small)
    return placed


def image_column(dictionary: Dictionary, kind: str) -> tuple[str, tuple[int, int]]:
    """Name and size of the study's image; raises DataError when it has none."""
    if dictionary.image_shape is None:
        raise DataError(f"kind = {kind!r}: the study has no image column; expected a table")
    return dictionary.columns[0].name, dictionary.image_shape


@dataclass(frozen=True)
class Labels:
    """The rows of a label table by their key."""

    spec: LabelTable
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, spec: LabelTable | None, folder: Path) -> Labels | None:
        """The table; raises DataError when it cannot be read or a key comes twice."""
        if spec is None:
            return None
        path = folder / spec.path
        try:
            with path.open(newline="", encoding="utf-8") as handle:
                reader = csv.DictReader(handle)
                columns = tuple(reader.fieldnames or ())
                found = list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: cannot be read as a table of labels ({error})") from None
        if spec.key not in columns:
            raise DataError(
                f"{path}: labels.key: column {spec.key!r} not found; {nearest(spec.key, columns)}"
            )
        rows = {row[spec.key].strip(): row for row in found}
        if len(rows) < len(found):
            raise DataError(
                f"{path}: expected each {spec.key!r} once, found {len(found) - len(rows)} again"
            )
        return cls(spec, columns, rows)

    def of(self, key: str) -> Mapping[str, str]:
        """What is known of ``key``; nothing is an answer too."""
        return self.rows.get(key.strip(), {})


def in_chunks(
    rows: Iterator[Mapping[str, Any]], wanted: Sequence[str], image: str
) -> Iterator[Chunk]:
    """Rows gathered into chunks; pictures stacked, the rest as text or None."""
    waiting: list[Mapping[str, Any]] = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == PICTURES_A_CHUNK:
            yield _stacked(waiting, wanted, image)
            waiting = []
    if waiting:
        yield _stacked(waiting, wanted, image)


def _stacked(rows: Sequence[Mapping[str, Any]], wanted: Sequence[str], image: str) -> Chunk:
    return {
        name: np.stack([row[name] for row in rows])
        if name == image
        else np.array([row.get(name) for row in rows], dtype=object)
        for name in wanted
    }
