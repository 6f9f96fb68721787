"""A hospital's side of one aggregation: bytes in, bytes out, no I/O.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal & Seth 2017, "Practical secure
aggregation for privacy-preserving machine learning" (CCS), in its version for an active adversary.
The rules that protect this hospital's vector, whatever coordinator and colluders send:

1. The terms come from this hospital's own study and model, and meet its own policy.
2. The roster's members are enrolled here; each signed its fresh keys under these very terms.
3. Every mask's key is bound to the roster, which covers run, round, attempt, model and range.
4. The vector leaves under its own mask and one for every neighbour that shared secrets.
5. Shares are revealed once, for one survivor set, in which this hospital is; the set is at least
   the threshold, every window of the graph keeps its quorum, and at least ``threshold`` members of
   the roster, this one included, signed that very set (with that roster and those sharers).
6. Of one neighbour, either the share of its self-mask (alive) or that of its key (gone) is
   revealed, never both.
7. Every step is claimed in the hospital's durable ``Attempts`` before its answer leaves.
8. The first message that breaks a rule ends the attempt here; nothing more is said in it.

What remains: the coordinator and all hospitals but one learn the last one's vector by
subtraction, and anyone learns the sum. With 2·threshold - roster colluders or more, which the
terms keep above ``colluders``, a coordinator can have two survivor sets signed, one hospital alive
in one and gone in the other, and unmask it. A hospital may send wrong integers or wrong shares:
that spoils a sum, or ends an attempt, but uncovers nobody.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.errors import ConsiliumError, MessageError, RefusalError, SecAggError
from common.identity import Identity
from common.secagg import keys, messages, shamir
from common.secagg.clientstate import ClientState
from common.secagg.masks import apply_masks
from common.secagg.messages import Kind
from common.secagg.roster import Roster, seed_commitment
from common.secagg.terms import AggregationPolicy, Attempts, Pinned, Terms


class ClientSession:
    """One attempt at one hospital: ``advertise`` once, then ``answer`` each message in turn.

    Wrong calls by the hospital's own code raise RuntimeError or ValueError. Bad messages raise a
    ConsiliumError (MessageError, SignatureError, RefusalError, SecAggError) and end the attempt.
    """

    def __init__(
        self,
        *,
        name: str,
        identity: Identity,
        terms: Terms,
        policy: AggregationPolicy,
        pinned: Pinned,
        attempts: Attempts,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """``pinned`` holds every enrolled hospital, this one included. ``entropy(n)``: n bytes."""
        policy.check(terms)
        if name not in pinned or pinned[name] != identity.public:
            raise RefusalError(
                f"secagg.enrolled: hospital {name!r} is not enrolled with this identity",
                rule="secagg.enrolled",
            )
        self._name = name
        self._identity = identity
        self._terms = terms
        self._pinned = pinned
        self._attempts = attempts
        self._entropy = entropy
        self._state: ClientState | None = None
        self._roster: Roster | None = None
        self._over = False
        self._exposed = False

    @property
    def expects(self) -> Kind | None:
        """The message to answer next; None before ``advertise`` and when the attempt is over."""
        return self._state.expects if self._state else None

    @property
    def exposed(self) -> bool:
        """Whether a masked vector was produced: from then on the release must be charged.

        Others may complete the sum without this hospital's further help.
        """
        return self._exposed

    def advertise(self) -> bytes:
        """This hospital's Advert: two fresh keys, signed."""
        if self._state is not None or self._over:
            raise RuntimeError("advertise comes first, and once")
        self._claim(Kind.ADVERT)
        sealing, masking, seed = (self._entropy(keys.KEY_BYTES) for _ in range(3))
        advert = messages.Advert(
            sender=self._name,
            sealing_key=keys.public_of(sealing),
            masking_key=keys.public_of(masking),
        )
        self._state = ClientState(
            expects=Kind.ROSTER, sealing=sealing, masking=masking, seed=seed,
            advert=self._signed(Kind.ADVERT, advert.encode()),
        )  # fmt: skip
        return self._state.advert

    def answer(self, message: bytes, vector: NDArray[np.int32] | None = None) -> bytes:
        """The reply to the coordinator's ``message``; the last reply is the Reveal.

        ``vector`` [length]: this hospital's encoded, noised integers, needed with the Delivery.
        """
        if self._over:
            raise MessageError("secure aggregation: this attempt is over at this hospital")
        if self._state is None:
            raise RuntimeError("advertise comes first")
        if self._state.expects is Kind.DELIVERY and vector is not None:
            self._check_form(vector)
        try:
            body = messages.body_of(
                message, self._state.expects, self._terms.digest, is_signed=False
            )
            match self._state.expects:
                case Kind.ROSTER:
                    return self._on_roster(self._state, messages.Relay.decode(body))
                case Kind.DELIVERY:
                    if vector is None:
                        raise RuntimeError("a vector is needed with the Delivery")
                    return self._on_delivery(self._state, messages.Delivery.decode(body), vector)
                case Kind.SURVIVORS:
                    return self._on_survivors(self._state, messages.Survivors.decode(body))
                case _:
                    return self._on_agreements(self._state, messages.Relay.decode(body))
        except ConsiliumError:
            self._end()
            raise

    def freeze(self) -> bytes:
        """The whole state, **secret**: for a process that ends between messages.

        Keep it encrypted and delete it when the attempt is over.
        """
        if self._state is None:
            raise RuntimeError("there is nothing to freeze: advertise first, before the end")
        return self._state.encode(self._terms.digest, exposed=self._exposed)

    def thaw(self, frozen: bytes) -> ClientSession:
        """Take up the state of ``freeze`` in a new session of the same attempt; returns self."""
        if self._state is not None or self._over:
            raise RuntimeError("thaw takes the place of advertise")
        self._state, self._exposed = ClientState.decode(frozen, self._terms.digest)
        if self._state.expects is not Kind.ROSTER:
            self._roster = Roster.verified(self._state.roster, self._terms, self._pinned)
        return self

    def _on_roster(self, state: ClientState, relay: messages.Relay) -> bytes:
        if state.advert not in relay.messages:
            raise MessageError("roster: this hospital's own advert is not in it")
        roster = Roster.verified(relay.messages, self._terms, self._pinned)
        self._claim(Kind.SHARES)
        me = roster.position(self._name)
        neighbours = roster.graph.neighbours(me)
        threshold = roster.graph.shape.share_threshold
        points = [one + 1 for one in neighbours]
        of_seed = shamir.split(state.seed, points, threshold, self._entropy)
        of_key = shamir.split(state.masking, points, threshold, self._entropy)
        sealed = {
            one: keys.seal_shares(
                state.sealing,
                roster.adverts[one].sealing_key,
                roster.digest,
                me,
                one,
                (of_seed[one + 1], of_key[one + 1]),
                self._entropy,
            )
            for one in neighbours
        }
        shares = messages.Shares(
            sender=me,
            roster=roster.digest,
            commitment=seed_commitment(state.seed, roster.digest, me),
            sealed=sealed,
        )
        self._roster = roster
        self._state = replace(state, expects=Kind.DELIVERY, roster=relay.messages)
        return self._signed(Kind.SHARES, shares.encode())

    def _on_delivery(
        self, state: ClientState, delivery: messages.Delivery, vector: NDArray[np.int32]
    ) -> bytes:
        roster, me = self._placed()
        roster.check_present(set(delivery.sharers), "sharers")
        if me not in delivery.sharers:
            raise MessageError("sharers: this hospital shared, yet it is not listed")
        sharing = set(roster.graph.neighbours(me)) & set(delivery.sharers)
        if sharing != delivery.sealed.keys():
            raise MessageError("delivery: expected the shares of each neighbour that shared")
        held = {
            one: keys.open_shares(
                state.sealing, roster.adverts[one].sealing_key, roster.digest, one, me, sealed
            )
            for one, sealed in delivery.sealed.items()
        }
        bound = self._terms.input_bound
        if vector.min() < -bound or vector.max() > bound:
            raise SecAggError(
                f"vector: expected integers within ±{bound}; a larger one could overflow the sum, "
                f"so nothing is sent"
            )
        masks = [(keys.self_mask_key(state.seed, roster.digest), 1)]
        for one in sorted(sharing):
            public = roster.adverts[one].masking_key
            key = keys.mask_key(state.masking, public, roster.digest, (me, one))
            masks.append((key, 1 if me < one else -1))
        self._claim(Kind.MASKED)
        self._exposed = True
        start = (
            messages.header(Kind.MASKED, self._terms.digest)
            + messages.Masked(
                sender=me,
                roster=roster.digest,
                sharers=roster.sharers_digest(delivery.sharers),
                length=self._terms.length,
            ).encode()
        )
        # The masked vector is written where it is sent from; a copy of it would cost as much as
        # its hash. ``getvalue`` gives this very memory.
        size = len(start) + vector.nbytes + messages.SIGNATURE_BYTES
        upload = io.BytesIO(bytes(size))
        upload.write(start)
        digest = hashlib.sha256(start)
        with upload.getbuffer() as memory:
            masked = np.frombuffer(memory, "<u4", count=len(vector), offset=len(start))
            apply_masks(vector.view("<u4"), masks, masked, lambda piece: digest.update(piece.data))
            del masked
        self._state = replace(state, expects=Kind.SURVIVORS, sharers=delivery.sharers, held=held)
        upload.seek(len(start) + vector.nbytes)
        upload.write(messages.sign(self._identity, Kind.MASKED, digest.digest()))
        return upload.getvalue()

    def _on_survivors(self, state: ClientState, message: messages.Survivors) -> bytes:
        roster, me = self._placed()
        survivors = set(message.survivors)
        roster.check_present(survivors, "survivors")
        if not survivors <= set(state.sharers):
            raise MessageError("survivors: a hospital that shared no secrets cannot survive")
        if me not in survivors:
            raise MessageError("survivors: this hospital sent its vector, yet it is called gone")
        self._claim(Kind.AGREEMENT)
        agreement = messages.Agreement(
            sender=me, agreed=roster.agreed(state.sharers, message.survivors)
        )
        self._state = replace(state, expects=Kind.AGREEMENTS, survivors=message.survivors)
        return self._signed(Kind.AGREEMENT, agreement.encode())

    def _on_agreements(self, state: ClientState, relay: messages.Relay) -> bytes:
        roster, me = self._placed()
        agreed = roster.agreed(state.sharers, state.survivors)
        signers = [
            check_agreement(message, roster, self._pinned, state.survivors, agreed)
            for message in relay.messages
        ]
        if len(set(signers)) < len(signers):
            raise MessageError("agreements: a hospital is counted twice")
        if me not in signers:
            raise MessageError("agreements: this hospital's own signature is missing")
        if len(signers) < self._terms.threshold:
            raise SecAggError(
                f"agreements: {len(signers)} hospitals signed the survivor set, "
                f"{self._terms.threshold} are needed; nothing is revealed"
            )
        self._claim(Kind.REVEAL)
        alive = set(state.survivors)
        reveal = messages.Reveal(
            sender=me,
            agreed=agreed,
            seed=state.seed,
            of_seeds={one: pair[0] for one, pair in state.held.items() if one in alive},
            of_keys={one: pair[1] for one, pair in state.held.items() if one not in alive},
        )
        self._end()
        return self._signed(Kind.REVEAL, reveal.encode())

    def _placed(self) -> tuple[Roster, int]:
        if self._roster is None:
            raise RuntimeError("the roster comes first")
        return self._roster, self._roster.position(self._name)

    def _check_form(self, vector: NDArray[np.int32]) -> None:
        if (
            vector.dtype != np.dtype("<i4")
            or vector.shape != (self._terms.length,)
            or not vector.flags.c_contiguous
        ):
            raise ValueError(
                f"vector: expected {self._terms.length} int32 in a row, found "
                f"{vector.dtype} {vector.shape}"
            )

    def _claim(self, kind: Kind) -> None:
        self._attempts.claim(self._terms.release, self._terms.attempt, int(kind))

    def _signed(self, kind: Kind, body: bytes) -> bytes:
        return messages.signed(self._identity, kind, self._terms.digest, body)

    def _end(self) -> None:
        self._over = True
        self._state = None


def check_agreement(
    message: bytes, roster: Roster, pinned: Pinned, survivors: tuple[int, ...], agreed: bytes
) -> int:
    """The survivor that signed ``message`` over ``agreed``; raises a domain error otherwise."""
    body = messages.body_of(message, Kind.AGREEMENT, roster.terms.digest, is_signed=True)
    agreement = messages.Agreement.decode(body)
    if agreement.sender not in survivors:
        raise MessageError("agreement: signed by a hospital that is not among the survivors")
    name = roster.adverts[agreement.sender].sender
    messages.verify(message, Kind.AGREEMENT, pinned[name])
    if agreement.agreed != agreed:
        raise SecAggError(
            f"agreement: hospital {name!r} signed another roster, other sharers or other "
            f"survivors; the coordinator told the hospitals different things"
        )
    return agreement.sender
