"""Shamir's secret sharing of 32-byte secrets over a prime field (Shamir 1979).

The prime is just above 2²⁵⁶, so that every 32-byte secret is a field element and no bit is lost.
Fewer than ``threshold`` shares are independent of the secret, whatever the computing power.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from common.errors import SecAggError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

# Reducing 64 bytes modulo the prime leaves a bias below 2⁻²⁵⁴.
_COEFFICIENT_BYTES = 64


def split(
    secret: bytes, points: Sequence[int], threshold: int, entropy: Callable[[int], bytes]
) -> dict[int, int]:
    """A share of ``secret`` for each of ``points``; any ``threshold`` of them give it back.

    ``points``: distinct field elements above zero. ``entropy(n)``: n bytes from a secure source.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes, found {len(secret)}")
    if threshold < 1 or len(set(points)) != len(points) or any(not 0 < x < PRIME for x in points):
        raise ValueError("expected a threshold of at least 1 and distinct points above zero")
    coefficients = [
        int.from_bytes(entropy(_COEFFICIENT_BYTES), "big") % PRIME for _ in range(threshold - 1)
    ]
    coefficients.append(int.from_bytes(secret, "big"))  # highest degree first, as Horner wants
    shares = {}
    for x in points:
        value = 0
        for coefficient in coefficients:
            value = (value * x + coefficient) % PRIME
        shares[x] = value
    return shares


def combine(shares: Mapping[int, int]) -> bytes:
    """The secret behind ``shares`` (point → value), all of which are used.

    Raises SecAggError when the shares belong to no 32-byte secret. Other wrong shares give a wrong
    secret: the caller compares it with a commitment.

    >>> secret = bytes(range(32))
    >>> combine(split(secret, [1, 2], 2, lambda n: bytes(range(n)))) == secret
    True
    """
    points = tuple(sorted(shares))
    weights = _weights_at_zero(points)
    value = sum(weight * shares[x] for weight, x in zip(weights, points, strict=True)) % PRIME
    if value >> (8 * SECRET_BYTES):
        raise SecAggError("shares: they belong to no 32-byte secret; one of them is wrong")
    return value.to_bytes(SECRET_BYTES, "big")


def encode(share: int) -> bytes:
    """33 bytes."""
    return share.to_bytes(SHARE_BYTES, "big")


def decode(data: bytes) -> int:
    """The share of ``encode``; raises SecAggError for anything that is no field element."""
    share = int.from_bytes(data, "big")
    if len(data) != SHARE_BYTES or share >= PRIME:
        raise SecAggError("share: not an element of the field")
    return share


@lru_cache(maxsize=64)
def _weights_at_zero(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights that interpolate at zero."""
    weights = []
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
