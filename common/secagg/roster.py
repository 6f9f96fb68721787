"""The signed roster: who takes part, each with fresh keys under its pinned identity."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from common.errors import MessageError, RefusalError, SecAggError
from common.secagg.graph import Graph, shape_of
from common.secagg.messages import Advert, Kind, body_of, verify
from common.secagg.terms import Pinned, Terms
from common.secagg.wire import Writer


def open_advert(data: bytes, terms: Terms, pinned: Pinned) -> Advert:
    """The advert in ``data``, made by an enrolled hospital under these very terms."""
    advert = Advert.decode(body_of(data, Kind.ADVERT, terms.digest, is_signed=True))
    if advert.sender not in pinned:
        raise RefusalError(
            f"secagg.enrolled: hospital {advert.sender[:40]!r} has no key pinned here",
            rule="secagg.enrolled",
        )
    verify(data, Kind.ADVERT, pinned[advert.sender])
    return advert


@dataclass(frozen=True)
class Roster:
    """Verified adverts in the order of names; a hospital's position in it is its number."""

    terms: Terms
    messages: tuple[bytes, ...]
    adverts: tuple[Advert, ...]

    @classmethod
    def verified(cls, messages: tuple[bytes, ...], terms: Terms, pinned: Pinned) -> Roster:
        """The roster of ``messages``; raises a domain error unless all of it holds.

        Rules: between threshold and ``hospitals`` adverts; names strictly ascending; every advert
        signed by its pinned key under these terms; no pinned key twice; all fresh keys distinct.
        """
        if not terms.threshold <= len(messages) <= terms.hospitals:
            raise SecAggError(
                f"roster: expected {terms.threshold} to {terms.hospitals} hospitals, "
                f"found {len(messages)}"
            )
        adverts = tuple(open_advert(message, terms, pinned) for message in messages)
        names = [advert.sender for advert in adverts]
        if any(left >= right for left, right in pairwise(names)):
            raise MessageError("roster: hospitals are repeated or out of order")
        if len({pinned[name].key for name in names}) < len(names):
            raise MessageError("roster: two hospitals have one identity")
        fresh = [key for advert in adverts for key in (advert.sealing_key, advert.masking_key)]
        if len(set(fresh)) < len(fresh):
            raise MessageError("roster: a key is used twice")
        return cls(terms, messages, adverts)

    @property
    def size(self) -> int:
        """Hospitals in it."""
        return len(self.adverts)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over terms and adverts: what all keys and later messages are bound to."""
        writer = Writer().text("consilium-secagg-roster-v1").raw(self.terms.digest)
        for message in self.messages:
            writer.u32(len(message)).raw(message)
        return hashlib.sha256(writer.done()).digest()

    @cached_property
    def graph(self) -> Graph:
        """Who is whose neighbour."""
        shape = shape_of(
            size=self.size,
            threshold=self.terms.threshold,
            colluders=self.terms.colluders,
            complete_up_to=self.terms.complete_up_to,
        )
        return Graph(shape, self.digest)

    def position(self, name: str) -> int:
        """The number of ``name``; raises MessageError when it is not in the roster."""
        for position, advert in enumerate(self.adverts):
            if advert.sender == name:
                return position
        raise MessageError(f"roster: hospital {name!r} is not in it")

    def check_present(self, present: Collection[int], what: str) -> None:
        """Raise SecAggError unless ``present`` are roster members, enough, and well spread."""
        if not all(0 <= one < self.size for one in present):
            raise MessageError(f"{what}: a hospital outside the roster")
        if len(present) < self.terms.threshold:
            raise SecAggError(
                f"{what}: {len(present)} hospitals are left, {self.terms.threshold} are needed; "
                f"the attempt ends with nothing revealed"
            )
        self.graph.check(present)

    def sharers_digest(self, sharers: tuple[int, ...]) -> bytes:
        """What a masked vector says of whose masks are in it."""
        writer = Writer().text("consilium-secagg-sharers-v1").raw(self.digest)
        return hashlib.sha256(writer.positions(sharers).done()).digest()

    def agreed(self, sharers: tuple[int, ...], survivors: tuple[int, ...]) -> bytes:
        """What every hospital signs before it reveals a share."""
        writer = Writer().text("consilium-secagg-agreement-v1").raw(self.sharers_digest(sharers))
        return hashlib.sha256(writer.positions(survivors).done()).digest()


def seed_commitment(seed: bytes, roster: bytes, sender: int) -> bytes:
    """Fixes a self-mask's seed without showing it: SHA-256 of 32 random bytes and their place."""
    writer = Writer().text("consilium-secagg-seed-v1").raw(roster).u16(sender).raw(seed)
    return hashlib.sha256(writer.done()).digest()
