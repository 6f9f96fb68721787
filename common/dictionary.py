"""The data dictionary: what each column means, in public terms every hospital agrees on.

Everything here is public. In particular ``range``, ``typical`` and ``shares`` come from the
literature or the device, never from patients' rows.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isclose
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.labels import Label, Scalar
from common.pins import Pinned
from common.strict import Count, Strict

PADDING = 0  # the id of no token, behind a text's end
BYTES = 258  # ids of ``tokenizer = "bytes"``: every byte, padding and a text's end

_ALONE = ("image", "text", "molecule")  # kinds that are a whole record


class Column(Strict):
    """One column of the study.

    ``kind``: ``numeric`` (needs ``range``), ``binary`` or ``categorical`` (need ``categories``),
    ``image`` (needs ``shape``: height, width), ``text`` (needs ``length`` and ``vocabulary``),
    ``code`` (one of very many, such as a diagnosis; needs ``buckets``), or ``molecule`` (a SMILES;
    see docs/molecules.md).
    ``range``: plausible lowest and highest value in ``unit``; outside is reported and clipped.
    ``typical``: published mean and standard deviation, for scaling; else taken from the range.
    ``shares``: published share of each category, adding up to 1; inputs are centred by them, and
    records made up from the dictionary are drawn by them.
    ``missing``: values that mean "not measured" beside an empty cell (a cholesterol of 0).
    ``optional``: whether a value may be absent; if so the model also sees that it is absent.
    ``standardise``: an image's own brightness and contrast, which say more of the device than of
    the patient, are taken out of it.
    ``prefix``: how many characters of a code count (the first three of an ICD code name the
    disease). ``buckets``: codes fall into so many by a public hash, the same everywhere.
    ``keep``: the model sees only so many buckets, the most frequent ones of the public corpus or of
    all patients (charged), as the study's ``scaling`` says; all of them if left out.
    ``length``: how many tokens of a text are read. ``vocabulary``: how many different tokens there
    are, padding among them. ``tokenizer``: the file ``tokenizer.json`` of a pre-trained model, or
    ``bytes`` for a text's own bytes, a rule that needs no file and whose ids can be read again;
    left out, words are hashed into the vocabulary.
    ``bits``: length of a molecule's fingerprint. ``atoms``: the most atoms of its graph, for
    networks of ``kind = "graph"``. ``tokens``: the most tokens of its SMILES, for networks of
    ``kind = "transformer"``.
    """

    name: str = Field(min_length=1)
    kind: Literal["numeric", "binary", "categorical", "image", "text", "code", "molecule"]
    unit: str = ""
    description: str = ""
    range: tuple[float, float] | None = None
    typical: tuple[float, float] | None = None
    categories: tuple[Scalar, ...] = ()
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None
    shape: tuple[int, int] | None = None
    length: Count | None = None
    vocabulary: Annotated[int, Field(ge=16, lt=2**31)] | None = None
    tokenizer: Pinned | Literal["bytes"] | None = None
    missing: tuple[Scalar, ...] = ()
    optional: bool = True
    standardise: bool = False
    prefix: Count | None = None
    buckets: Annotated[int, Field(ge=2, le=65536)] | None = None
    keep: Count | None = None
    bits: Annotated[int, Field(ge=16, le=16384)] = 1024
    atoms: Annotated[int, Field(ge=0, le=512)] = 0
    tokens: Annotated[int, Field(ge=0, le=512)] = 0

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> Self:
        problem = _PROBLEMS[self.kind](self)
        if problem:
            raise ValueError(problem)
        if self.standardise and self.kind != "image":
            raise ValueError(f"standardise belongs to kind = 'image', found it on {self.kind!r}")
        if self.kind != "code" and (self.prefix or self.buckets or self.keep):
            raise ValueError(
                f"prefix, buckets and keep belong to kind = 'code', found them on kind = "
                f"{self.kind!r}"
            )
        if self.shares is not None and not self.categories:
            raise ValueError(
                f"shares belong to binary and categorical columns, found them on {self.kind!r}"
            )
        return self


def _numeric_problem(column: Column) -> str:
    if column.range is None or not column.range[0] < column.range[1]:
        return (
            f"a numeric column needs range = [lowest, highest] with lowest below highest, "
            f"found {column.range}"
        )
    if any(code in column.range for code in column.missing):
        return (
            f"missing codes {list(column.missing)} must differ from both ends of range = "
            f"{list(column.range)}, to which implausible values are clipped"
        )
    if column.typical is not None and column.typical[1] <= 0:
        return (
            f"typical = [mean, standard deviation] needs a standard deviation above 0, "
            f"found {column.typical[1]}"
        )
    return ""


def _category_problem(column: Column) -> str:
    given = column.categories
    if len(given) < 2 or len(set(given)) != len(given):
        return (
            f"a {column.kind} column needs at least two different categories, found {list(given)}"
        )
    if column.kind == "binary" and len(given) != 2:
        return f"a binary column needs exactly two categories, found {len(given)}"
    shares = column.shares
    if shares is not None and (len(shares) != len(given) or not isclose(sum(shares), 1)):
        return (
            f"shares need one number for each of the {len(given)} categories, adding up to 1, "
            f"found {list(shares)}"
        )
    return ""


def _image_problem(column: Column) -> str:
    if column.shape is None or min(column.shape) < 1:
        return f"an image column needs shape = [height, width], found {column.shape}"
    return ""


def _text_problem(column: Column) -> str:
    if column.length is None or column.vocabulary is None:
        return (
            f"a text column needs length and vocabulary, in tokens, "
            f"found {column.length} and {column.vocabulary}"
        )
    if column.tokenizer == "bytes" and column.vocabulary != BYTES:
        return (
            f"tokenizer = 'bytes' has vocabulary = {BYTES} (256 bytes, padding, a text's end), "
            f"found {column.vocabulary}"
        )
    return ""


def _code_problem(column: Column) -> str:
    if column.buckets is None or (column.keep is not None and column.keep >= column.buckets):
        return (
            f"a code column needs buckets = N, and keep (if any) below that, found buckets "
            f"= {column.buckets} and keep = {column.keep}"
        )
    return ""


# What a column of each kind lacks, in words; nothing where it is sound.
_PROBLEMS: dict[str, Callable[[Column], str]] = {
    "numeric": _numeric_problem,
    "binary": _category_problem,
    "categorical": _category_problem,
    "image": _image_problem,
    "text": _text_problem,
    "code": _code_problem,
    "molecule": lambda _: "",
}


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
        alone = [column.kind for column in self.columns if column.kind in _ALONE]
        if alone and len(self.columns) > 1:
            raise ValueError(
                f"a study on {alone[0]}s has the {alone[0]} as its only column, "
                f"found {len(self.columns)}"
            )
        return self

    @property
    def modality(self) -> str:
        """What a record is: ``table``, ``image``, ``text`` or ``molecule``."""
        kind = self.columns[0].kind
        return kind if kind in _ALONE else "table"

    @property
    def asks(self) -> str:
        """What a model must be made for: its ``modality``, or ``language`` where the answer is the
        text itself."""
        return "language" if self.label.kind == "text" else self.modality

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width when the study is on images."""
        return self.columns[0].shape

    @property
    def text(self) -> Column | None:
        """The column that is a record's text when the study is on texts."""
        return self.columns[0] if self.modality == "text" else None
