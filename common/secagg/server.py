"""The coordinator's side of one aggregation: bytes in, bytes out, no I/O.

It relays, adds up, and learns the sum of the survivors' vectors and nothing else, as long as the
hospitals follow ``client``'s rules. A message that is malformed, forged, late or repeated raises a
domain error and changes nothing: its sender counts as silent, and may yet send a sound one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.errors import MessageError, SecAggError
from common.secagg import keys, messages, shamir
from common.secagg.client import check_agreement
from common.secagg.masks import Mask, apply_masks
from common.secagg.messages import Kind
from common.secagg.roster import Roster, open_advert, seed_commitment
from common.secagg.terms import Pinned, Terms


@dataclass(frozen=True)
class Aggregate:
    """``values`` [length] int32: the exact sum of the ``survivors``' vectors."""

    values: NDArray[np.int32]
    survivors: tuple[str, ...]


class ServerSession:
    """One attempt at the coordinator.

    ``receive`` hospitals' messages of one step, in any order, until enough time has passed;
    ``advance`` closes the step and says what goes to whom. After the fourth ``advance`` come the
    Reveals; then ``finish`` gives the sum. Too few left: SecAggError, and the attempt is over.
    """

    def __init__(self, *, terms: Terms, pinned: Pinned) -> None:
        """``pinned``: the enrolled hospitals."""
        self._terms = terms
        self._pinned = pinned
        self._collects: Kind | None = Kind.ADVERT
        self._adverts: dict[str, bytes] = {}
        self._roster: Roster | None = None
        self._shares: dict[int, messages.Shares] = {}
        self._sharers: tuple[int, ...] = ()
        self._total = np.zeros(0, dtype="<u4")
        self._arrived: set[int] = set()
        self._survivors: tuple[int, ...] = ()
        self._agreements: dict[int, bytes] = {}
        self._reveals: dict[int, messages.Reveal] = {}

    @property
    def collects(self) -> Kind | None:
        """The kind of message ``receive`` takes now; None when the attempt is over."""
        return self._collects

    @property
    def heard(self) -> tuple[str, ...]:
        """Who has answered in this step."""
        if self._collects is Kind.ADVERT:
            return tuple(sorted(self._adverts))
        answered = (
            {
                Kind.SHARES: self._shares,
                Kind.MASKED: self._arrived,
                Kind.AGREEMENT: self._agreements,
                Kind.REVEAL: self._reveals,
            }.get(self._collects, ())
            if self._collects
            else ()
        )
        return tuple(self._name(one) for one in sorted(answered))

    def receive(self, message: bytes) -> str:
        """Take in one hospital's message; returns the hospital's name."""
        if self._collects is None:
            raise MessageError("secure aggregation: this attempt is over")
        if self._collects is Kind.ADVERT:
            advert = open_advert(message, self._terms, self._pinned)
            self._once(advert.sender in self._adverts, advert.sender)
            self._adverts[advert.sender] = bytes(message)
            return advert.sender
        body = messages.body_of(message, self._collects, self._terms.digest, is_signed=True)
        match self._collects:
            case Kind.SHARES:
                return self._on_shares(message, messages.Shares.decode(body))
            case Kind.MASKED:
                return self._on_masked(message, *messages.Masked.decode(body))
            case Kind.AGREEMENT:
                return self._on_agreement(message)
            case _:
                return self._on_reveal(message, messages.Reveal.decode(body))

    def advance(self) -> dict[str, bytes]:
        """Close the step: hospital → the message it gets next."""
        try:
            match self._collects:
                case Kind.ADVERT:
                    return self._send_roster()
                case Kind.SHARES:
                    return self._send_deliveries()
                case Kind.MASKED:
                    return self._send_survivors()
                case Kind.AGREEMENT:
                    return self._send_agreements()
        except SecAggError:
            self._collects = None
            raise
        raise RuntimeError("advance follows the first four steps; the fifth ends with finish")

    def finish(self) -> Aggregate:
        """The sum, from the Reveals that came; raises SecAggError when they do not suffice."""
        if self._collects is not Kind.REVEAL:
            raise RuntimeError("finish follows the Reveals, once")
        self._collects = None
        roster = self._rostered()
        masks: list[Mask] = []
        for one in self._survivors:
            seed = self._reveals[one].seed if one in self._reveals else self._seed_of(one)
            masks.append((keys.self_mask_key(seed, roster.digest), -1))
        for gone in set(self._sharers) - set(self._survivors):
            private = self._key_of(gone)
            for one in set(roster.graph.neighbours(gone)) & set(self._survivors):
                public = roster.adverts[one].masking_key
                key = keys.mask_key(private, public, roster.digest, (gone, one))
                # The survivor added it when it comes first: take that back.
                masks.append((key, -1 if one < gone else 1))
        apply_masks(self._total, masks, self._total)
        return Aggregate(self._total.view("<i4"), tuple(self._name(one) for one in self._survivors))

    def _send_roster(self) -> dict[str, bytes]:
        ordered = tuple(self._adverts[name] for name in sorted(self._adverts))
        self._roster = Roster.verified(ordered, self._terms, self._pinned)
        self._collects = Kind.SHARES
        body = messages.Relay(messages=ordered).encode()
        return self._to_each(range(self._roster.size), Kind.ROSTER, body)

    def _send_deliveries(self) -> dict[str, bytes]:
        roster = self._rostered()
        roster.check_present(set(self._shares), "sharers")
        self._sharers = tuple(sorted(self._shares))
        self._total = np.zeros(self._terms.length, dtype="<u4")
        self._collects = Kind.MASKED
        sent: dict[str, bytes] = {}
        for one in self._sharers:
            neighbours = set(roster.graph.neighbours(one)) & set(self._sharers)
            sealed = {other: self._shares[other].sealed[one] for other in neighbours}
            body = messages.Delivery(sharers=self._sharers, sealed=sealed).encode()
            sent |= self._to_each([one], Kind.DELIVERY, body)
        return sent

    def _send_survivors(self) -> dict[str, bytes]:
        self._rostered().check_present(self._arrived, "survivors")
        self._survivors = tuple(sorted(self._arrived))
        self._collects = Kind.AGREEMENT
        body = messages.Survivors(survivors=self._survivors).encode()
        return self._to_each(self._survivors, Kind.SURVIVORS, body)

    def _send_agreements(self) -> dict[str, bytes]:
        self._rostered().check_present(set(self._agreements), "agreements")
        self._collects = Kind.REVEAL
        signers = sorted(self._agreements)
        body = messages.Relay(messages=tuple(self._agreements[one] for one in signers)).encode()
        return self._to_each(signers, Kind.AGREEMENTS, body)

    def _on_shares(self, message: bytes, shares: messages.Shares) -> str:
        name = self._verified(message, Kind.SHARES, shares.sender, shares.roster, self._shares)
        neighbours = self._rostered().graph.neighbours(shares.sender)
        if shares.sealed.keys() != set(neighbours):
            raise MessageError(f"SHARES: hospital {name!r} shared with others than its neighbours")
        self._shares[shares.sender] = shares
        return name

    def _on_masked(self, message: bytes, masked: messages.Masked, vector: memoryview) -> str:
        name = self._verified(message, Kind.MASKED, masked.sender, masked.roster, self._arrived)
        if masked.sender not in self._sharers or masked.length != self._terms.length:
            raise MessageError(f"MASKED: hospital {name!r} shared nothing, or sends another length")
        if masked.sharers != self._rostered().sharers_digest(self._sharers):
            raise MessageError(f"MASKED: hospital {name!r} masked for other sharers than announced")
        self._arrived.add(masked.sender)
        np.add(self._total, np.frombuffer(vector, dtype="<u4"), out=self._total)
        return name

    def _on_agreement(self, message: bytes) -> str:
        roster = self._rostered()
        agreed = roster.agreed(self._sharers, self._survivors)
        sender = check_agreement(message, roster, self._pinned, self._survivors, agreed)
        self._once(sender in self._agreements, self._name(sender))
        self._agreements[sender] = bytes(message)
        return self._name(sender)

    def _on_reveal(self, message: bytes, reveal: messages.Reveal) -> str:
        roster = self._rostered()
        name = self._verified(message, Kind.REVEAL, reveal.sender, roster.digest, self._reveals)
        if reveal.agreed != roster.agreed(self._sharers, self._survivors):
            raise MessageError(f"REVEAL: hospital {name!r} agreed to other survivors")
        if reveal.sender not in self._agreements:
            raise MessageError(f"REVEAL: hospital {name!r} did not sign the survivor set")
        neighbours = set(roster.graph.neighbours(reveal.sender))
        alive = set(self._survivors)
        if (
            reveal.of_seeds.keys() != neighbours & alive
            or reveal.of_keys.keys() != (neighbours & set(self._sharers)) - alive
        ):
            raise MessageError(f"REVEAL: hospital {name!r} reveals other shares than asked for")
        self._check_seed(reveal.seed, reveal.sender)
        self._reveals[reveal.sender] = reveal
        return name

    def _verified(
        self,
        message: bytes,
        kind: Kind,
        sender: int,
        roster_digest: bytes,
        heard: Mapping[int, object] | set[int],
    ) -> str:
        roster = self._rostered()
        if sender >= roster.size:
            raise MessageError(f"{kind.name}: sender {sender} is not in the roster")
        name = self._name(sender)
        messages.verify(message, kind, self._pinned[name])
        if roster_digest != roster.digest:
            raise MessageError(f"{kind.name}: hospital {name!r} holds another roster")
        self._once(sender in heard, name)
        return name

    def _once(self, repeated: bool, name: str) -> None:
        if repeated:
            raise MessageError(f"secure aggregation: hospital {name!r} has answered this already")

    def _seed_of(self, owner: int) -> bytes:
        shares = {
            one + 1: reveal.of_seeds[owner]
            for one, reveal in self._reveals.items()
            if owner in reveal.of_seeds
        }
        return self._rebuild(owner, shares, lambda seed: self._check_seed(seed, owner))

    def _key_of(self, owner: int) -> bytes:
        public = self._rostered().adverts[owner].masking_key
        shares = {
            one + 1: reveal.of_keys[owner]
            for one, reveal in self._reveals.items()
            if owner in reveal.of_keys
        }

        def check(private: bytes) -> None:
            if keys.public_of(private) != public:
                raise SecAggError("the rebuilt key is not the advertised one")

        return self._rebuild(owner, shares, check)

    def _rebuild(
        self, owner: int, shares: Mapping[int, int], check: Callable[[bytes], None]
    ) -> bytes:
        """The secret; where a share is wrong and there is one to spare, without that one."""
        threshold = self._rostered().graph.shape.share_threshold
        points = sorted(shares)
        if len(points) < threshold:
            raise SecAggError(
                f"shares: {len(points)} hospitals hold shares of {self._name(owner)!r} and "
                f"answered, {threshold} are needed; the attempt ends without a sum"
            )
        tries = [points[:threshold]]
        if len(points) > threshold:
            tries += [[x for x in points if x != left][:threshold] for left in points]
        for chosen in tries:
            try:
                secret = shamir.combine({x: shares[x] for x in chosen})
                check(secret)
            except SecAggError:
                continue
            return secret
        raise SecAggError(
            f"shares: those of {self._name(owner)!r} do not rebuild what it committed to; "
            f"it, or the hospitals that answered, sent wrong ones"
        )

    def _check_seed(self, seed: bytes, owner: int) -> None:
        expected = self._shares[owner].commitment
        if seed_commitment(seed, self._rostered().digest, owner) != expected:
            raise SecAggError(f"seed: hospital {self._name(owner)!r} committed to another one")

    def _to_each(
        self, receivers: range | list[int] | tuple[int, ...], kind: Kind, body: bytes
    ) -> dict[str, bytes]:
        message = messages.unsigned(kind, self._terms.digest, body)
        return {self._name(one): message for one in receivers}

    def _name(self, position: int) -> str:
        return self._rostered().adverts[position].sender

    def _rostered(self) -> Roster:
        if self._roster is None:
            raise RuntimeError("the roster comes first")
        return self._roster
