"""Fixed binary fields, written and read strictly: every length is checked, nothing may be left."""

from __future__ import annotations

from itertools import pairwise

from common.errors import MessageError

_LONGEST_TEXT = 255


class Writer:
    """Collects fields; numbers are unsigned and big-endian."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def raw(self, data: bytes) -> Writer:
        """Bytes whose length the reader knows."""
        self._parts.append(data)
        return self

    def u8(self, value: int) -> Writer:
        """One byte."""
        return self.raw(value.to_bytes(1, "big"))

    def u16(self, value: int) -> Writer:
        """Two bytes."""
        return self.raw(value.to_bytes(2, "big"))

    def u32(self, value: int) -> Writer:
        """Four bytes."""
        return self.raw(value.to_bytes(4, "big"))

    def text(self, value: str) -> Writer:
        """UTF-8 with a length of one byte."""
        data = value.encode()
        if len(data) > _LONGEST_TEXT:
            raise ValueError(f"expected a text of at most {_LONGEST_TEXT} bytes")
        return self.u8(len(data)).raw(data)

    def positions(self, values: list[int] | tuple[int, ...]) -> Writer:
        """Roster positions."""
        self.u16(len(values))
        for value in values:
            self.u16(value)
        return self

    def done(self) -> bytes:
        """All fields."""
        return b"".join(self._parts)


class Reader:
    """Reads what ``Writer`` wrote; raises MessageError on anything else."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        """``what`` names the message in errors."""
        self._data = memoryview(data)
        self._at = 0
        self._what = what

    def raw(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        return bytes(self.view(length))

    def view(self, length: int) -> memoryview:
        """The next ``length`` bytes, not copied."""
        if length > len(self._data) - self._at:
            raise MessageError(f"{self._what}: expected {length} more bytes, the message is cut")
        self._at += length
        return self._data[self._at - length : self._at]

    def u8(self) -> int:
        """One byte."""
        return int.from_bytes(self.view(1), "big")

    def u16(self) -> int:
        """Two bytes."""
        return int.from_bytes(self.view(2), "big")

    def u32(self) -> int:
        """Four bytes."""
        return int.from_bytes(self.view(4), "big")

    def text(self) -> str:
        """UTF-8 with a length of one byte."""
        try:
            return self.raw(self.u8()).decode()
        except UnicodeDecodeError:
            raise MessageError(f"{self._what}: a text is not UTF-8") from None

    def positions(self) -> tuple[int, ...]:
        """Strictly ascending roster positions: no hospital can be listed twice."""
        values = tuple(self.u16() for _ in range(self.u16()))
        if any(left >= right for left, right in pairwise(values)):
            raise MessageError(f"{self._what}: positions are repeated or out of order")
        return values

    def finish(self) -> None:
        """Raise unless everything was read."""
        left = len(self._data) - self._at
        if left:
            raise MessageError(f"{self._what}: {left} bytes too many")
