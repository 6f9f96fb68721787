"""How a file's columns become the study's columns, in words that both sides may read."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from common.dictionary import Scalar
from common.strict import Strict


class SourceSpec(Strict):
    """One table of records.

    ``kind``: ``csv`` (optionally compressed), ``npz`` (arrays by name), or ``sklearn`` (a data set
    that ships with scikit-learn, named by ``path``).
    ``path``: relative to the data folder (``--data FOLDER``) or to ``hospital.toml``.
    ``header``: the file's column names when it has no header line.
    ``rename``: study column → the file's column; columns of equal name need no entry.
    ``recode``: study column → {value in the file → value in the dictionary}.
    ``missing``: cells that mean "not measured" in every column.
    """

    kind: Literal["csv", "npz", "sklearn"]
    path: str = Field(min_length=1)
    header: tuple[str, ...] = ()
    rename: dict[str, str] = {}
    recode: dict[str, dict[str, Scalar]] = {}
    missing: tuple[str, ...] = ("", "?", "NA", "NaN", "nan")

    @model_validator(mode="after")
    def _header_is_for_csv(self) -> Self:
        if self.header and self.kind != "csv":
            raise ValueError(f"header belongs to kind = 'csv', found kind = {self.kind!r}")
        return self
