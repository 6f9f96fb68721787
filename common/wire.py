"""Every message between coordinator and hospital, and what each field may tell.

A message is a frozen dataclass whose fields carry their exposure:

``PUBLIC``  agreed or published anyway; holds nothing computed from patients' rows.
``NOISED``  computed from patients, released with noise and charged to their budget.
``MASKED``  hidden inside a secure sum; only the noised sum of all hospitals can be read.

A reply has no field without one, and a test holds that. On the wire a message is a flat map of
plain values and named arrays; nothing is ever unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import MessageError

Plain = str | int | float | bool | bytes


class Exposure(StrEnum):
    """What a field of a message may tell its reader."""

    PUBLIC = "public"
    NOISED = "noised"
    MASKED = "masked"


def public() -> Any:
    """A field that tells nothing of any patient."""
    return field(metadata={"exposure": Exposure.PUBLIC})


def noised() -> Any:
    """A field that is released with noise and charged."""
    return field(metadata={"exposure": Exposure.NOISED})


def masked() -> Any:
    """A field that can only be read as part of a noised sum."""
    return field(metadata={"exposure": Exposure.MASKED})


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Who is there? Starts a study; the hospital answers for itself."""

    study_digest: str = public()


@dataclass(frozen=True, kw_only=True)
class HelloReply:
    """The hospital's public facts. ``declared_patients`` is what it chooses to say, rounded.

    ``secret_noise`` is false when it draws test noise from a seed, which protects nobody.
    ``identity``: its public key; empty where it takes part in no secure aggregation.
    """

    hospital: str = public()
    study_digest: str = public()
    declared_patients: int = public()
    secret_noise: bool = public()
    identity: str = public()


@dataclass(frozen=True, kw_only=True)
class StatisticsTask:
    """Asks for one noised sum over the dictionary's numeric and code columns."""

    study_digest: str = public()
    attempt: int = public()


@dataclass(frozen=True, kw_only=True)
class StatisticsReply:
    """``sums`` [``moment_count``]: noised sums of what ``moment_contributions`` names."""

    hospital: str = public()
    sums: Tensor = noised()


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """One round of ``finetune`` or ``distill``.

    ``teacher`` and ``student``: named tensors; ``scaling`` [rows, 2]: mean and standard
    deviation. ``attempt`` counts repetitions of the same round.
    """

    study_digest: str = public()
    stage: str = public()
    round: int = public()
    attempt: int = public()
    teacher: dict[str, Tensor] = public()
    student: dict[str, Tensor] = public()
    scaling: Tensor = public()


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """``update`` [d]: how the noised steps moved the trainable weights."""

    hospital: str = public()
    stage: str = public()
    round: int = public()
    update: Tensor = noised()


@dataclass(frozen=True, kw_only=True)
class AggregateTask:
    """Begins one attempt at a secure sum of what ``stage`` releases.

    ``statistics``: moments and counts of codes. ``finetune``, ``distill``: one step's clipped
    gradients. ``evaluate``: the histogram of scores. Fields as in TrainTask; empty where the sum
    does not depend on them.
    """

    study_digest: str = public()
    stage: str = public()
    round: int = public()
    attempt: int = public()
    teacher: dict[str, Tensor] = public()
    student: dict[str, Tensor] = public()
    scaling: Tensor = public()


@dataclass(frozen=True, kw_only=True)
class AggregateStep:
    """The coordinator's next message of a secure aggregation; an AggregateTask has begun it."""

    study_digest: str = public()
    stage: str = public()
    round: int = public()
    attempt: int = public()
    message: bytes = public()


@dataclass(frozen=True, kw_only=True)
class AggregateReply:
    """The hospital's next message: keys, encrypted shares, its masked vector, or what unmasks the
    sum (see docs/secure-aggregation.md for each)."""

    hospital: str = public()
    message: bytes = masked()


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Asks each hospital to score its test patients with the finished student."""

    study_digest: str = public()
    student: dict[str, Tensor] = public()
    scaling: Tensor = public()


@dataclass(frozen=True, kw_only=True)
class EvaluateReply:
    """``histogram`` [classes, bins]: noised counts of test patients by label and score.

    Empty [0, 0] when the study grants evaluation no budget: exact scores stay at the hospital.
    """

    hospital: str = public()
    histogram: Tensor = noised()


REPLIES = (HelloReply, StatisticsReply, TrainReply, AggregateReply, EvaluateReply)
_SEPARATOR = "/"

Message = TypeVar("Message")


def to_parts(message: Any) -> tuple[dict[str, Plain], dict[str, NDArray[Any]]]:
    """The plain values and the arrays of a message, each under its field's name."""
    values: dict[str, Plain] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for one in fields(message):
        value = getattr(message, one.name)
        if isinstance(value, Tensor):
            arrays[one.name] = _array(value)
        elif isinstance(value, dict):
            arrays |= {f"{one.name}{_SEPARATOR}{name}": _array(t) for name, t in value.items()}
        else:
            values[one.name] = value
    return values, arrays


def from_parts(
    kind: type[Message], values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> Message:
    """The message of ``kind``; raises MessageError on anything missing, foreign or not finite.

    Its tensors take over the arrays' memory.
    """
    types = {"str": str, "int": int, "float": float, "bool": bool, "bytes": bytes}
    built: dict[str, Any] = {}
    plain: set[str] = set()
    taken: set[str] = set()
    for one in fields(kind):  # type: ignore[arg-type]
        if one.type == "Tensor":
            if one.name not in arrays:
                raise MessageError(f"{kind.__name__}: expected array {one.name!r}, found none")
            built[one.name] = _tensor(kind, one.name, arrays[one.name])
            taken.add(one.name)
        elif str(one.type).startswith("dict"):
            prefix = one.name + _SEPARATOR
            mine = {name: array for name, array in arrays.items() if name.startswith(prefix)}
            built[one.name] = {
                name.removeprefix(prefix): _tensor(kind, name, array)
                for name, array in mine.items()
            }
            taken |= mine.keys()
        else:
            wanted = types[str(one.type)]
            value = values.get(one.name)
            if type(value) is not wanted:
                raise MessageError(
                    f"{kind.__name__}: expected {one.name!r} of type {wanted.__name__}, "
                    f"found {type(value).__name__}"
                )
            built[one.name] = value
            plain.add(one.name)
    foreign = (values.keys() - plain) | (arrays.keys() - taken)
    if foreign:
        raise MessageError(f"{kind.__name__}: unknown field {min(foreign)!r}")
    return kind(**built)


def _array(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype is not torch.float32:
        raise ValueError(f"messages hold float32, found {tensor.dtype}")
    return np.ascontiguousarray(tensor.detach().numpy())


def check_numbers(message: Message) -> Message:
    """``message`` itself; raises MessageError where ``from_parts`` would for its numbers."""
    for name, value in vars(message).items():
        if isinstance(value, dict):
            for inner, tensor in value.items():
                _check_numbers(type(message), f"{name}{_SEPARATOR}{inner}", tensor)
        elif isinstance(value, Tensor):
            _check_numbers(type(message), name, value)
    return message


def _tensor(kind: type, name: str, array: NDArray[Any]) -> Tensor:
    if array.dtype != np.float32:
        raise MessageError(f"{kind.__name__}: array {name!r} expected float32, found {array.dtype}")
    tensor = torch.from_numpy(array)
    _check_numbers(kind, name, tensor)
    return tensor


def _check_numbers(kind: type, name: str, tensor: Tensor) -> None:
    if tensor.dtype is not torch.float32:
        raise MessageError(
            f"{kind.__name__}: array {name!r} expected float32, found {tensor.dtype}"
        )
    # A sum is finite only where all its terms are; one that overflows tells nothing of them.
    if not (math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())):
        raise MessageError(f"{kind.__name__}: array {name!r} holds values that are not finite")
