"""Every source a `hospital.toml` may name: those of a study file, and the hospital's databases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from common.errors import SecretError
from common.secretfiles import CREDENTIALS_VARIABLE, check_private
from common.sources import (
    ClinicalMapping,
    ColumnMapping,
    CsvSource,
    DicomSource,
    FhirSource,
    ImagesSource,
    Name,
    NpzSource,
    ParquetSource,
    SklearnSource,
)
from common.strict import Strict

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

_DRIVERS = ("sqlite", "postgresql+psycopg")


class SecretReference(Strict):
    """Where a secret is: an environment variable ``env``, or a ``file`` that only we can read."""

    env: str = ""
    file: str = ""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if bool(self.env) == bool(self.file):
            raise ValueError("give either env = 'VARIABLE' or file = 'PATH' (mode 600)")
        return self

    def read(self, folder: Path, environ: Mapping[str, str] = os.environ) -> str:
        """The secret itself; raises SecretError when it is not there or others can read it."""
        if self.env:
            if not environ.get(self.env):
                raise SecretError(
                    f"the environment variable {self.env} is not set; it should hold the "
                    f"database's password"
                )
            return environ[self.env]
        path = folder / self.file
        credentials = environ.get(CREDENTIALS_VARIABLE)
        check_private(
            path, handed_over=bool(credentials) and path.parent == Path(credentials or "")
        )
        return path.read_text(encoding="utf-8").strip()


class Database(Strict):
    """Where a database is. It is only ever read, in transactions that cannot write.

    ``url``: ``sqlite:///FILE`` (relative to `hospital.toml`) or ``postgresql+psycopg://…``, without
    a password; ``password`` says where that is.
    """

    url: Name
    password: SecretReference | None = None

    @model_validator(mode="after")
    def _no_secret_in_clear(self) -> Self:
        from sqlalchemy.engine import make_url  # noqa: PLC0415  (slow; few hospitals need it)
        from sqlalchemy.exc import ArgumentError  # noqa: PLC0415

        try:
            url = make_url(self.url)
        except ArgumentError:
            raise ValueError(
                "url: expected sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE"
            ) from None
        if url.password is not None or any("password" in key.lower() for key in url.query):
            raise ValueError(
                "url: found a password in clear text; take it out, change it, and say where it is "
                "with password = { env = 'VARIABLE' } or { file = 'PATH' }"
            )
        if url.drivername not in _DRIVERS:
            raise ValueError(f"url: expected {' or '.join(_DRIVERS)}, found {url.drivername!r}")
        return self

    def resolved(self, folder: Path) -> URL:
        """The URL to connect with; its text form hides the password."""
        from sqlalchemy.engine import make_url  # noqa: PLC0415

        url = make_url(self.url)
        return url.set(password=self.password.read(folder)) if self.password else url


class SqlSource(ColumnMapping, Database):
    """A table or view of a database, or a query of the hospital's own.

    ``table``: its name, with a schema before a point where there is one.
    ``query``: a SELECT written by the hospital; never anybody else's words.
    ``key``: columns that order the rows, such as a primary key; all that are read, if left out.
    """

    kind: Literal["sql"]
    table: str = ""
    query: str = ""
    key: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _table_or_query(self) -> Self:
        if bool(self.table) == bool(self.query):
            raise ValueError("give either table = 'NAME' or query = 'SELECT …'")
        return self


class OmopSource(ClinicalMapping, Database):
    """A database in the OMOP common data model (5.3 or 5.4): codes are concept ids.

    ``cdm_schema``: where its tables are; ``descendants``: a condition's concept also stands for
    those below it (``concept_ancestor``).
    """

    kind: Literal["omop"]
    cdm_schema: str = ""
    descendants: bool = False

    @model_validator(mode="after")
    def _codes_are_numbers(self) -> Self:
        for name, column in self.columns.items():
            for code in (*column.observation, *column.condition):
                if not code.isdecimal():
                    raise ValueError(f"columns.{name}: expected concept ids, found {code!r}")
        return self


HospitalSource = Annotated[
    CsvSource
    | ParquetSource
    | NpzSource
    | SklearnSource
    | FhirSource
    | DicomSource
    | ImagesSource
    | SqlSource
    | OmopSource,
    Field(discriminator="kind"),
]
