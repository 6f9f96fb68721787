"""How each kind of network becomes a teacher's encoder or a student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from common import plugins
from common.errors import StudyError
from common.features import FeatureMap
from common.models.causal import CausalEncoder
from common.models.components import Components
from common.models.graphs import GraphEncoder
from common.models.networks import First, image_encoder, image_student, table_encoder
from common.models.pretrained import PinnedEncoder
from common.models.transformer import TokenEncoder
from common.models.vision import VisionTransformer
from common.modelspec import ModelSpec, OwnSpec

Encoder = Callable[[Any, FeatureMap], tuple[nn.Module, int]]


@dataclass(frozen=True)
class Family:
    """``encoder(spec, features)``: records → code [rows, width], and that width.

    ``student(spec, features, outputs)``: records → answers [rows, outputs]. Where texts are asked
    for themselves, code and answer are of each token: [rows, T, width] and [rows, T, outputs].
    """

    encoder: Encoder
    student: Callable[[Any, FeatureMap, int], nn.Module]


def _like_its_teacher(encoder: Encoder) -> Family:
    """A kind whose student is an encoder of its own with a linear layer."""

    def student(spec: Any, features: FeatureMap, outputs: int) -> nn.Module:
        network, width = encoder(spec, features)
        return nn.Sequential(network, nn.Linear(width, outputs))

    return Family(encoder, student)


def _mlp_encoder(spec: Any, features: FeatureMap) -> tuple[nn.Module, int]:
    encoder = table_encoder(features.numbers, spec.hidden)
    if features.numbers < features.width:
        encoder.insert(0, First(features.numbers))
    return encoder, spec.hidden[-1]


def _components_encoder(spec: Any, features: FeatureMap) -> tuple[nn.Module, int]:
    if spec.width > features.numbers:
        raise StudyError(
            f"teacher.width: expected at most {features.numbers} components, as many as a record "
            f"has inputs, found {spec.width}"
        )
    return Components(features.numbers, spec.width), spec.width


def _graph_encoder(spec: Any, features: FeatureMap) -> tuple[nn.Module, int]:
    assert features.molecule is not None  # noqa: S101  (the study refuses it otherwise)
    return GraphEncoder(features.molecule, spec.hidden), spec.hidden[-1]


def _cnn_encoder(spec: Any, features: FeatureMap) -> tuple[nn.Module, int]:
    assert features.image_shape is not None  # noqa: S101  (the study refuses it otherwise)
    return image_encoder(features.image_shape, spec.hidden), spec.hidden[-1]


def _cnn_student(spec: Any, features: FeatureMap, outputs: int) -> nn.Module:
    assert features.image_shape is not None  # noqa: S101
    return image_student(features.image_shape, spec.hidden, outputs)


def _vit_encoder(spec: Any, features: FeatureMap) -> tuple[nn.Module, int]:
    assert features.image_shape is not None  # noqa: S101
    encoder = VisionTransformer(
        features.image_shape,
        patch=spec.patch,
        width=spec.width,
        depth=spec.depth,
        heads=spec.heads,
    )
    return encoder, spec.width


def _token_encoder(
    made: type[TokenEncoder | CausalEncoder], spec: Any, features: FeatureMap
) -> tuple[nn.Module, int]:
    assert features.text_shape is not None  # noqa: S101
    length, vocabulary = features.text_shape
    encoder = made(
        vocabulary=vocabulary,
        length=length,
        width=spec.width,
        layers=spec.layers,
        heads=spec.heads,
    )
    return encoder, encoder.code_width


def _causal_student(spec: Any, features: FeatureMap, outputs: int) -> nn.Module:
    encoder, width = _token_encoder(CausalEncoder, spec, features)
    return nn.Sequential(encoder, nn.Linear(width, outputs, bias=False))


def _pretrained_encoder(spec: Any, features: FeatureMap) -> tuple[nn.Module, int]:
    encoder = PinnedEncoder(spec, features)
    return encoder, encoder.width


def _no_student(spec: Any, features: FeatureMap, outputs: int) -> nn.Module:  # noqa: ARG001
    raise StudyError(
        "student.kind: 'pretrained' and 'components' are for teachers; a student is a small "
        "network of another kind"
    )


_FAMILIES: Mapping[str, Family] = {
    "mlp": _like_its_teacher(_mlp_encoder),
    "cnn": Family(_cnn_encoder, _cnn_student),
    "vit": _like_its_teacher(_vit_encoder),
    "components": Family(_components_encoder, _no_student),
    "graph": _like_its_teacher(_graph_encoder),
    "transformer": _like_its_teacher(partial(_token_encoder, TokenEncoder)),
    "causal": Family(partial(_token_encoder, CausalEncoder), _causal_student),
    "pretrained": Family(_pretrained_encoder, _no_student),
}


def family_of(spec: ModelSpec) -> Family:
    """How this kind of network is built. Raises StudyError where somebody else's cannot be had."""
    if not isinstance(spec, OwnSpec):
        return _FAMILIES[spec.kind]
    try:
        family: Family = plugins.found(plugins.MODELS_GROUP, spec.family, Family)
    except ValueError as error:
        raise StudyError(f"family = {error}") from None
    return family
