"""From a hospital's source to the study's table: the one way in.

::

    source ▶ de-identified ▶ intervals derived ▶ ages capped ▶ in the dictionary's terms
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from client.sources.deidentify import AgesCapped, DeidentificationRules, Deidentified
from client.sources.fhir import FhirBundles
from client.sources.specs import HospitalSource, OmopSource, SqlSource
from common.derive import Derived
from common.dictionary import Dictionary
from common.readers import Source, open_table
from common.sources import DicomSource, FhirSource, ImagesSource
from common.tables import Table, harmonise

# In a simulation data are public, and dates are shifted by what everybody may know.
_PUBLIC_KEY = b"consilium simulation: no secret"


def read_records(
    spec: HospitalSource,
    dictionary: Dictionary,
    folder: Path,
    *,
    rules: DeidentificationRules,
    secret: Callable[[], bytes],
) -> Table:
    """A hospital's records for a study. Raises DataError in one line.

    ``secret``: the hospital's key for shifting dates; asked for only when there are dates.
    """
    opened = open_source(spec, dictionary, folder)
    owner = opened.patient or spec.rename.get(dictionary.patient_id, dictionary.patient_id)
    clean = Deidentified(opened, spec, rules, patient=owner, secret=secret)
    capped = AgesCapped(Derived(clean, spec), spec, rules)
    table = harmonise(capped, spec, dictionary)
    done = (*clean.done(), *capped.done())
    return replace(table, report=replace(table.report, deidentified=done))


def read_public(spec: HospitalSource, dictionary: Dictionary, folder: Path) -> Table:
    """The same for a simulation, whose data are public: the same steps, the same numbers."""
    return read_records(
        spec, dictionary, folder, rules=DeidentificationRules(), secret=lambda: _PUBLIC_KEY
    )


def open_source(spec: HospitalSource, dictionary: Dictionary, folder: Path) -> Source:
    """The reader of a source; paths are below ``folder``."""
    if isinstance(spec, FhirSource):
        return FhirBundles(spec, folder)
    if isinstance(spec, DicomSource):
        from client.sources.dicom import DicomFolder  # noqa: PLC0415  (pixels need Pillow)

        return DicomFolder(spec, folder, dictionary)
    if isinstance(spec, ImagesSource):
        from client.sources.images import ImageFolder  # noqa: PLC0415

        return ImageFolder(spec, folder, dictionary)
    if isinstance(spec, SqlSource):
        from client.sources.databases import SqlTable  # noqa: PLC0415  (SQLAlchemy is slow)

        return SqlTable(spec, folder)
    if isinstance(spec, OmopSource):
        from client.sources.omop import OmopTables  # noqa: PLC0415

        return OmopTables(spec, folder)
    return open_table(spec, folder)
