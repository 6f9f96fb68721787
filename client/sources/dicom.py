"""DICOM files become grey pictures from 0 to 1; PatientID is the privacy unit.

Of the header only the fields in ``FIELDS`` can be read by a study, besides the patient and the keys
of the label table; names, dates and identifiers in it are never looked at. A file that is broken,
or holds no image, is named in the hospital's own report and left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.sources.pixels import Labels, fit, image_column, in_chunks
from client.sources.skipped import Skipped
from common.dictionary import Dictionary
from common.errors import DataError
from common.readers import Chunk, needed
from common.sources import DicomSource

# What a study may ask of a header: nothing here says who somebody is.
FIELDS = ("Modality", "BodyPartExamined", "ViewPosition", "Laterality", "PatientSex")
PATIENT = "patient"
_KEYS = {"patient": "PatientID", "study": "StudyInstanceUID", "image": "SOPInstanceUID"}
_NO_PICTURES = {"SEG", "RTDOSE", "PR", "KO"}
# Weights of red, green and blue in brightness (ITU-R BT.601).
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])


class DicomFolder:
    """All DICOM files below a folder, in the order of their paths; one at a time in memory."""

    patient = PATIENT

    def __init__(self, spec: DicomSource, folder: Path, dictionary: Dictionary) -> None:
        self._pydicom = needed("pydicom", "dicom", "kind = 'dicom'")
        self._pixels = needed("pydicom.pixels", "dicom", "kind = 'dicom'")
        self._spec, self._root = spec, folder / spec.path
        self._image, self._shape = image_column(dictionary, spec.kind)
        if not self._root.is_dir():
            raise DataError(f"{self._root}: no such folder; expected one with DICOM files")
        self._labels = Labels.read(spec.labels, folder)
        self.origin = spec.path
        known = self._labels.columns if self._labels else ()
        self.columns = tuple(dict.fromkeys([self._image, PATIENT, *FIELDS, *known]))
        self._files_out, self._silent = Skipped("files"), 0

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """One row an image, or a frame of it with ``frames = "all"``."""
        return in_chunks(self._rows(), wanted, self._image)

    def notes(self) -> tuple[str, ...]:
        """Files that were left out, and images that do not say whether text is burned in."""
        silent = (
            f"{self._silent} images do not say whether text is burned into them "
            f"(BurnedInAnnotation); look at some with `consilium data preview`"
        )
        return (*self._files_out.lines(), *((silent,) if self._silent else ()))

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        for path in sorted(each for each in self._root.rglob("*") if each.is_file()):
            name = path.relative_to(self._root).as_posix()
            if self._labels and path.suffix == ".csv":
                continue
            header = self._header(path, name)
            if header is None:
                continue
            row = {
                **self._known(header, name),
                **{field: _text(header.get(field)) for field in FIELDS},
                PATIENT: _text(header.get("PatientID")),
            }
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    pictures = self._pictures(header)
            except Exception as error:
                self._files_out.add(self._reason(header, error), name)
                continue
            self._silent += _text(header.get("BurnedInAnnotation")) is None
            for picture in pictures:
                yield {**row, self._image: picture}

    def _header(self, path: Path, name: str) -> Any:
        """The file's content when it is an image we take; else None, and the reason is noted."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                header = self._pydicom.dcmread(path)
                modality = str(header.get("Modality", ""))
                burned_in = str(header.get("BurnedInAnnotation") or "").upper()
                has_pixels = "PixelData" in header
                patient = _text(header.get("PatientID"))
        except Exception:  # pydicom raises whatever a damaged header leads it to
            self._files_out.add("they are no DICOM files, or their header is damaged", name)
            return None
        if not has_pixels:
            self._files_out.add(f"they hold no image ({modality or 'no modality'})", name)
        elif self._spec.modality and modality not in self._spec.modality:
            self._files_out.add(f"their modality is {modality}, which is not asked for", name)
        elif not self._spec.modality and modality in _NO_PICTURES:
            self._files_out.add(f"they are no pictures ({modality}); name it in modality", name)
        elif patient is None:
            self._files_out.add("they have no PatientID, which decides what protects them", name)
        elif burned_in == "YES" and self._spec.burned_in == "skip":
            self._files_out.add(
                "text is burned into them (BurnedInAnnotation); clean them, or burned_in = 'keep'",
                name,
            )
        else:
            return header
        return None

    def _known(self, header: Any, name: str) -> Mapping[str, str]:
        if self._labels is None:
            return {}
        by = self._labels.spec.by
        return self._labels.of(name if by == "file" else str(header.get(_KEYS[by], "")))

    def _pictures(self, header: Any) -> list[NDArray[np.float32]]:
        stored = self._pixels.pixel_array(header)
        is_colour = int(header.get("SamplesPerPixel", 1)) > 1
        if header.PhotometricInterpretation == "PALETTE COLOR":
            stored, is_colour = self._pixels.apply_color_lut(stored, header), True
        frames = stored if int(header.get("NumberOfFrames") or 1) > 1 else stored[None]
        if self._spec.frames == "first":
            frames = frames[:1]
        elif self._spec.frames == "middle":
            middle = len(frames) // 2
            frames = frames[middle : middle + 1]
        return [fit(self._grey(frame, header, is_colour), self._shape) for frame in frames]

    def _grey(self, frame: NDArray[Any], header: Any, is_colour: bool) -> NDArray[np.float32]:
        """One frame from 0 (black) to 1 (white)."""
        if is_colour:
            highest = float(np.iinfo(frame.dtype).max)
            return np.asarray(frame.astype(np.float64) @ _BRIGHTNESS / highest, dtype=np.float32)
        measured = np.asarray(self._pixels.apply_modality_lut(frame, header), dtype=np.float64)
        grey = self._windowed(measured, header)
        # MONOCHROME1 shows its lowest value white.
        is_inverse = header.PhotometricInterpretation == "MONOCHROME1"
        return np.asarray(1 - grey if is_inverse else grey, dtype=np.float32)

    def _windowed(self, measured: NDArray[np.float64], header: Any) -> NDArray[np.float64]:
        if self._spec.window != "header":
            return window(measured, *self._spec.window)
        if header.get("VOILUTSequence"):
            shown = self._pixels.apply_voi(measured.astype(np.int64), header).astype(np.float64)
            bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
            return np.asarray(np.clip(shown / (2.0**bits - 1), 0, 1))
        centre, width = _first(header.get("WindowCenter")), _first(header.get("WindowWidth"))
        if centre is not None and width is not None and width >= 1:
            function = str(header.get("VOILUTFunction") or "LINEAR").upper()
            return window(measured, centre, width, function)
        low, high = measured.min(), measured.max()
        return np.asarray((measured - low) / max(high - low, 1e-12))

    def _reason(self, header: Any, error: Exception) -> str:
        """Why pixels could not be had; never with a word from the header but its syntax."""
        syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
        kind = getattr(syntax, "name", "unknown transfer syntax")
        if getattr(syntax, "is_compressed", False) and isinstance(error, RuntimeError):
            return (
                f"no decoder here reads their compression ({kind}); `pip install "
                f"'consilium[dicom]'` has most, or convert them"
            )
        return f"their pixels cannot be read ({kind}); they are cut short or invalid"


def window(
    measured: NDArray[np.float64], centre: float, width: float, function: str = "LINEAR"
) -> NDArray[np.float64]:
    """Measured values to grey from 0 to 1 (DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(-4 * (measured - centre) / width)))
    if function == "LINEAR_EXACT":
        return np.clip((measured - centre) / width + 0.5, 0, 1)
    if width == 1:
        return (measured > centre - 0.5).astype(np.float64)
    return np.clip((measured - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _first(value: Any) -> float | None:
    """A window may be one number or several alternatives; the first is what viewers show."""
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__iter__") and not isinstance(value, str) else value)


def _text(value: Any) -> str | None:
    text = "" if value is None else str(value).strip()
    return text or None
