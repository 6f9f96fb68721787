"""The data dictionary: what each column means, in public terms every hospital agrees on.

Everything here is public. In particular ``range`` and ``typical`` come from the literature or the
device, never from patients' rows.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.labels import Label, Scalar
from common.strict import Count, Strict


class Column(Strict):
    """One column of the study.

    ``kind``: ``numeric`` (needs ``range``), ``binary`` or ``categorical`` (need ``categories``),
    ``image`` (needs ``shape``: height, width), ``code`` (one of very many, such as a diagnosis;
    needs ``buckets``), or ``molecule`` (a SMILES; see docs/molecules.md).
    ``range``: plausible lowest and highest value in ``unit``; outside is reported and clipped.
    ``typical``: published mean and standard deviation, for scaling; else taken from the range.
    ``missing``: values that mean "not measured" beside an empty cell (a cholesterol of 0).
    ``optional``: whether a value may be absent; if so the model also sees that it is absent.
    ``prefix``: how many characters of a code count (the first three of an ICD code name the
    disease). ``buckets``: codes fall into so many by a public hash, the same everywhere.
    ``keep``: the model sees only so many buckets, the most frequent ones of the public corpus or of
    all patients (charged), as the study's ``scaling`` says; all of them if left out.
    ``bits``: length of a molecule's fingerprint. ``atoms``: the most atoms of its graph, for
    networks of ``kind = "graph"``.
    """

    name: str = Field(min_length=1)
    kind: Literal["numeric", "binary", "categorical", "image", "code", "molecule"]
    unit: str = ""
    description: str = ""
    range: tuple[float, float] | None = None
    typical: tuple[float, float] | None = None
    categories: tuple[Scalar, ...] = ()
    shape: tuple[int, int] | None = None
    missing: tuple[Scalar, ...] = ()
    optional: bool = True
    prefix: Count | None = None
    buckets: Annotated[int, Field(ge=2, le=65536)] | None = None
    keep: Count | None = None
    bits: Annotated[int, Field(ge=16, le=16384)] = 1024
    atoms: Annotated[int, Field(ge=0, le=512)] = 0

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> Self:
        if self.kind == "numeric":
            if self.range is None or not self.range[0] < self.range[1]:
                raise ValueError(
                    f"a numeric column needs range = [lowest, highest] with lowest below highest, "
                    f"found {self.range}"
                )
            if any(code in self.range for code in self.missing):
                raise ValueError(
                    f"missing codes {list(self.missing)} must differ from both ends of range = "
                    f"{list(self.range)}, to which implausible values are clipped"
                )
            if self.typical is not None and self.typical[1] <= 0:
                raise ValueError(
                    f"typical = [mean, standard deviation] needs a standard deviation above 0, "
                    f"found {self.typical[1]}"
                )
        elif self.kind == "image":
            if self.shape is None or min(self.shape) < 1:
                raise ValueError(
                    f"an image column needs shape = [height, width], found {self.shape}"
                )
        elif self.kind == "code":
            if self.buckets is None or (self.keep is not None and self.keep >= self.buckets):
                raise ValueError(
                    f"a code column needs buckets = N, and keep (if any) below that, found buckets "
                    f"= {self.buckets} and keep = {self.keep}"
                )
        elif self.kind == "molecule":
            pass
        elif len(self.categories) < 2 or len(set(self.categories)) != len(self.categories):
            raise ValueError(
                f"a {self.kind} column needs at least two different categories, "
                f"found {list(self.categories)}"
            )
        elif self.kind == "binary" and len(self.categories) != 2:
            raise ValueError(
                f"a binary column needs exactly two categories, found {len(self.categories)}"
            )
        if self.kind != "code" and (self.prefix or self.buckets or self.keep):
            raise ValueError(
                f"prefix, buckets and keep belong to kind = 'code', found them on kind = "
                f"{self.kind!r}"
            )
        return self


class Dictionary(Strict):
    """All columns of a study. ``patient_id`` names the column that identifies the privacy unit;
    empty when every row is another patient."""

    columns: tuple[Column, ...] = Field(min_length=1)
    label: Label
    patient_id: str = ""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [column.name for column in self.columns] + list(self.label.columns)
        if self.patient_id:
            names.append(self.patient_id)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"column names must differ, found {twice[0]!r} twice")
        alone = [column.kind for column in self.columns if column.kind in ("image", "molecule")]
        if alone and len(self.columns) > 1:
            raise ValueError(
                f"a study on {alone[0]}s has the {alone[0]} as its only column, "
                f"found {len(self.columns)}"
            )
        return self

    @property
    def modality(self) -> str:
        """What a record is: ``table``, ``image`` or ``molecule``."""
        kind = self.columns[0].kind
        return kind if kind in ("image", "molecule") else "table"

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width when the study is on images."""
        return self.columns[0].shape
