"""A simulation's public random choices: each follows from the study's seed and what it is for.

No draw depends on another one, on the order of messages, or on what ran before an interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from common.scenario import Some


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Many draws for one purpose."""
    digest = _digest(seed, purpose)
    words = [int.from_bytes(digest[start : start + 4], "big") for start in range(0, 16, 4)]
    return np.random.default_rng(words)


def uniform(seed: int, *context: str | int) -> float:
    """One draw from (0, 1)."""
    word = int.from_bytes(_digest(seed, *context)[:8], "big") >> 12
    return (word + 0.5) * 2.0**-52


def normal(seed: int, *context: str | int) -> float:
    """One standard normal draw."""
    return NormalDist().inv_cdf(uniform(seed, *context))


def first(seed: int, names: Iterable[str], count: int, *context: str | int) -> list[str]:
    """``count`` of ``names``, every choice equally likely."""
    return sorted(names, key=lambda name: uniform(seed, *context, name))[:count]


@lru_cache(maxsize=64)
def chosen(seed: int, some: Some, names: tuple[str, ...], purpose: str) -> frozenset[str]:
    """The hospitals a scenario names, or so many of ``names``."""
    return frozenset(first(seed, names, some, purpose) if isinstance(some, int) else some)


def _digest(seed: int, *context: str | int) -> bytes:
    return hashlib.sha256("|".join(map(str, (seed, *context))).encode()).digest()
