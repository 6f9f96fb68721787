"""Where random numbers come from, and which of them are secret.

Noise and the choice of who is sampled protect patients: whoever can predict them can subtract
them. They come from an AES-256-CTR keystream under the hospital's own secret key. Public choices
(initial weights, the split of public data) come from ordinary seeded generators elsewhere.

A release's keystream is *derived from everything the release depends on* (study, stage, round,
incoming model, cohort). Asking again for the very same release gives the very same bytes, which
reveals nothing new; any difference in the question gives independent noise, so two answers can
never be subtracted to cancel it. HKDF and CTR make these streams indistinguishable from
independent ones for anyone without the key.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

_KEY_BYTES = 32
_ZEROS = memoryview(bytes(2**18))  # a keystream is what these are encrypted to
_UNIT = 2.0**-53
_WIDTH = 2**14  # normals of one stream made at once; its pairs of words lie half of that apart
_BLOCK = 2**16  # normals of several streams made at once: 512 KiB of each intermediate result


class Stream:
    """A keystream turned into uniforms and normals. Draws advance it; it never rewinds."""

    def __init__(self, key: bytes) -> None:
        """``key``: 32 bytes, used for this stream alone (the CTR nonce is zero)."""
        if len(key) != _KEY_BYTES:
            raise ValueError(f"expected a key of {_KEY_BYTES} bytes, found {len(key)}")
        self._keystream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """``count`` words of 64 random bits."""
        made = np.empty(count, dtype="<u8")
        self.fill(made)
        return made

    def fill(self, words: NDArray[np.uint64]) -> None:
        """Write random bits into all of ``words`` [n], which lie together in memory."""
        room = words.data.cast("B")
        for start in range(0, len(room), len(_ZEROS)):
            part = room[start : start + len(_ZEROS)]
            self._keystream.update_into(_ZEROS[: len(part)], part)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """``count`` uniforms in [0, 1) with 53 random bits each."""
        return uniforms([self], [count])

    def normal(self, count: int) -> NDArray[np.float64]:
        """``count`` independent standard normals (Box & Muller 1958)."""
        return normals([self], count).reshape(count)


def uniforms(streams: Sequence[Stream], counts: Sequence[int]) -> NDArray[np.float64]:
    """What ``uniform(count)`` gives of each of ``streams``, one after another: [Σ counts]."""
    words = [one.words(count) for one, count in zip(streams, counts, strict=True)]
    return _uniform(np.concatenate(words))


def normals(streams: Sequence[Stream], count: int) -> NDArray[np.float64]:
    """What ``normal(count)`` gives of each of ``streams``: [streams, count]."""
    made = np.empty((len(streams), count))
    for rows, columns, block in normal_blocks(streams, count):
        made[rows, columns] = block
    return made


def normal_blocks(
    streams: Sequence[Stream], count: int, std: float = 1.0
) -> Iterator[tuple[slice, slice, NDArray[np.float64]]]:
    """The same times ``std``, block by block, with the place of each; memory is used again.

    Blocks stay in the processor's cache, each step is in place, and logarithm, sine and cosine are
    torch's vectorised ones. On a busy core a draw takes 12 ns, of which 3 are AES; in blocks of a
    quarter, where calls count, 15; with an array for each step 19.
    """
    width = min(count, _WIDTH)
    together = max(1, _BLOCK // max(1, width))
    room = np.empty((together, width + width % 2))
    words = np.empty(room.shape, dtype="<u8")
    for first in range(0, len(streams), together):
        some = streams[first : first + together]
        for start in range(0, count, _WIDTH):
            columns = slice(start, min(start + _WIDTH, count))
            pairs = (columns.stop - start + 1) // 2
            block, bits = room[: len(some), : 2 * pairs], words[: len(some), : 2 * pairs]
            for one, own in zip(some, bits, strict=True):
                one.fill(own)
            _box_muller(bits, block, std)
            yield slice(first, first + len(some)), columns, block[:, : columns.stop - start]


def _box_muller(words: NDArray[np.uint64], into: NDArray[np.float64], std: float) -> None:
    """Fill ``into`` [k, 2 n] with normals made from ``words`` [k, 2 n], which are used up."""
    import torch  # noqa: PLC0415 (a key is made, and a folder opened, without it)

    pairs = words.shape[1] // 2
    _integers(words, into)
    radius, angle = into[:, :pairs], into[:, pairs:]
    # 1 - u is exact, and in (0, 1], where the logarithm is finite.
    np.add(np.multiply(radius, -_UNIT, out=radius), 1.0, out=radius)
    torch.from_numpy(radius).log_()
    np.sqrt(np.multiply(radius, -2.0, out=radius), out=radius)
    np.multiply(radius, std, out=radius)
    np.multiply(angle, _UNIT * 2.0 * math.pi, out=angle)  # _UNIT is a power of two: exact
    cosine = words.view(np.float64)[:, :pairs]
    turned = torch.from_numpy(angle)
    torch.cos(turned, out=torch.from_numpy(cosine))
    turned.sin_()
    np.multiply(angle, radius, out=angle)
    np.multiply(radius, cosine, out=radius)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniforms made from ``words``, which are used up."""
    made = np.empty(words.shape)
    _integers(words, made)
    return np.multiply(made, _UNIT, out=made)


def _integers(words: NDArray[np.uint64], into: NDArray[np.float64]) -> None:
    """The upper 53 bits of each word, in place, as a whole number in ``into``."""
    np.right_shift(words, np.uint64(11), out=words)
    np.copyto(into, words.view(np.int64))  # signed numbers are converted twice as fast


class NoiseSource(Protocol):
    """Gives the stream of one release."""

    @property
    def is_secret(self) -> bool:
        """Whether a guarantee may rest on it."""
        ...

    def stream(self, *context: bytes | str | int) -> Stream:
        """The keystream bound to ``context``, which must name all the release depends on."""
        ...


@dataclass(frozen=True)
class SecretNoise:
    """The source of every real release: a 256-bit key that never leaves its hospital."""

    key: bytes

    @classmethod
    def generate(cls) -> SecretNoise:
        """A new key from the operating system."""
        return cls(secrets.token_bytes(_KEY_BYTES))

    @property
    def is_secret(self) -> bool:
        """True: the key is known to this hospital only."""
        return True

    def __repr__(self) -> str:
        """Never the key: representations end up in logs."""
        return "SecretNoise(key=…)"

    def stream(self, *context: bytes | str | int) -> Stream:
        """The keystream bound to ``context`` (HKDF-SHA256, RFC 5869)."""
        return Stream(_expanded(self._extracted, context))

    @cached_property
    def _extracted(self) -> bytes:
        return _extracted(self.key)


@dataclass(frozen=True)
class SeededNoise:
    """For tests and exact reruns on public data: anyone with the seed can remove the noise.

    A release made with it carries no guarantee, and the privacy statement says so.
    ``owner`` keeps hospitals apart: one seed must never give two hospitals the same noise.
    """

    seed: int
    owner: str

    @property
    def is_secret(self) -> bool:
        """False: no guarantee may rest on a seed."""
        return False

    def stream(self, *context: bytes | str | int) -> Stream:
        """The keystream bound to the seed, the owner and ``context``."""
        return Stream(_expanded(self._extracted, (self.owner, *context)))

    @cached_property
    def _extracted(self) -> bytes:
        return _extracted(hashlib.sha256(f"consilium test noise {self.seed}".encode()).digest())


def _extracted(key: bytes) -> bytes:
    """HKDF's first step (RFC 5869, section 2.2) without a salt; done once for a source."""
    return hmac.digest(bytes(_KEY_BYTES), key, "sha256")


def _expanded(extracted: bytes, context: tuple[bytes | str | int, ...]) -> bytes:
    """One key per context; parts are typed and length-prefixed so that no two contexts collide.

    HKDF's second step (section 2.3): one block of SHA-256 is the 32 bytes asked for.
    """
    if not context:
        raise ValueError("a stream needs a context: name all that the release depends on")
    parts = bytearray(b"consilium-stream-v1")
    for part in context:
        kind, data = (
            (b"b", part)
            if isinstance(part, bytes)
            else ((b"s", part.encode()) if isinstance(part, str) else (b"i", str(part).encode()))
        )
        parts += kind + len(data).to_bytes(8, "big") + data
    return hmac.digest(extracted, bytes(parts) + b"\x01", "sha256")
