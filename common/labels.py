"""What a study asks about its records: the outcome, in public terms every hospital agrees on.

A kind of outcome is one class here and one reading in ``outcomes``. All are told apart by ``kind``;
left out, it is ``classes``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Tag, model_validator

from common.strict import Strict, told_by_kind

Scalar = float | int | str | bool
Values = Annotated[tuple[Scalar, ...], Field(min_length=1)]


class ClassLabel(Strict):
    """One of several classes. ``classes`` in order: class 0 first; each lists the raw values it
    gathers. Labels are class indices, int64 [rows]; -1 where unknown."""

    kind: Literal["classes"] = "classes"
    name: str = Field(min_length=1)
    classes: tuple[tuple[Scalar, ...], ...] = Field(min_length=2)
    class_names: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _classes_are_disjoint(self) -> Self:
        values = [value for group in self.classes for value in group]
        if len(values) != len(set(values)) or not all(self.classes):
            raise ValueError(f"classes must be non-empty and share no value, found {self.classes}")
        if self.class_names and len(self.class_names) != len(self.classes):
            raise ValueError(
                f"expected {len(self.classes)} class_names, one per class, "
                f"found {len(self.class_names)}"
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The study columns it is read from."""
        return (self.name,)

    def words(self) -> str:
        """What is asked, for a reader."""
        names = self.class_names or tuple(str(group[0]) for group in self.classes)
        return f"predict {self.name} ({' or '.join(names)})"

    def unknown(self, rows: int) -> NDArray[Any]:
        """Labels of ``rows`` records of which nothing is known."""
        return np.full(rows, -1, dtype=np.int64)

    @property
    def groups(self) -> int:
        """How many ``strata`` there are."""
        return len(self.classes)

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Alike records have one number: folds hold each in equal share."""
        return labels

    def cells(self, label: Any) -> list[Any]:
        """One record's label as its columns' raw values; empty where unknown."""
        return [self.classes[label][0] if label >= 0 else ""]


class SurvivalLabel(Strict):
    """Time until an event, or until the record ends without it (right-censored).

    ``name``: the column of times in ``unit``, ``range``: their plausible values. ``event``: the
    column that says how the time ended, by the values of ``seen`` and ``censored``. ``cuts``: the
    ends of the intervals in which the hazard is modelled, public and ascending; what happens after
    the last is not modelled. ``typical``: published shares still without the event at the cuts,
    from which a model starts. Labels are float32 [rows, 2]: time, and 1 where the event was seen.
    """

    kind: Literal["survival"]
    name: str = Field(min_length=1)
    unit: str = "days"
    range: tuple[float, float]
    event: str = Field(min_length=1)
    seen: Values = (1,)
    censored: Values = (0,)
    cuts: Annotated[tuple[float, ...], Field(min_length=2)]
    typical: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _times_ascend(self) -> Self:
        low, high = self.range
        if not 0 <= low < high:
            raise ValueError(f"range = [lowest, highest] of times, found {list(self.range)}")
        if any(a >= b for a, b in zip((0.0, *self.cuts), self.cuts, strict=False)):
            raise ValueError(f"cuts must ascend from above 0, found {list(self.cuts)}")
        if set(self.seen) & set(self.censored):
            raise ValueError("seen and censored must share no value")
        curve = (1.0, *(self.typical or ()), 0.0)
        if self.typical is not None and (
            len(self.typical) != len(self.cuts) or any(a <= b for a, b in pairwise(curve))
        ):
            raise ValueError(
                f"typical: expected {len(self.cuts)} shares, one at each cut, that fall from below "
                f"1 and stay above 0, found {list(self.typical)}"
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The study columns it is read from."""
        return (self.name, self.event)

    def words(self) -> str:
        """What is asked, for a reader."""
        return f"time until {self.event}, up to {self.cuts[-1]:g} {self.unit}"

    def unknown(self, rows: int) -> NDArray[Any]:
        """Labels of ``rows`` records of which nothing is known."""
        return np.full((rows, 2), np.nan, dtype=np.float32)

    @property
    def groups(self) -> int:
        """How many ``strata`` there are."""
        return 2

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Whether the event was seen."""
        return (labels[:, 1] > 0).astype(np.int64)

    def cells(self, label: Any) -> list[Any]:
        """One record's label as its columns' raw values; empty where unknown."""
        time, event = label.tolist()
        if np.isnan(time):
            return ["", ""]
        return [repr(time), self.seen[0] if event else self.censored[0]]


class NumberLabel(Strict):
    """A number in ``unit``, held within ``range``. Labels are float32 [rows, 1]; NaN: unknown.

    ``typical``: published mean and standard deviation; else taken from the range.
    """

    kind: Literal["number"]
    name: str = Field(min_length=1)
    unit: str = ""
    range: tuple[float, float]
    typical: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _range_is_one(self) -> Self:
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range = [lowest, highest], found {list(self.range)}")
        if self.typical is not None and self.typical[1] <= 0:
            raise ValueError(
                f"typical = [mean, standard deviation] needs a standard deviation above 0, "
                f"found {self.typical[1]}"
            )
        return self

    @property
    def scale(self) -> tuple[float, float]:
        """The mean and standard deviation by which a model sees it: public."""
        low, high = self.range
        return self.typical or ((low + high) / 2, (high - low) / 4)

    @property
    def columns(self) -> tuple[str, ...]:
        """The study columns it is read from."""
        return (self.name,)

    def words(self) -> str:
        """What is asked, for a reader."""
        return f"predict {self.name}" + (f" in {self.unit}" if self.unit else "")

    def unknown(self, rows: int) -> NDArray[Any]:
        """Labels of ``rows`` records of which nothing is known."""
        return np.full((rows, 1), np.nan, dtype=np.float32)

    @property
    def groups(self) -> int:
        """How many ``strata`` there are."""
        return 2

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Below or above the middle of the scale."""
        return (labels[:, 0] > self.scale[0]).astype(np.int64)

    def cells(self, label: Any) -> list[Any]:
        """One record's label as its columns' raw values; empty where unknown."""
        return ["" if np.isnan(label[0]) else repr(float(label[0]))]


class EffectLabel(Strict):
    """What a treatment changed: a number ``name`` after a treatment that some received.

    ``treatment``: the column that says who, by the values of ``treated`` and ``untreated``.
    ``truth``: columns with the expected outcome without and with treatment, which only made-up
    patients have; nothing is ever learned from them, a simulation measures by them. Labels are
    float32 [rows, 4]: treated (1 or 0), outcome, and the two of ``truth`` (NaN without).
    """

    kind: Literal["effect"]
    name: str = Field(min_length=1)
    unit: str = ""
    range: tuple[float, float]
    typical: tuple[float, float] | None = None
    treatment: str = Field(min_length=1)
    treated: Values = (1,)
    untreated: Values = (0,)
    truth: tuple[str, str] | None = None

    @model_validator(mode="after")
    def _arms_differ(self) -> Self:
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range = [lowest, highest], found {list(self.range)}")
        if set(self.treated) & set(self.untreated):
            raise ValueError("treated and untreated must share no value")
        return self

    @property
    def scale(self) -> tuple[float, float]:
        """The mean and standard deviation by which a model sees the outcome: public."""
        low, high = self.range
        return self.typical or ((low + high) / 2, (high - low) / 4)

    @property
    def columns(self) -> tuple[str, ...]:
        """The study columns it is read from."""
        return (self.treatment, self.name, *(self.truth or ()))

    def words(self) -> str:
        """What is asked, for a reader."""
        return f"the effect of {self.treatment} on {self.name}"

    def unknown(self, rows: int) -> NDArray[Any]:
        """Labels of ``rows`` records of which nothing is known."""
        return np.full((rows, 4), np.nan, dtype=np.float32)

    @property
    def groups(self) -> int:
        """How many ``strata`` there are."""
        return 2

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Treated or not."""
        return (labels[:, 0] > 0).astype(np.int64)

    def cells(self, label: Any) -> list[Any]:
        """One record's label as its columns' raw values; empty where unknown."""
        treated, *numbers = label.tolist()
        arm = "" if np.isnan(treated) else (self.treated if treated else self.untreated)[0]
        shown = ["" if np.isnan(one) else repr(one) for one in numbers]
        return [arm, shown[0], *(shown[1:] if self.truth else [])]


class SeveralLabel(Strict):
    """Several yes-or-no outcomes at once, each of which may be unknown (an assay not run).

    ``names``: their columns, by the values of ``positive`` and ``negative``. Labels are float32
    [rows, outcomes]: 1, 0, or NaN where unknown; a record with none known is left out.
    """

    kind: Literal["several"]
    name: str = Field(min_length=1)
    names: Annotated[tuple[str, ...], Field(min_length=2)]
    positive: Values = (1,)
    negative: Values = (0,)

    @model_validator(mode="after")
    def _values_differ(self) -> Self:
        if set(self.positive) & set(self.negative):
            raise ValueError("positive and negative must share no value")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The study columns it is read from."""
        return self.names

    def words(self) -> str:
        """What is asked, for a reader."""
        return f"predict {self.name} ({', '.join(self.names)})"

    def unknown(self, rows: int) -> NDArray[Any]:
        """Labels of ``rows`` records of which nothing is known."""
        return np.full((rows, len(self.names)), np.nan, dtype=np.float32)

    @property
    def groups(self) -> int:
        """How many ``strata`` there are."""
        return 2

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Whether any outcome is positive."""
        found: NDArray[np.bool_] = (np.nan_to_num(labels) > 0).any(axis=1)
        return found.astype(np.int64)

    def cells(self, label: Any) -> list[Any]:
        """One record's label as its columns' raw values; empty where unknown."""
        return [
            "" if np.isnan(one) else (self.positive if one else self.negative)[0] for one in label
        ]


class TextLabel(Strict):
    """The text itself: each of its tokens is told from those before it. There is no column beside
    the record's own. Labels are its token ids, int32 [rows, length], 0 behind a text's end;
    [rows, 0] where they are not to be looked at."""

    kind: Literal["text"]

    name: ClassVar[str] = "text"
    columns: ClassVar[tuple[str, ...]] = ()
    groups: ClassVar[int] = 1

    def words(self) -> str:
        """What is asked, for a reader."""
        return "continue texts, token by token"

    def unknown(self, rows: int) -> NDArray[Any]:
        """Labels of ``rows`` records of which nothing is known."""
        return np.zeros((rows, 0), dtype=np.int32)

    def strata(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """All alike."""
        return np.zeros(len(labels), dtype=np.int64)

    def cells(self, label: Any) -> list[Any]:  # noqa: ARG002
        """None: the record says it all."""
        return []


Label = Annotated[
    Annotated[ClassLabel, Tag("classes")]
    | Annotated[SurvivalLabel, Tag("survival")]
    | Annotated[NumberLabel, Tag("number")]
    | Annotated[EffectLabel, Tag("effect")]
    | Annotated[SeveralLabel, Tag("several")]
    | Annotated[TextLabel, Tag("text")],
    told_by_kind("classes"),
]
