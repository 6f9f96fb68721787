"""Folders of PNG and JPEG files become grey pictures from 0 to 1.

Only pixels are read: what a camera or a scanner wrote beside them (EXIF) goes no further.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from client.sources.pixels import Labels, fit, image_column, in_chunks
from client.sources.skipped import Skipped
from common.dictionary import Dictionary
from common.errors import DataError, nearest
from common.readers import Chunk
from common.sources import ImagesSource

PATIENT = "patient"
_SUFFIXES = {".png", ".jpg", ".jpeg"}


class ImageFolder:
    """All PNG and JPEG files below a folder, in the order of their paths; one at a time."""

    patient = PATIENT

    def __init__(self, spec: ImagesSource, folder: Path, dictionary: Dictionary) -> None:
        self._spec, self._root = spec, folder / spec.path
        self._image, self._shape = image_column(dictionary, spec.kind)
        if not self._root.is_dir():
            raise DataError(f"{self._root}: no such folder; expected one with PNG or JPEG files")
        self._labels = Labels.read(spec.labels, folder)
        known = self._labels.columns if self._labels else ()
        if spec.patient and spec.patient not in known:
            raise DataError(
                f"patient: column {spec.patient!r} not found in the label table; "
                f"{nearest(spec.patient, known)}"
            )
        self._pattern = _pattern(spec.patient_pattern) if spec.patient_pattern else None
        self.origin = spec.path
        self.columns = tuple(dict.fromkeys([self._image, PATIENT, "file", "folder", *known]))
        self._files_out = Skipped("files")

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """One row a file."""
        return in_chunks(self._rows(), wanted, self._image)

    def notes(self) -> tuple[str, ...]:
        """Files that were left out."""
        return self._files_out.lines()

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        paths = (each for each in self._root.rglob("*") if each.suffix.lower() in _SUFFIXES)
        for path in sorted(paths):
            name = path.relative_to(self._root).as_posix()
            known = self._labels.of(name) if self._labels else {}
            patient = self._patient(name, known)
            if patient is None:
                self._files_out.add("whose they are is not known; that decides what protects", name)
                continue
            try:
                with warnings.catch_warnings():
                    # A bomb of a picture is a warning first, and an error only at twice the size.
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    picture = grey_of(path)
            except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError):
                self._files_out.add("they cannot be read as PNG or JPEG, or are too large", name)
                continue
            folder = path.parent.name if path.parent != self._root else ""
            yield {
                **known,
                PATIENT: patient,
                "file": name,
                "folder": folder,
                self._image: fit(picture, self._shape),
            }

    def _patient(self, name: str, known: Mapping[str, str]) -> str | None:
        if self._pattern is None:
            return (known.get(self._spec.patient) or "").strip() or None
        found = self._pattern.search(name)
        return found[1].strip() or None if found and found[1] else None


def grey_of(path: Path) -> NDArray[np.float32]:
    """A file's pixels [height, width] from 0 to 1, by the range of its type."""
    with Image.open(path, formats=("PNG", "JPEG")) as opened:
        if opened.mode.startswith("I"):  # 16 bits a pixel
            deep = np.asarray(opened, dtype=np.float32) / np.float32(65535)
            return np.asarray(np.clip(deep, 0, 1), dtype=np.float32)
        return np.asarray(opened.convert("L"), dtype=np.float32) / np.float32(255)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise DataError(f"patient_pattern: not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise DataError(
            f"patient_pattern: expected one group ( ) around the patient, found {pattern.groups}"
        )
    return pattern
