"""Who shares a mask and secrets with whom: everyone, or a sparse random ring.

Up to 32 hospitals the graph is complete. Beyond, it is the random k-regular Harary graph of Bell,
Bonawitz, Gascón, Lepoint & Raykova 2020, "Secure single-server aggregation with (poly)logarithmic
overhead" (CCS): hospitals stand on a ring in an order drawn from a public seed,
and each is joined to the w = k/2 nearest on either side. The seed is a hash of the signed roster,
which holds a fresh key of every honest hospital.

How large is k? Let n hospitals stand on the ring, of which c collude with the coordinator and d
vanish. Two numbers (w, m) are chosen, the smallest w for which

* *colluders*: with probability at least 1 - 2⁻⁸⁰ no w neighbours on the ring hold m colluders;
* *absentees*: with probability at least 1 - 2⁻²⁰ no w neighbours lose more than w - m members.

m is more than w/2, so that even without declared colluders most neighbours must help to rebuild a
secret. Both bounds follow from the hypergeometric tail of one window and a union bound over the n
windows. An honest hospital then reveals nothing unless every window of w neighbours keeps at least
m survivors, which it can see for itself. That check gives, however cleverly the coordinator picks
the absentees:

* every window keeps an honest survivor, so the honest survivors are joined in one piece, and the
  coordinator learns their sum and no part of it;
* the 2w neighbours of a hospital hold at most 2m - 2 colluders and at least 2m survivors: with
  share threshold 2m - 1 colluders alone rebuild no secret, and survivors always can.

Colluders are taken to be chosen before the ring is drawn. Their bound is 2⁻⁸⁰ rather than the
customary 2⁻⁴⁰ because a coordinator with colluders can try other rosters and keys until the ring
suits it; 2⁴⁰ tries still leave 2⁻⁴⁰. Missing the absentees' bound costs a clean failure and another
attempt. For n = 100 with 5 colluders and 5 absentees k is 22; for 1,000 with 20 and 20 it is 50:
2·log₂ n plus the margin these bounds ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from math import comb

from common.errors import SecAggError

COMPLETE_UP_TO = 32
_COLLUDERS_BITS = 80
_ABSENTEES_BITS = 20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The graph's numbers; ``window`` 0 stands for the complete graph.

    ``window``: neighbours on either side. ``quorum``: survivors that every window must keep.
    ``share_threshold``: shares that rebuild a secret.
    """

    size: int
    window: int
    quorum: int
    share_threshold: int

    @property
    def degree(self) -> int:
        """Neighbours of each hospital."""
        return 2 * self.window or self.size - 1


@lru_cache(maxsize=256)
def shape_of(*, size: int, threshold: int, colluders: int, complete_up_to: int) -> Shape:
    """The shape for a roster of ``size`` of which at least ``threshold`` survive to the end.

    Complete where the sparse graph would save nothing.
    """
    if size > complete_up_to:
        for window in range(1, (size - 1) // 2):
            quorum = _smallest_quorum(size, window, colluders)
            if quorum is not None and _rarely(
                size, window, size - threshold, window - quorum + 1, _ABSENTEES_BITS
            ):
                return Shape(
                    size=size, window=window, quorum=quorum, share_threshold=2 * quorum - 1
                )
    return Shape(size=size, window=0, quorum=0, share_threshold=threshold)


def _smallest_quorum(size: int, window: int, colluders: int) -> int | None:
    """The smallest m, above half the window, such that m colluders in one are rarer than 2⁻⁸⁰."""
    for quorum in range(window // 2 + 1, window + 1):
        if _rarely(size, window, colluders, quorum, _COLLUDERS_BITS):
            return quorum
    return None


def _rarely(size: int, window: int, marked: int, least: int, bits: int) -> bool:
    """Whether some window holds ``least`` of ``marked`` with probability at most 2^-bits.

    Exact integers: size · P(hypergeometric ≥ least) · 2^bits ≤ 1.
    """
    ways = sum(
        comb(marked, held) * comb(size - marked, window - held)
        for held in range(least, min(window, marked) + 1)
    )
    return size * ways << bits <= comb(size, window)


class Graph:
    """One drawn graph over roster positions ``0..size-1``."""

    def __init__(self, shape: Shape, seed: bytes) -> None:
        """``seed``: public and unpredictable before the roster stands."""
        self.shape = shape
        # Sorting by hash is a uniform permutation as far as SHA-256 is a random function.
        self._ring = sorted(
            range(shape.size),
            key=lambda one: hashlib.sha256(b"ring" + seed + one.to_bytes(4, "big")).digest(),
        )
        self._place = {one: place for place, one in enumerate(self._ring)}

    def neighbours(self, one: int) -> list[int]:
        """The roster positions joined to ``one``, in ascending order."""
        size, window = self.shape.size, self.shape.window
        if not window:
            return [other for other in range(size) if other != one]
        place = self._place[one]
        return sorted(
            self._ring[(place + side * step) % size]
            for step in range(1, window + 1)
            for side in (-1, 1)
        )

    def check(self, present: Collection[int]) -> None:
        """Raise SecAggError unless every window keeps its quorum among ``present``."""
        size, window = self.shape.size, self.shape.window
        here = [one in present for one in self._ring]
        for start in range(size if window else 0):
            kept = sum(here[(start + step) % size] for step in range(window))
            if kept < self.shape.quorum:
                raise SecAggError(
                    f"survivors: {kept} of {window} neighbours on the ring are left, "
                    f"{self.shape.quorum} are needed; the round cannot be completed safely"
                )
