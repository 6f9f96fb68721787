"""How large a network is and of what kind: one class for each kind, told apart by ``kind``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeVar, get_args

from pydantic import Field, Tag, field_validator, model_validator

from common.pins import Pinned
from common.strict import Count, Positive, Strict, told_by_kind

Setting = bool | int | float | str
Attending = TypeVar("Attending", "VitSpec", "TransformerSpec", "CausalSpec")


def _heads_divide_the_width(spec: Attending) -> Attending:
    if spec.width % spec.heads:
        raise ValueError(f"heads: expected a divisor of width {spec.width}, found {spec.heads}")
    return spec


class MlpSpec(Strict):
    """Layers of plain numbers, for tables and the fingerprints of molecules.

    ``hidden``: widths of the hidden layers. ``skip``: the head also sees the inputs themselves
    (a teacher only).
    """

    reads: ClassVar[tuple[str, ...]] = ("table", "molecule")

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Count, ...] = Field(min_length=1)
    skip: bool = False


class ComponentsSpec(Strict):
    """Principal components of the public records, for tables and the fingerprints of molecules; a
    teacher only. Nothing is trained before the patients come: ``pretrain.steps = 0``.

    ``width``: how many components.
    """

    reads: ClassVar[tuple[str, ...]] = ("table", "molecule")

    kind: Literal["components"]
    width: Count = 192


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

    _heads_share = model_validator(mode="after")(_heads_divide_the_width)


class GraphSpec(Strict):
    """Messages between bonded atoms (Gilmer et al. 2017), for molecules; needs the column's
    ``atoms``. ``hidden``: the width of the atoms after each layer of messages; a teacher's last is
    the width of its code."""

    reads: ClassVar[tuple[str, ...]] = ("molecule",)

    kind: Literal["graph"]
    hidden: tuple[Count, ...] = Field(min_length=2)


class TransformerSpec(Strict):
    """Attention over tokens, for texts and for the SMILES of molecules, which need the column's
    ``tokens``; trained from nothing.

    ``layers``: 0 leaves a bag of words: of their learned embeddings of ``width`` numbers the mean,
    and the largest of each number. As the student of a pre-trained teacher it learns a map of that
    model's word vectors.
    """

    reads: ClassVar[tuple[str, ...]] = ("text", "molecule")

    kind: Literal["transformer"]
    width: Count = 64
    layers: Annotated[int, Field(ge=0)] = 2
    heads: Count = 4

    _heads_share = model_validator(mode="after")(_heads_divide_the_width)


class CausalSpec(Strict):
    """Attention over the tokens before each, for ``task = "language"``; trained from nothing."""

    reads: ClassVar[tuple[str, ...]] = ("language",)

    kind: Literal["causal"]
    width: Count = 64
    layers: Count = 2
    heads: Count = 4

    _heads_share = model_validator(mode="after")(_heads_divide_the_width)


class PretrainedSpec(Pinned):
    """A model that others pre-trained, for texts; a teacher only, and never fetched.

    ``folder``: its folder below ``CONSILIUM_MODELS``, in Hugging Face's layout. ``sha256``: of its
    ``model.safetensors``. ``layers``: whose outputs, each averaged over the tokens, make the code;
    -1 is the last.
    """

    reads: ClassVar[tuple[str, ...]] = ("text",)

    kind: Literal["pretrained"]
    layers: tuple[int, ...] = Field((-1,), min_length=1)


class OwnSpec(Strict):
    """A network that somebody else wrote (docs/own-task.md).

    ``family``: the entry point under which an installed package offers it, or, in a simulation,
    ``module:object``. ``settings``: what it wants to know.
    """

    reads: ClassVar[tuple[str, ...]] = ("table", "image", "text", "molecule", "language")

    kind: Literal["own"]
    family: str = Field(min_length=1)
    settings: dict[str, Setting | tuple[Setting, ...]] = {}


class LoraSpec(Strict):
    """Low-rank corrections of frozen layers (Hu et al. 2021), for ``trainable = "lora"``.

    ``kind``: ``ffa`` draws one factor from the study's seed and trains the other (FFA-LoRA, Sun et
    al. 2024, arXiv 2403.12313): then the mean of hospitals' factors is the mean of their
    corrections, and noise enters linearly; ``lora`` trains both.
    ``rank``: of a correction; ``scale`` / ``rank`` multiplies it. ``layers``: the last names of the
    Linear layers to be corrected.
    """

    kind: Literal["ffa", "lora"] = "ffa"
    rank: Count = 8
    scale: Positive = 16.0
    layers: tuple[str, ...] = Field(("query", "value"), min_length=1)

    @field_validator("kind", mode="before")
    @classmethod
    def _no_dora(cls, kind: object) -> object:
        if kind == "dora":
            raise ValueError(f"{NO_DORA}; did you mean 'ffa' or 'lora'?")
        return kind


NO_DORA = (
    "DoRA divides a layer's weight by its norm, which is recomputed from what is trained: no rule "
    "gives a record's own gradient of that"
)


_Spec = (
    MlpSpec
    | ComponentsSpec
    | CnnSpec
    | VitSpec
    | GraphSpec
    | TransformerSpec
    | CausalSpec
    | PretrainedSpec
    | OwnSpec
)

MODELS: tuple[type[_Spec], ...] = (
    MlpSpec,
    ComponentsSpec,
    CnnSpec,
    VitSpec,
    GraphSpec,
    TransformerSpec,
    CausalSpec,
    PretrainedSpec,
    OwnSpec,
)

ModelSpec = Annotated[
    Annotated[MlpSpec, Tag("mlp")]
    | Annotated[ComponentsSpec, Tag("components")]
    | Annotated[CnnSpec, Tag("cnn")]
    | Annotated[VitSpec, Tag("vit")]
    | Annotated[GraphSpec, Tag("graph")]
    | Annotated[TransformerSpec, Tag("transformer")]
    | Annotated[CausalSpec, Tag("causal")]
    | Annotated[PretrainedSpec, Tag("pretrained")]
    | Annotated[OwnSpec, Tag("own")],
    told_by_kind("mlp"),
]


def kind_of(model: type[Strict]) -> str:
    """The word by which a study names this kind."""
    word: str = get_args(model.model_fields["kind"].annotation)[0]
    return word
