"""How large a network is and of what kind: one class for each kind, told apart by ``kind``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, Tag

from common.strict import Count, Strict, told_by_kind

Setting = bool | int | float | str


class MlpSpec(Strict):
    """Layers of plain numbers, for tables and the fingerprints of molecules.

    ``hidden``: widths of the hidden layers. ``skip``: the head also sees the inputs themselves
    (a teacher only).
    """

    reads: ClassVar[tuple[str, ...]] = ("table", "molecule")

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Count, ...] = Field(min_length=1)
    skip: bool = False


class CnnSpec(Strict):
    """Convolutions, for images. ``hidden``: channels of each halving stage; a teacher's last is
    the width of its code."""

    reads: ClassVar[tuple[str, ...]] = ("image",)

    kind: Literal["cnn"]
    hidden: tuple[Count, ...] = Field(min_length=1)


class GraphSpec(Strict):
    """Messages between bonded atoms (Gilmer et al. 2017), for molecules; needs the column's
    ``atoms``. ``hidden``: the width of the atoms after each layer of messages; a teacher's last is
    the width of its code."""

    reads: ClassVar[tuple[str, ...]] = ("molecule",)

    kind: Literal["graph"]
    hidden: tuple[Count, ...] = Field(min_length=2)


class OwnSpec(Strict):
    """A network that somebody else wrote (docs/own-task.md).

    ``family``: the entry point under which an installed package offers it, or, in a simulation,
    ``module:object``. ``settings``: what it wants to know.
    """

    reads: ClassVar[tuple[str, ...]] = ("table", "image", "molecule")

    kind: Literal["own"]
    family: str = Field(min_length=1)
    settings: dict[str, Setting | tuple[Setting, ...]] = {}


MODELS: tuple[type[MlpSpec | CnnSpec | GraphSpec | OwnSpec], ...] = (
    MlpSpec,
    CnnSpec,
    GraphSpec,
    OwnSpec,
)

ModelSpec = Annotated[
    Annotated[MlpSpec, Tag("mlp")]
    | Annotated[CnnSpec, Tag("cnn")]
    | Annotated[GraphSpec, Tag("graph")]
    | Annotated[OwnSpec, Tag("own")],
    told_by_kind("mlp"),
]


def kind_of(model: type[Strict]) -> str:
    """The word by which a study names this kind."""
    word: str = get_args(model.model_fields["kind"].annotation)[0]
    return word
