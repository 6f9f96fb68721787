"""`hospital.toml`: which data, under which name, with which public size."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from client.sources.deidentify import DeidentificationRules
from client.sources.specs import HospitalSource
from common.compute import ComputeSpec
from common.enrolment import HospitalName
from common.errors import DataError
from common.secretfiles import replace_file
from common.strict import Strict, parse_strict

if TYPE_CHECKING:
    from common.study import Study

FILE_NAME = "hospital.toml"

_TEMPLATE = """\
# This hospital's data and public facts. Fill in and uncomment; `consilium hospital check` helps.

# As in the join code, and on the coordinator's page.
# name = "north"

# What you choose to say of your size, rounded; it weighs and divides. Your true count never leaves.
# declared_patients = 400

# The folder with keys, policy, ledger and log; "." is this one.
safe = "."

# The folder that holds pre-trained models, for studies that use one; see docs/text.md.
# models = "models"

# Where models run: auto (a GPU if there is one), cpu or cuda; see docs/gpu.md.
# [compute]
# device = "auto"

# The records: csv, parquet, npz, sql, omop, fhir, dicom or images; see docs/sources.md and the
# examples in deploy/examples/hospitals/. A path is relative to this file. Columns are named by each
# study's dictionary; `rename`, `recode` and `units` translate your words into the dictionary's.
# [source]
# kind = "csv"
# path = "export.csv"
# rename = { age = "age_years" }
# recode = { sex = { "F" = 0, "M" = 1 } }

# Direct identifiers are never read, dates are shifted, ages over 89 are capped; more of your own:
# [deidentify]
# drop = ["ward_*"]

# Another source for one study, by the study's name.
# [sources.heart]
# kind = "csv"
# path = "heart.csv"
"""


class HospitalFile(Strict):
    """``hospital.toml``.

    ``source``: the records; ``sources``: others for studies of these names. ``deidentify`` adds to
    what is removed before anything else sees a row.
    ``safe``: the folder made by `consilium hospital init`, with keys, policy, ledger and log. Left
    out, the hospital is a simulated one: it answers to any study laid out for it, its noise key
    lies beside this file, nothing it spends is remembered, and the privacy statement says that
    nothing is guaranteed.
    ``models``: the folder that holds pre-trained models, as if CONSILIUM_MODELS named it.
    ``compute``: where its models run.
    ``test_noise_seed``: repeatable test noise in place of secret noise, which PROTECTS NOBODY; for
    rehearsals on public data. Only this file can set it, and every statement will say so.
    """

    name: HospitalName
    declared_patients: int = Field(ge=1)
    source: HospitalSource
    sources: dict[str, HospitalSource] = {}
    deidentify: DeidentificationRules = DeidentificationRules()
    safe: str = ""
    models: str = ""
    compute: ComputeSpec = ComputeSpec()
    test_noise_seed: Annotated[int, Field(ge=0)] | None = None

    def source_of(self, study: Study) -> HospitalSource:
        """Where the records for ``study`` are."""
        return self.sources.get(study.name, self.source)

    def secret_variables(self) -> set[str]:
        """The environment variables that hold passwords of its databases."""
        sources = (self.source, *self.sources.values())
        passwords = (getattr(one, "password", None) for one in sources)
        return {one.env for one in passwords if one is not None and one.env}


def load_hospital_file(folder: Path) -> HospitalFile:
    """The settings in ``folder``. Raises DataError or StudyError in one line."""
    path = folder / FILE_NAME
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a hospital's folder needs one") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid TOML: {error}") from None
    return parse_strict(HospitalFile, tree, origin=str(path))


def write_template(folder: Path) -> Path:
    """A commented file to be filled in; an existing one is left alone."""
    path = folder / FILE_NAME
    if not path.exists():
        replace_file(path, _TEMPLATE.encode())
    return path
