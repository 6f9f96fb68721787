"""Masks: AES-256-CTR keystreams added to a vector modulo 2³², in small pieces.

A keystream starts at counter 2 of nonce 0. So it is also the ciphertext of zeros under AES-GCM
(NIST SP 800-38D, section 7.1), whose tag is never asked for. OpenSSL uses a processor's vector AES
instructions for GCM and not for plain CTR: where there are any, the same bytes take half the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

# 128 KiB: the piece, the keystream and the zeros stay in a core's second-level cache.
_WORDS = 2**15
_WORD_BYTES = 4
# ``update_into`` asks for room for one more block than it writes.
_SLACK_BYTES = 15
_NONCE = bytes(12)
_TRIES = 5

Mask = tuple[bytes, int]
"""A 32-byte key, used for this mask alone, and the sign (+1 or -1) of its keystream."""


def apply_masks(
    vector: NDArray[np.uint32],
    masks: Sequence[Mask],
    out: NDArray[np.uint32],
    each_piece: Callable[[NDArray[np.uint32]], object] | None = None,
) -> None:
    """Write ``vector`` [length] plus every keystream to ``out`` [length], which may be ``vector``.

    Key and keystream are used once, so the nonce is zero. ``each_piece`` sees ``out`` piece by
    piece, while it is still in cache.
    """
    streams = [(_encryptor(key, through_gcm=_gcm_is_faster()), sign) for key, sign in masks]
    zeros = memoryview(bytes(_WORD_BYTES * _WORDS))
    room = bytearray(len(zeros) + _SLACK_BYTES)
    # The keystream's words are little-endian on every machine.
    words = np.frombuffer(room, dtype="<u4", count=_WORDS)
    for start in range(0, len(vector), _WORDS):
        source, piece = vector[start : start + _WORDS], out[start : start + _WORDS]
        part, keystream = zeros[: _WORD_BYTES * len(piece)], words[: len(piece)]
        for stream, sign in streams:
            stream.update_into(part, room)
            if sign > 0:
                np.add(source, keystream, out=piece)
            else:
                np.subtract(source, keystream, out=piece)
            source = piece
        if each_piece is not None:
            each_piece(piece)


def _encryptor(key: bytes, *, through_gcm: bool) -> CipherContext:
    """Gives the keystream of ``key`` when fed with zeros; the same bytes either way."""
    mode = modes.GCM(_NONCE) if through_gcm else modes.CTR(_NONCE + (2).to_bytes(4, "big"))
    return Cipher(algorithms.AES(key), mode).encryptor()


@cache
def _gcm_is_faster() -> bool:
    """Which way is faster on this processor: the best of a few tries of 128 KiB, once."""
    zeros, room = bytes(_WORD_BYTES * _WORDS), bytearray(_WORD_BYTES * _WORDS + _SLACK_BYTES)
    seconds = []
    for through_gcm in (True, False):
        stream = _encryptor(bytes(32), through_gcm=through_gcm)
        tries = []
        for _ in range(_TRIES):
            start = time.perf_counter()
            stream.update_into(zeros, room)
            tries.append(time.perf_counter() - start)
        seconds.append(min(tries))
    return seconds[0] < seconds[1]
