"""Consilium's messages inside Flower's records; only the two app modules use it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app import Message as Envelope
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from common.errors import MessageError
from common.wire import check_numbers, from_parts, to_parts

Message = TypeVar("Message")

NODE_UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)  # Flower's word on a node that is away

_TENSORS, _TENSORS_TYPE = "tensors", "safetensors"
_NOTHING = RecordDict()


def pack(message: Any) -> RecordDict:
    """A wire message as Flower records: one of plain values, one of all arrays together.

    Flower fetches every array of a record by requests of its own; one block of safetensors makes a
    round of eleven tensors five objects to fetch instead of 25. The block travels as it is:
    Flower's own serialisation would wrap it in a numpy file and copy it twice.
    """
    values, arrays = to_parts(message)
    block = ArrayRecord()
    if arrays:
        data = serialised(arrays)
        # Set, not given to the constructor, which would make every Array anew.
        block[_TENSORS] = Array("uint8", (len(data),), _TENSORS_TYPE, data)
    return RecordDict({"values": ConfigRecord(dict(values)), "arrays": block})


def serialised(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    """``arrays`` as safetensors, byte for byte what its ``save`` writes, in a single copy.

    The messages of a round have one layout, and with it one header.
    """
    names = sorted(arrays)
    header = _header(tuple((name, arrays[name].shape) for name in names))
    return b"".join([header, *(arrays[name].data for name in names)])


@lru_cache(maxsize=256)
def _header(layout: tuple[tuple[str, tuple[int, ...]], ...]) -> bytes:
    """What safetensors writes before the numbers of float32 arrays, of these names and shapes."""
    entries, start = {}, 0
    for name, shape in layout:
        stop = start + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def unpack(kind: type[Message], content: RecordDict) -> Message:
    """The wire message of ``kind``; raises MessageError on anything unexpected."""
    values, arrays = content.get("values"), content.get("arrays")
    if not isinstance(values, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise MessageError(f"{kind.__name__}: expected records 'values' and 'arrays'")
    if not arrays.keys() <= {_TENSORS}:
        raise MessageError(f"{kind.__name__}: expected arrays in one block {_TENSORS!r}")
    try:
        if arrays and arrays[_TENSORS].stype != _TENSORS_TYPE:
            raise ValueError(f"stored as {arrays[_TENSORS].stype!r}")
        found = load(arrays[_TENSORS].data) if arrays else {}
    except (SafetensorError, ValueError, TypeError) as error:
        raise MessageError(f"{kind.__name__}: arrays cannot be read ({error})") from None
    return from_parts(kind, dict(values), found)


class Unsent(Envelope):
    """A reply that stays in its process: ``message`` itself, packed only where its content is asked
    for. The very bytes that would have been sent are then there."""

    def __init__(self, message: Any, *, reply_to: Envelope) -> None:
        super().__init__(_NOTHING, reply_to=reply_to)
        self.__dict__["_content"] = message

    @property
    def message(self) -> Any:
        """The wire message; None once its content was asked for, or replaced."""
        held = self.__dict__["_content"]
        return None if isinstance(held, RecordDict) else held

    @property
    def content(self) -> RecordDict:
        """The message as Flower's records."""
        if self.message is not None:
            self.content = pack(self.message)
        return cast(RecordDict, self.__dict__["_content"])

    @content.setter
    def content(self, value: RecordDict) -> None:
        self.__dict__["_content"] = value


def read(kind: type[Message], reply: Envelope) -> Message:
    """The wire message of ``kind`` in ``reply``; raises MessageError on anything unexpected.

    What was not sent is not copied either: it is the sender's own, and only to be looked at.
    """
    if isinstance(reply, Unsent) and isinstance(reply.message, kind):
        return check_numbers(reply.message)
    return unpack(kind, reply.content)
