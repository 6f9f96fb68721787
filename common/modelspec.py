"""How large a network is and of what kind: one class for each kind, told apart by ``kind``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, Tag

from common.strict import Count, Strict, told_by_kind


class MlpSpec(Strict):
    """Layers of plain numbers, for tables.

    ``hidden``: widths of the hidden layers. ``skip``: the head also sees the inputs themselves
    (a teacher only).
    """

    reads: ClassVar[tuple[str, ...]] = ("table",)

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Count, ...] = Field(min_length=1)
    skip: bool = False


class CnnSpec(Strict):
    """Convolutions, for images. ``hidden``: channels of each halving stage; a teacher's last is
    the width of its code."""

    reads: ClassVar[tuple[str, ...]] = ("image",)

    kind: Literal["cnn"]
    hidden: tuple[Count, ...] = Field(min_length=1)


MODELS: tuple[type[MlpSpec | CnnSpec], ...] = (MlpSpec, CnnSpec)

ModelSpec = Annotated[
    Annotated[MlpSpec, Tag("mlp")] | Annotated[CnnSpec, Tag("cnn")], told_by_kind("mlp")
]


def kind_of(model: type[Strict]) -> str:
    """The word by which a study names this kind."""
    word: str = get_args(model.model_fields["kind"].annotation)[0]
    return word
