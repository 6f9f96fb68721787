"""What one aggregation is about, and what a hospital's policy demands of it.

Every hospital derives the terms from the study and the model it was sent, never from a message of
the coordinator. Their digest is in every signature and every key: two hospitals with different
terms cannot take part in the same sum, and a coordinator that sends one of them another model,
round, threshold or range is found out before anything masked leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from common.errors import RefusalError, SecAggError
from common.identity import PublicIdentity
from common.secagg.graph import COMPLETE_UP_TO
from common.secagg.wire import Writer

DIGEST_BYTES = 32
LARGEST_ROSTER = 4096
LARGEST_LENGTH = 2**30
_HALF_RANGE = 2**31


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of one attempt at one sum.

    ``run``, ``stage``, ``round``, ``step``: which release this is; ``attempt`` counts its retries.
    ``model``: SHA-256 of the model the update was computed from. ``plan``: SHA-256 of how it was
    clipped, encoded and noised (``Encoding.digest``).
    ``hospitals``: the largest roster. ``threshold``: fewest hospitals in the sum, so that
    hospitals - threshold may vanish. ``colluders``: how many hospitals may work with the
    coordinator without weakening the promise.
    ``length``: coordinates. ``input_bound``: largest absolute value of one hospital's integers,
    noise included; hospitals · input_bound must stay below 2³¹, so the sum cannot wrap.
    """

    run: str
    stage: str
    round: int
    step: int
    attempt: int
    model: bytes
    plan: bytes
    hospitals: int
    threshold: int
    colluders: int
    length: int
    input_bound: int
    complete_up_to: int = COMPLETE_UP_TO

    def __post_init__(self) -> None:
        """Refuse terms under which the protocol promises nothing."""
        for name in ("round", "step", "attempt"):
            if not 0 <= getattr(self, name) < 2**32:
                raise SecAggError(f"{name}: expected 0 to 2³²-1, found {getattr(self, name)}")
        for name in ("model", "plan"):
            if len(getattr(self, name)) != DIGEST_BYTES:
                raise SecAggError(f"{name}: expected a digest of {DIGEST_BYTES} bytes")
        if not 2 <= self.threshold <= self.hospitals <= LARGEST_ROSTER:
            raise SecAggError(
                f"threshold: expected 2 to {self.hospitals} hospitals (at most {LARGEST_ROSTER}), "
                f"found {self.threshold}"
            )
        if not 0 <= self.colluders <= self.threshold - 2:
            raise SecAggError(
                f"colluders: expected 0 to {self.threshold - 2}, found {self.colluders}; at least "
                f"two honest hospitals must be in every sum"
            )
        # Each honest hospital signs one survivor set; two sets with ``threshold`` signatures each
        # would need 2·threshold ≤ honest + 2·colluders signatures.
        if 2 * self.threshold <= self.hospitals + self.colluders:
            raise SecAggError(
                f"threshold: {self.threshold} of {self.hospitals} with {self.colluders} colluders "
                f"lets two survivor sets be signed at once; it must exceed "
                f"{(self.hospitals + self.colluders) // 2}"
            )
        if not 1 <= self.length <= LARGEST_LENGTH:
            raise SecAggError(f"length: expected 1 to 2³⁰, found {self.length}")
        if self.input_bound < 1 or self.hospitals * self.input_bound >= _HALF_RANGE:
            raise SecAggError(
                f"range: {self.hospitals} hospitals with integers up to {self.input_bound} "
                f"overflow 32 bits; choose a smaller scale"
            )

    @cached_property
    def release(self) -> bytes:
        """The digest that all attempts at this release share."""
        writer = Writer().text("consilium-secagg-release-v1")
        writer.text(self.run).text(self.stage).u32(self.round).u32(self.step)
        return hashlib.sha256(writer.done()).digest()

    @cached_property
    def digest(self) -> bytes:
        """The context of every signature and key."""
        writer = Writer().text("consilium-secagg-terms-v1")
        writer.raw(self.release).u32(self.attempt).raw(self.model).raw(self.plan)
        for number in (self.hospitals, self.threshold, self.colluders, self.complete_up_to):
            writer.u32(number)
        return hashlib.sha256(writer.u32(self.length).u32(self.input_bound).done()).digest()


@dataclass(frozen=True, kw_only=True)
class AggregationPolicy:
    """What a hospital demands, whatever the study says.

    ``minimum_hospitals``: fewest hospitals in a sum. ``maximum_dropouts``: most that may vanish.
    ``minimum_colluders``: how many colluders the thresholds and the noise must withstand.
    """

    minimum_hospitals: int = 3
    maximum_dropouts: int = LARGEST_ROSTER
    minimum_colluders: int = 0

    def check(self, terms: Terms) -> None:
        """Raise RefusalError where ``terms`` fall short."""
        dropouts = terms.hospitals - terms.threshold
        for rule, found, limit, sound in (
            (
                "secagg.minimum_hospitals",
                terms.threshold,
                self.minimum_hospitals,
                terms.threshold >= self.minimum_hospitals,
            ),
            (
                "secagg.maximum_dropouts",
                dropouts,
                self.maximum_dropouts,
                dropouts <= self.maximum_dropouts,
            ),
            (
                "secagg.minimum_colluders",
                terms.colluders,
                self.minimum_colluders,
                terms.colluders >= self.minimum_colluders,
            ),
        ):
            if not sound:
                raise RefusalError(
                    f"{rule}: this hospital's limit is {limit}, the study has {found}", rule=rule
                )


class Attempts(Protocol):
    """The hospital's durable memory of the steps it has taken."""

    def claim(self, release: bytes, attempt: int, step: int) -> None:
        """Record that ``step`` of ``attempt`` is about to be taken, durably, then return.

        Raises RefusalError unless (attempt, step) is greater than every pair ever claimed for
        ``release``. A process restored from an old copy of its state can then repeat nothing.
        """
        ...


class MemoryAttempts:
    """Attempts that end with the process: for simulations and tests."""

    def __init__(self) -> None:
        self._latest: dict[bytes, tuple[int, int]] = {}

    def claim(self, release: bytes, attempt: int, step: int) -> None:
        """See ``Attempts``."""
        latest = self._latest.get(release, (-1, -1))
        if (attempt, step) <= latest:
            raise RefusalError(
                f"secagg.attempt: step {step} of attempt {attempt} is not after step {latest[1]} "
                f"of attempt {latest[0]}, which was taken already; raise the attempt number",
                rule="secagg.attempt",
            )
        self._latest[release] = (attempt, step)


Pinned = Mapping[str, PublicIdentity]
"""The enrolled hospitals: name → the key pinned at enrolment."""
