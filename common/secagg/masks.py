"""Masks: AES-256-CTR keystreams added to a vector modulo 2³², in place and in small pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

# 128 KiB: the piece, the keystream and the zeros stay in a core's second-level cache.
_WORDS = 2**15
_WORD_BYTES = 4
# ``update_into`` asks for room for one more block than it writes.
_SLACK_BYTES = 15

Mask = tuple[bytes, int]
"""A 32-byte key, used for this mask alone, and the sign (+1 or -1) of its keystream."""


def apply_masks(
    vector: NDArray[np.uint32],
    masks: Sequence[Mask],
    each_piece: Callable[[NDArray[np.uint32]], object] | None = None,
) -> None:
    """Add every keystream to ``vector`` [length], in place.

    Key and keystream are used once, so the counter starts at zero. ``each_piece`` sees the masked
    vector piece by piece, while it is still in cache.
    """
    streams = [
        (Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor(), sign) for key, sign in masks
    ]
    zeros = memoryview(bytes(_WORD_BYTES * _WORDS))
    room = bytearray(len(zeros) + _SLACK_BYTES)
    # The keystream's words are little-endian on every machine.
    words = np.frombuffer(room, dtype="<u4", count=_WORDS)
    for start in range(0, len(vector), _WORDS):
        piece = vector[start : start + _WORDS]
        part, keystream = zeros[: _WORD_BYTES * len(piece)], words[: len(piece)]
        for stream, sign in streams:
            stream.update_into(part, room)
            if sign > 0:
                np.add(piece, keystream, out=piece)
            else:
                np.subtract(piece, keystream, out=piece)
        if each_piece is not None:
            each_piece(piece)
