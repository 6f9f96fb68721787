"""The data dictionary: what each column means, in public terms every hospital agrees on.

Everything here is public. In particular ``range`` and ``typical`` come from the literature or the
device, never from patients' rows.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.labels import Label, Scalar
from common.pins import Pinned
from common.strict import Count, Strict


class Column(Strict):
    """One column of the study.

    ``kind``: ``numeric`` (needs ``range``), ``binary`` or ``categorical`` (need ``categories``),
    ``image`` (needs ``shape``: height, width), ``text`` (needs ``length`` and ``vocabulary``).
    ``range``: plausible lowest and highest value in ``unit``; outside is reported and clipped.
    ``typical``: published mean and standard deviation, for scaling; else taken from the range.
    ``missing``: values that mean "not measured" beside an empty cell (a cholesterol of 0).
    ``optional``: whether a value may be absent; if so the model also sees that it is absent.
    ``length``: how many tokens of a text are read. ``vocabulary``: how many different tokens there
    are, padding among them. ``tokenizer``: the file ``tokenizer.json`` of a pre-trained model; left
    out, words are hashed into the vocabulary.
    """

    name: str = Field(min_length=1)
    kind: Literal["numeric", "binary", "categorical", "image", "text"]
    unit: str = ""
    description: str = ""
    range: tuple[float, float] | None = None
    typical: tuple[float, float] | None = None
    categories: tuple[Scalar, ...] = ()
    shape: tuple[int, int] | None = None
    length: Count | None = None
    vocabulary: Annotated[int, Field(ge=16, lt=2**31)] | None = None
    tokenizer: Pinned | None = None
    missing: tuple[Scalar, ...] = ()
    optional: bool = True

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
        elif self.kind == "text":
            if self.length is None or self.vocabulary is None:
                raise ValueError(
                    f"a text column needs length and vocabulary, in tokens, "
                    f"found {self.length} and {self.vocabulary}"
                )
        elif len(self.categories) < 2 or len(set(self.categories)) != len(self.categories):
            raise ValueError(
                f"a {self.kind} column needs at least two different categories, "
                f"found {list(self.categories)}"
            )
        elif self.kind == "binary" and len(self.categories) != 2:
            raise ValueError(
                f"a binary column needs exactly two categories, found {len(self.categories)}"
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
        whole = [column.kind for column in self.columns if column.kind in ("image", "text")]
        if whole and len(self.columns) > 1:
            raise ValueError(
                f"a study on {whole[0]}s has the {whole[0]} as its only column, "
                f"found {len(self.columns)}"
            )
        return self

    @property
    def modality(self) -> str:
        """What a record is: ``table``, ``image`` or ``text``."""
        kind = self.columns[0].kind
        return kind if kind in ("image", "text") else "table"

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width when the study is on images."""
        return self.columns[0].shape

    @property
    def text(self) -> Column | None:
        """The column that is a record's text when the study is on texts."""
        return self.columns[0] if self.modality == "text" else None
