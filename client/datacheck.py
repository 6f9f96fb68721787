"""A hospital's own data against a study's dictionary, for the eyes of who sits at this machine.

Nothing here is sent, written or logged. The report says how each column was read; the preview shows
a few records as a model would see them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table as RichTable

from client.describe import printable
from client.hospital import own_records, simulated_dates_key
from client.hospitalfile import HospitalFile, load_hospital_file
from client.safe import open_safe
from common.dictionary import Column
from common.study import Study
from common.tables import Table

_SHADES = " .:-=+*#%@"
_PICTURE_WIDTH = 48


def check_own(folder: Path, study: Study) -> dict[str, Any]:
    """The harmonisation report of the hospital in ``folder``, under its name."""
    settings = load_hospital_file(folder)
    return {settings.name: asdict(_records(folder, settings, study).report)}


def preview_own(folder: Path, study: Study, rows: int) -> list[Any]:
    """The first records, to be printed. Patients are numbered, not named."""
    table = _records(folder, load_hospital_file(folder), study)
    shown = table.take(np.arange(min(rows, len(table))))
    numbers: dict[str, int] = {}
    patients = [numbers.setdefault(one, len(numbers) + 1) for one in shown.patients]
    label = study.dictionary.label
    outcomes = [", ".join(str(cell) for cell in label.cells(one)) for one in shown.labels]
    if study.dictionary.image_shape is not None:
        pictures = shown.values[study.dictionary.columns[0].name]
        found: list[Any] = []
        for patient, outcome, picture in zip(patients, outcomes, pictures, strict=True):
            found += [f"patient {patient}, {printable(label.name)} = {printable(outcome)}"]
            found += ascii_picture(picture)
        return found
    view = RichTable("patient", *(printable(one.name) for one in study.dictionary.columns))
    view.add_column(printable(label.name))
    for row, (patient, outcome) in enumerate(zip(patients, outcomes, strict=True)):
        cells = [cell_text(one, shown.values[one.name][row]) for one in study.dictionary.columns]
        view.add_row(str(patient), *(printable(one) for one in (*cells, outcome)))
    return [view]


def report_tables(reports: Mapping[str, Any], *, whole: bool) -> list[Any]:
    """One table a hospital, with its problems in words under it; ``whole``: sound columns too."""
    shown: list[Any] = []
    for name, report in reports.items():
        table = RichTable(
            title=f"{name}: {report['rows']} rows, {report['patients']} patients, "
            f"{report['unlabelled']} without a known label"
        )
        table.add_column("column")
        if whole:
            table.add_column("read from")
            table.add_column("converted")
        for heading in ("missing", "out of range", "unmapped"):
            table.add_column(heading, justify="right")
        for column in report["columns"]:
            counts = [column["missing"], column["out_of_range"], column["unmapped"]]
            if whole or any(counts):
                how = (column["source"], column["conversion"] or "·") if whole else ()
                figures = (_share(count, report["rows"]) for count in counts)
                table.add_row(*(printable(one) for one in (column["name"], *how, *figures)))
        shown.append(table if table.row_count else f"{name}: {report['rows']} rows, all in order")
        shown += [printable(f"  {problem}") for problem in report["problems"]]
        shown += [printable(f"  de-identified: {one}") for one in report["deidentified"]]
    return shown


def cell_text(column: Column, value: Any) -> str:
    """One value as the study means it; a dot where it is missing."""
    if column.kind == "numeric":
        return "·" if np.isnan(value) else f"{float(value):.6g}"
    if column.kind == "molecule":
        return str(value.decode()) or "·"
    if column.kind == "text":
        return f"{int((value > 0).sum())} tokens"
    if value < 0:
        return "·"
    return f"#{value}" if column.kind == "code" else str(column.categories[int(value)])


def ascii_picture(grey: NDArray[np.float32]) -> list[str]:
    """A picture in characters, for a terminal: enough to see text burned into it."""
    step = max(1, -(-grey.shape[1] // _PICTURE_WIDTH))
    # Characters are twice as high as wide.
    rows = grey[:: 2 * step, ::step]
    shades = (rows * (len(_SHADES) - 1)).round().astype(int)
    return ["".join(_SHADES[shade] for shade in row) for row in shades]


def _share(count: int, rows: int) -> str:
    return f"{count} ({count / rows:.0%})" if count else "·"


def _records(folder: Path, settings: HospitalFile, study: Study) -> Table:
    return own_records(settings, study, folder, _dates_key(folder, settings))


def _dates_key(folder: Path, settings: HospitalFile) -> Callable[[], bytes]:
    """Opens the safe only when there are dates to shift."""
    if not settings.safe:
        return lambda: simulated_dates_key(folder)

    def from_safe() -> bytes:
        with open_safe(folder / settings.safe) as safe:
            return safe.dates_key()

    return from_safe
