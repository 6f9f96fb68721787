"""Where records are and how their columns become the study's, in words that both sides may read.

A source is named by its ``kind``; what all kinds share is the mapping of columns. Sources in
databases are not here: a study file cannot name one, so that no query from outside can be asked.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.labels import Scalar
from common.strict import Strict

Name = Annotated[str, Field(min_length=1)]


class Interval(Strict):
    """The time from the date in column ``start`` to the date in column ``end``."""

    start: Name
    end: Name
    unit: Literal["hours", "days", "years"] = "days"


class ColumnMapping(Strict):
    """How a source's columns become the study's; every kind of source has these keys.

    ``rename``: study column → the source's column; columns of equal name need no entry.
    ``recode``: study column → {value in the source → value in the dictionary}.
    ``missing``: cells that mean "not measured" in every column.
    ``units``: study column → the unit the source has it in, when the dictionary's is another.
    ``factor``: study column → what its numbers are multiplied by, where units alone cannot say
    (38.67 makes mg/dL of a cholesterol in mmol/L).
    ``derive``: new column → the time between two columns with dates, such as an age.
    ``date_format``: how dates are written (``%d.%m.%Y``); ISO 8601 when left out.
    ``decimal``: the sign between whole and fraction in numbers written as text.
    """

    rename: dict[str, str] = {}
    recode: dict[str, dict[str, Scalar]] = {}
    missing: tuple[str, ...] = ("", "?", "NA", "NaN", "nan")
    units: dict[str, str] = {}
    factor: dict[str, float] = {}
    derive: dict[str, Interval] = {}
    date_format: str = ""
    decimal: Literal[".", ","] = "."


class CsvSource(ColumnMapping):
    """A text file, optionally compressed, read in parts of bounded size.

    ``path``: relative to the data folder (``--data FOLDER``) or to ``hospital.toml``.
    ``also``: further files with the same columns, read after it.
    ``header``: the file's column names when it has no header line.
    """

    kind: Literal["csv"]
    path: Name
    also: tuple[Name, ...] = ()
    header: tuple[str, ...] = ()
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    encoding: str = "utf-8"


class ParquetSource(ColumnMapping):
    """A Parquet file, or a folder of them, read in batches and only the columns needed."""

    kind: Literal["parquet"]
    path: Name


class NpzSource(ColumnMapping):
    """Arrays by name, for images and prepared tables; read whole."""

    kind: Literal["npz"]
    path: Name


class SklearnSource(ColumnMapping):
    """A data set that ships with scikit-learn, named by ``path``."""

    kind: Literal["sklearn"]
    path: Name


class ClinicalColumn(Strict):
    """One column worked out of a patient's coded records: give ``observation`` or ``condition``.

    ``observation``: codes of measurements (LOINC, or concept ids in OMOP); ``pick`` chooses among
    several, and ``unit`` is what the value comes out in: other units are converted or left out.
    ``condition``: codes of diagnoses (SNOMED CT, or concept ids); 1 where one is on record, else 0.
    ``when``: ``before`` looks at everything up to the end of the row's visit, ``after`` at
    everything later (for an outcome); ``within_days`` looks only so far.
    """

    observation: tuple[str, ...] = ()
    condition: tuple[str, ...] = ()
    pick: Literal["last", "first", "min", "max", "mean"] = "last"
    unit: str = ""
    when: Literal["before", "after"] = "before"
    within_days: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.observation) == bool(self.condition):
            raise ValueError("give either observation = [codes] or condition = [codes]")
        if self.condition and (self.unit or self.pick != "last"):
            raise ValueError("unit and pick belong to an observation; leave them out")
        return self


class ClinicalMapping(ColumnMapping):
    """Rows made of coded records: one for each visit, or one for each patient.

    Each row has the columns ``patient``, ``sex`` (male, female, other, unknown), ``birth_date``,
    ``death_date``, ``deceased`` (0, 1), ``start``, ``end``, ``visit`` (AMB, EMER, IMP, …), and
    those of ``columns``. A patient's row spans all visits.
    """

    row: Literal["visit", "patient"] = "visit"
    visits: tuple[str, ...] = ()
    columns: dict[str, ClinicalColumn] = {}


class FhirSource(ClinicalMapping):
    """A folder of FHIR R4 bundles (JSON), each with whole patients."""

    kind: Literal["fhir"]
    path: Name


class LabelTable(Strict):
    """A CSV file beside images that says what is known of each.

    ``key``: its column; ``by``: what that column holds: the ``file`` (path below the source's
    folder), or of DICOM files the ``patient`` (PatientID), the ``study`` or the ``image`` (UIDs).
    """

    path: Name
    key: Name
    by: Literal["file", "patient", "study", "image"] = "file"


class DicomSource(ColumnMapping):
    """A folder of DICOM files; PatientID is the privacy unit. What is broken is named and skipped.

    ``modality``: only these; else every image but segmentations and radiotherapy doses.
    ``frames``: of a multi-frame image the ``first``, the ``middle`` one, or ``all`` as rows.
    ``window``: ``header`` (the image's own, else its whole range), or [centre, width] for all.
    ``burned_in``: what happens to images that declare text in their pixels.
    """

    kind: Literal["dicom"]
    path: Name
    modality: tuple[str, ...] = ()
    frames: Literal["first", "middle", "all"] = "middle"
    window: Literal["header"] | tuple[float, float] = "header"
    burned_in: Literal["skip", "keep"] = "skip"
    labels: LabelTable | None = None

    @model_validator(mode="after")
    def _window_is_wide(self) -> Self:
        if self.window != "header" and self.window[1] < 1:
            raise ValueError(f"window = [centre, width] needs a width from 1, found {self.window}")
        return self


class ImagesSource(ColumnMapping):
    """A folder of PNG or JPEG files. Each has ``file`` (its path) and ``folder`` (its folder).

    ``patient``: the label table's column with the patient; else ``patient_pattern``, a regular
    expression whose one group finds the patient in ``file``.
    """

    kind: Literal["images"]
    path: Name
    patient: str = ""
    patient_pattern: str = ""
    labels: LabelTable | None = None

    @model_validator(mode="after")
    def _somebody_is_named(self) -> Self:
        if bool(self.patient) == bool(self.patient_pattern):
            raise ValueError("whose images these are: give either patient or patient_pattern")
        if self.patient and self.labels is None:
            raise ValueError("patient names a column of the label table: give labels")
        if self.labels and self.labels.by != "file":
            raise ValueError(f"labels.by: expected 'file', found {self.labels.by!r}")
        return self


# Tables that the coordinator reads too: its public corpus is one.
TableSource = Annotated[
    CsvSource | ParquetSource | NpzSource | SklearnSource, Field(discriminator="kind")
]
SourceSpec = Annotated[
    CsvSource | ParquetSource | NpzSource | SklearnSource | FhirSource | DicomSource | ImagesSource,
    Field(discriminator="kind"),
]
