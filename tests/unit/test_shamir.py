"""Shamir's sharing: any threshold of shares rebuilds, fewer say nothing."""

from __future__ import annotations

import secrets
from contextlib import suppress
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import SecAggError
from common.secagg import shamir


def test_the_modulus_is_prime() -> None:
    """Miller & Rabin with the first forty primes as bases."""
    odd, twos = shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    bases = [n for n in range(2, 174) if all(n % d for d in range(2, n))]
    assert len(bases) == 40
    for base in bases:
        value = pow(base, odd, shamir.PRIME)
        assert value == 1 or any(
            pow(value, 2**one, shamir.PRIME) == shamir.PRIME - 1 for one in range(twos)
        )
    assert shamir.PRIME > 2**256


@settings(max_examples=200)
@given(
    secret=st.binary(min_size=32, max_size=32),
    count=st.integers(1, 9),
    data=st.data(),
)
def test_any_threshold_of_shares_rebuilds(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    points = data.draw(st.lists(st.integers(1, 4096), min_size=count, max_size=count, unique=True))
    shares = shamir.split(secret, points, threshold, secrets.token_bytes)
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, count))]
    assert shamir.combine({x: shares[x] for x in chosen}) == secret


def test_extreme_secrets() -> None:
    for secret in (bytes(32), b"\xff" * 32):
        shares = shamir.split(secret, [1, 2, 3], 2, secrets.token_bytes)
        for pair in combinations(shares, 2):
            assert shamir.combine({x: shares[x] for x in pair}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """With threshold - 1 shares, each other secret has a polynomial of its own: nothing is said."""
    shares = shamir.split(b"s" * 32, [1, 2, 3], 3, secrets.token_bytes)
    for other in (b"t" * 32, bytes(32)):
        # The polynomial through (0, other), (1, share), (2, share) gives a valid third share.
        at_zero = int.from_bytes(other, "big")
        third = (at_zero - 3 * shares[1] + 3 * shares[2]) % shamir.PRIME
        assert shamir.combine({1: shares[1], 2: shares[2], 3: third}) == other
    with suppress(SecAggError):
        assert shamir.combine({x: shares[x] for x in (1, 2)}) != b"s" * 32


def test_shares_are_fresh_and_spread() -> None:
    first, second = (shamir.split(bytes(32), [1], 2, secrets.token_bytes)[1] for _ in range(2))
    assert first != second
    top_bits = [shamir.split(bytes(32), [1], 2, secrets.token_bytes)[1] >> 255 for _ in range(400)]
    assert 130 < sum(top_bits) < 270


def test_encoding_is_strict() -> None:
    share = shamir.PRIME - 1
    assert shamir.decode(shamir.encode(share)) == share
    for bad in (shamir.PRIME.to_bytes(33, "big"), b"\xff" * 33, bytes(32), bytes(34), b""):
        with pytest.raises(SecAggError, match="not an element"):
            shamir.decode(bad)


def test_wrong_shares_and_calls() -> None:
    with pytest.raises(SecAggError, match="no 32-byte secret"):
        shamir.combine({1: shamir.PRIME - 1})
    for points, threshold in (([1, 1], 1), ([0], 1), ([shamir.PRIME], 1), ([1], 0)):
        with pytest.raises(ValueError, match="distinct points"):
            shamir.split(bytes(32), points, threshold, secrets.token_bytes)
    with pytest.raises(ValueError, match="32 bytes"):
        shamir.split(bytes(31), [1], 1, secrets.token_bytes)
