"""Consilium's messages inside Flower's records; only the two app modules use it."""

from __future__ import annotations

from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.errors import MessageError
from common.wire import from_parts, to_parts

Message = TypeVar("Message")


def pack(message: Any) -> RecordDict:
    """A wire message as Flower records: one of plain values, one of arrays."""
    values, arrays = to_parts(message)
    return RecordDict(
        {
            "values": ConfigRecord(dict(values)),
            "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
        }
    )


def unpack(kind: type[Message], content: RecordDict) -> Message:
    """The wire message of ``kind``; raises MessageError on anything unexpected."""
    values, arrays = content.get("values"), content.get("arrays")
    if not isinstance(values, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise MessageError(f"{kind.__name__}: expected records 'values' and 'arrays'")
    return from_parts(kind, dict(values), {name: array.numpy() for name, array in arrays.items()})
