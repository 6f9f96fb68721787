"""How large a network is and of what kind: one class for each kind, told apart by ``kind``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, Tag, model_validator

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


class VitSpec(Strict):
    """A vision transformer, for images (Dosovitskiy et al. 2021).

    ``patch``: pixels on a side of the patches that it sees as one; ``width``: numbers of each,
    and of the code; ``depth``: layers; ``heads`` share the width.
    """

    reads: ClassVar[tuple[str, ...]] = ("image",)

    kind: Literal["vit"]
    patch: Count = 4
    width: Count = 64
    depth: Count = 2
    heads: Count = 4

    @model_validator(mode="after")
    def _heads_share(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, found {self.heads}")
        return self


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


MODELS: tuple[type[MlpSpec | CnnSpec | VitSpec | GraphSpec | OwnSpec], ...] = (
    MlpSpec,
    CnnSpec,
    VitSpec,
    GraphSpec,
    OwnSpec,
)

ModelSpec = Annotated[
    Annotated[MlpSpec, Tag("mlp")]
    | Annotated[CnnSpec, Tag("cnn")]
    | Annotated[VitSpec, Tag("vit")]
    | Annotated[GraphSpec, Tag("graph")]
    | Annotated[OwnSpec, Tag("own")],
    told_by_kind("mlp"),
]


def kind_of(model: type[Strict]) -> str:
    """The word by which a study names this kind."""
    word: str = get_args(model.model_fields["kind"].annotation)[0]
    return word
