"""Keys and draws of streams, against an independent HKDF and against each stream alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.randomness import SecretNoise, SeededNoise, Stream, normal_blocks, normals

KEY = bytes(range(32))
# "study", 7 and b"\x00", typed and with their lengths before them.
INFO = (
    b"consilium-stream-v1"
    + (b"s" + (5).to_bytes(8, "big") + b"study")
    + (b"i" + (1).to_bytes(8, "big") + b"7")
    + (b"b" + (1).to_bytes(8, "big") + b"\x00")
)


def derived(key: bytes, info: bytes) -> Stream:
    """RFC 5869 by the library."""
    return Stream(HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(key))


def test_streams_are_keyed_by_hkdf() -> None:
    found = SecretNoise(KEY).stream("study", 7, b"\x00").words(4)
    assert np.array_equal(found, derived(KEY, INFO).words(4))
    test_key = hashlib.sha256(b"consilium test noise 3").digest()
    owner = b"s" + (5).to_bytes(8, "big") + b"north"
    info = INFO.replace(b"stream-v1", b"stream-v1" + owner)
    found = SeededNoise(3, "north").stream("study", 7, b"\x00").words(4)
    assert np.array_equal(found, derived(test_key, info).words(4))


def test_a_key_that_was_used_shows_nowhere() -> None:
    noise = SecretNoise(KEY)
    noise.stream("study")
    assert repr(noise) == "SecretNoise(key=…)"
    assert noise == SecretNoise(KEY)


# Odd and even, alone in a block and several together, and in more blocks than one.
@pytest.mark.parametrize("count", [1, 2, 7, 6209, 16_384, 16_385, 40_001])
def test_many_streams_draw_as_each_does_alone(count: int) -> None:
    def streams() -> list[Stream]:
        return [SeededNoise(1, f"h{one}").stream("draws") for one in range(13)]

    alone = [one.normal(count) for one in streams()]
    assert np.array_equal(normals(streams(), count), alone)
    for rows, columns, block in normal_blocks(streams(), count, 2.5):
        expected = 2.5 * np.array(alone)[rows, columns]
        np.testing.assert_allclose(block, expected, rtol=1e-15)
