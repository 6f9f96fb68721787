"""Masks are AES-256-CTR keystreams, added modulo 2³², and a masked vector is aligned."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import MessageError
from common.secagg import masks, messages
from common.secagg.masks import apply_masks
from common.secagg.wire import Reader

KEY = bytes(range(32))
LENGTH = 3 * 2**15 + 5


def keystream(key: bytes, length: int) -> np.ndarray:
    """Block by block: AES of nonce 0 (96 bits) and the counter 2, 3, … (32 bits, big-endian)."""
    blocks = b"".join(
        bytes(12) + counter.to_bytes(4, "big") for counter in range(2, 2 + -(-length // 4))
    )
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    return np.frombuffer(cipher.update(blocks), "<u4")[:length]


@pytest.mark.parametrize("through_gcm", [True, False])
def test_a_mask_is_the_aes_ctr_keystream_of_its_key(
    monkeypatch: pytest.MonkeyPatch, through_gcm: bool
) -> None:
    """Whichever way this processor prefers: hospitals with others must agree with it."""
    monkeypatch.setattr(masks, "_gcm_is_faster", lambda: through_gcm)
    out = np.empty(LENGTH, "<u4")
    apply_masks(np.zeros(LENGTH, "<u4"), [(KEY, 1)], out)
    np.testing.assert_array_equal(out, keystream(KEY, LENGTH))
    assert not np.array_equal(out, keystream(KEY[::-1], LENGTH))


def test_masks_add_and_subtract_in_place_or_elsewhere() -> None:
    vector = np.random.default_rng(0).integers(0, 2**32, LENGTH, dtype=np.uint32)
    before, out, seen = vector.copy(), np.empty_like(vector), []
    signed = [(bytes([one]) * 32, sign) for one, sign in ((1, 1), (2, -1), (3, -1))]
    apply_masks(vector, signed, out, lambda piece: seen.append(piece.copy()))
    np.testing.assert_array_equal(vector, before)
    expected = vector + np.sum(
        [np.uint32(sign % 2**32) * keystream(key, LENGTH) for key, sign in signed],
        axis=0,
        dtype=np.uint32,
    )
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.concatenate(seen), out)
    apply_masks(out, [(key, -sign) for key, sign in signed], out)
    np.testing.assert_array_equal(out, before)


def test_the_integers_of_a_masked_vector_are_aligned() -> None:
    masked = messages.Masked(sender=1, roster=bytes(32), sharers=bytes(32), length=1)
    fields = masked.encode()
    assert len(messages.header(messages.Kind.MASKED, bytes(32)) + fields) % 16 == 0
    found, vector = messages.Masked.decode(Reader(fields + b"\1\0\0\0", "MASKED"))
    assert (found, bytes(vector)) == (masked, b"\1\0\0\0")
    with pytest.raises(MessageError, match="zeros before the vector"):
        messages.Masked.decode(Reader(fields[:-1] + b"\1" + b"\1\0\0\0", "MASKED"))
