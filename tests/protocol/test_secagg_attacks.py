"""A lying coordinator, dishonest peers, and anyone on the wire: each refused by the honest side."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import MessageError, RefusalError, SecAggError, SignatureError
from common.secagg import Kind, keys, messages, shamir
from common.secagg.client import ClientSession
from common.secagg.messages import Agreement, Delivery, Relay, Reveal, Survivors


def coordinator(one: Any, kind: Kind, body: Any) -> bytes:
    """A message that the coordinator makes up."""
    return messages.unsigned(kind, one.terms.digest, body.encode())


def opened(one: Any, data: bytes, kind: Kind) -> messages.Reader:
    return messages.body_of(data, kind, one.terms.digest, is_signed=kind % 2 == 1)


@pytest.fixture
def identity(world: Any) -> Any:
    """name → signing key: what a dishonest hospital has."""
    return lambda one, name: one.clients[name]._identity


# What each hospital is sent in turn, and by whom it would be answered.
SENT = (Kind.ROSTER, Kind.DELIVERY, Kind.SURVIVORS, Kind.AGREEMENTS)


@pytest.mark.parametrize("kind", SENT)
def test_truncated_extended_and_foreign_messages(world: Any, refused: Any, kind: Kind) -> None:
    for change in (
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"XXXX" + data[4:],
        lambda data: data[:4] + b"\xff" + data[5:],
        lambda data: data[:36] + bytes([data[36] ^ 1]) + data[37:],
        lambda data: data[:37] + b"\xff\xff" + data[39:],
    ):
        one = world(4, 3)
        outgoing = one.until(kind)
        name = one.names[1]
        error = refused(one.answer, name, change(outgoing[name]))
        assert isinstance(error, (MessageError, SignatureError, SecAggError))
        # The attempt is over for this hospital: not even the true message is answered now.
        assert "over at this hospital" in str(refused(one.answer, name, outgoing[name]))


@pytest.mark.parametrize("kind", SENT)
def test_replayed_and_reordered_messages(world: Any, refused: Any, kind: Kind) -> None:
    for other in SENT:
        if other is kind:
            continue
        one = world(4, 3)
        stale = {}
        one.advertise()
        for each in SENT:
            stale[each] = one.server.advance()
            one.step(stale[each])
        two = world(4, 3)
        two.until(kind)
        assert isinstance(
            refused(two.answer, two.names[0], stale[other][two.names[0]]), MessageError
        )


@pytest.mark.parametrize("kind", SENT)
@pytest.mark.parametrize(
    "changes",
    [{"attempt": 1}, {"round": 2}, {"run": "other"}, {"model": b"m" * 32}, {"input_bound": 9}],
)
def test_messages_of_another_attempt(
    world: Any, refused: Any, kind: Kind, changes: dict[str, Any]
) -> None:
    other = world(3, 2, **changes).until(kind)
    one = world(3, 2)
    one.until(kind)
    assert "another run, round, attempt, model or range" in str(
        refused(one.answer, one.names[0], other[one.names[0]])
    )


def test_a_different_model_for_one_hospital(world: Any, refused: Any) -> None:
    """It signs its advert over the model it was given; nobody else accepts that advert."""
    one = world(4, 3)
    victim = one.names[0]
    odd = replace(one.terms, model=b"another model".ljust(32))
    one.clients[victim] = one.session(victim, terms=odd)
    advert = one.clients[victim].advertise()
    assert isinstance(refused(one.server.receive, advert), MessageError)
    one.advertise(one.names[1:])
    # A coordinator that relabels the advert breaks its signature.
    relabelled = messages.header(Kind.ADVERT, one.terms.digest) + advert[37:]
    honest = [one.sent[Kind.ADVERT][name] for name in one.names[1:]]
    lie = coordinator(one, Kind.ROSTER, Relay(messages=(relabelled, *honest)))
    assert isinstance(refused(one.answer, one.names[1], lie), SignatureError)
    # Nor can the victim be shown a roster made for its own terms.
    lie = messages.unsigned(Kind.ROSTER, odd.digest, Relay(messages=(advert, *honest)).encode())
    assert isinstance(refused(one.answer, victim, lie), MessageError)


class TestRoster:
    def roster(self, world: Any, **settings: Any) -> tuple[Any, list[bytes]]:
        one = world(5, 4, **settings)
        one.advertise()
        return one, [one.sent[Kind.ADVERT][name] for name in one.names]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda adverts: adverts[1:], "own advert is not in it"),
            (lambda adverts: adverts[:3], "expected 4 to 5 hospitals, found 3"),
            (lambda adverts: [*adverts, adverts[-1]], "expected 4 to 5 hospitals, found 6"),
            (lambda adverts: [adverts[0], *adverts[:4]], "repeated or out of order"),
            (lambda adverts: [adverts[1], adverts[0], *adverts[2:]], "repeated or out of order"),
            (lambda adverts: [adverts[0], b"", *adverts[2:]], "not a message of this protocol"),
        ],
    )
    def test_wrong_members(self, world: Any, refused: Any, change: Any, words: str) -> None:
        one, adverts = self.roster(world)
        lie = coordinator(one, Kind.ROSTER, Relay(messages=tuple(change(adverts))))
        assert words in str(refused(one.answer, one.names[0], lie))

    def test_a_key_swapped_by_the_coordinator(self, world: Any, refused: Any) -> None:
        one, adverts = self.roster(world)
        forged = bytearray(adverts[2])
        forged[-64 - 32 : -64] = keys.public_of(b"e" * 32)
        adverts[2] = bytes(forged)
        lie = coordinator(one, Kind.ROSTER, Relay(messages=tuple(adverts)))
        assert isinstance(refused(one.answer, one.names[0], lie), SignatureError)
        assert isinstance(refused(world(5, 4).server.receive, bytes(forged)), SignatureError)

    def test_a_hospital_that_was_never_enrolled(self, world: Any, refused: Any) -> None:
        """The coordinator's own invention, or a member signing in another's name."""
        one, adverts = self.roster(world)
        big = world(6, 5)
        stranger = replace(big.terms, hospitals=5, threshold=4, input_bound=one.terms.input_bound)
        advert = big.session(big.names[5], terms=stranger).advertise()
        lie = coordinator(one, Kind.ROSTER, Relay(messages=(*adverts[:4], advert)))
        error = refused(one.answer, one.names[0], lie)
        assert isinstance(error, RefusalError)
        assert error.rule == "secagg.enrolled"

    @pytest.mark.parametrize("of_another", [False, True])
    def test_a_fresh_key_used_twice(
        self, world: Any, refused: Any, identity: Any, of_another: bool
    ) -> None:
        one, adverts = self.roster(world)
        own = messages.Advert.decode(opened(one, adverts[4], Kind.ADVERT))
        copied = replace(own, masking_key=adverts[1][-96:-64] if of_another else own.sealing_key)
        forged = messages.signed(
            identity(one, one.names[4]), Kind.ADVERT, one.terms.digest, copied.encode()
        )
        lie = coordinator(one, Kind.ROSTER, Relay(messages=(*adverts[:4], forged)))
        assert "a key is used twice" in str(refused(one.answer, one.names[0], lie))

    def test_one_identity_under_two_names(self, world: Any, refused: Any, identity: Any) -> None:
        one = world(5, 4)
        one.pinned[one.names[4]] = one.pinned[one.names[3]]
        twin = one.session(one.names[4], identity=identity(one, one.names[3]))
        one.advertise(one.names[:4])
        adverts = [one.sent[Kind.ADVERT][name] for name in one.names[:4]]
        lie = coordinator(one, Kind.ROSTER, Relay(messages=(*adverts, twin.advertise())))
        assert "two hospitals have one identity" in str(refused(one.answer, one.names[0], lie))

    def test_a_weak_point(self, world: Any, refused: Any, identity: Any) -> None:
        one, adverts = self.roster(world)
        own = messages.Advert.decode(opened(one, adverts[4], Kind.ADVERT))
        weak = replace(own, sealing_key=bytes(32))
        forged = messages.signed(
            identity(one, one.names[4]), Kind.ADVERT, one.terms.digest, weak.encode()
        )
        lie = coordinator(one, Kind.ROSTER, Relay(messages=(*adverts[:4], forged)))
        assert "low order" in str(refused(one.answer, one.names[0], lie))

    def test_different_rosters_for_two_hospitals(self, world: Any, refused: Any) -> None:
        """Keys are bound to the roster: shares sealed under another one do not open."""
        one, adverts = self.roster(world)
        small = coordinator(one, Kind.ROSTER, Relay(messages=tuple(adverts[:4])))
        outgoing = one.server.advance()
        replies = {name: one.answer(name, outgoing[name]) for name in one.names[1:]}
        odd = one.answer(one.names[0], small)
        assert "holds another roster" in str(refused(one.server.receive, odd))
        sealed = {}
        for place in range(1, 4):
            shares = messages.Shares.decode(opened(one, replies[one.names[place]], Kind.SHARES))
            sealed[place] = shares.sealed[0]
        lie = coordinator(one, Kind.DELIVERY, Delivery(sharers=(0, 1, 2, 3), sealed=sealed))
        assert "hold different rosters" in str(refused(one.answer, one.names[0], lie))


class TestDelivery:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda one: replace(one, sharers=one.sharers[:3]), "3 hospitals are left"),
            (lambda one: replace(one, sharers=(1, 2, 3, 4)), "it is not listed"),
            (lambda one: replace(one, sharers=(0, 1, 2, 3, 9)), "outside the roster"),
            (lambda one: replace(one, sealed={1: one.sealed[1]}), "shares of each neighbour"),
            (lambda one: replace(one, sharers=(0, 1, 2, 3)), "shares of each neighbour"),
            (
                lambda one: replace(one, sealed=one.sealed | {1: one.sealed[2], 2: one.sealed[1]}),
                "not sealed for hospital",
            ),
        ],
    )
    def test_wrong_deliveries(self, world: Any, refused: Any, change: Any, words: str) -> None:
        one = world(5, 4)
        outgoing = one.until(Kind.DELIVERY)
        name = one.names[0]
        honest = Delivery.decode(opened(one, outgoing[name], Kind.DELIVERY))
        lie = coordinator(one, Kind.DELIVERY, change(honest))
        assert words in str(refused(one.answer, name, lie))
        assert Kind.MASKED not in one.sent

    def test_shares_meant_for_another(self, world: Any, refused: Any) -> None:
        one = world(5, 4)
        outgoing = one.until(Kind.DELIVERY)
        assert isinstance(refused(one.answer, one.names[0], outgoing[one.names[1]]), MessageError)

    def test_an_integer_beyond_the_proven_range(self, world: Any, refused: Any) -> None:
        for beyond in (1, -1):
            one = world(5, 4)
            outgoing = one.until(Kind.DELIVERY)
            one.vectors[one.names[0]][2] = beyond * (one.terms.input_bound + 1)
            assert "could overflow" in str(
                refused(one.answer, one.names[0], outgoing[one.names[0]])
            )


class TestSurvivors:
    @pytest.mark.parametrize(
        ("survivors", "words"),
        [
            ((0, 1, 2), "3 hospitals are left"),
            ((1, 2, 3, 4), "yet it is called gone"),
            ((0, 1, 2, 7), "outside the roster"),
            ((0, 1, 1, 2), "repeated or out of order"),
            ((3, 2, 1, 0), "repeated or out of order"),
        ],
    )
    def test_wrong_survivors(
        self, world: Any, refused: Any, survivors: tuple[int, ...], words: str
    ) -> None:
        one = world(5, 4)
        one.until(Kind.SURVIVORS)
        lie = coordinator(one, Kind.SURVIVORS, Survivors(survivors=survivors))
        assert words in str(refused(one.answer, one.names[0], lie))

    def test_a_survivor_that_never_shared(self, world: Any, refused: Any) -> None:
        one = world(5, 3)
        one.advertise()
        outgoing = one.server.advance()
        one.step(outgoing, [one.names[4]])
        one.step(one.server.advance())
        lie = coordinator(one, Kind.SURVIVORS, Survivors(survivors=(0, 1, 2, 4)))
        assert "shared no secrets" in str(refused(one.answer, one.names[0], lie))

    def test_two_survivor_sets_to_one_hospital(self, world: Any, refused: Any) -> None:
        """First alive, then dead: the second announcement is not even read."""
        one = world(5, 4)
        one.until(Kind.SURVIVORS)
        first, second = (
            coordinator(one, Kind.SURVIVORS, Survivors(survivors=some))
            for some in ((0, 1, 2, 3, 4), (0, 1, 2, 3))
        )
        one.answer(one.names[0], first)
        assert "expected AGREEMENTS, found SURVIVORS" in str(
            refused(one.answer, one.names[0], second)
        )

    def test_different_survivor_sets_to_different_hospitals(self, world: Any, refused: Any) -> None:
        """The attack the consistency round is for: one hospital alive for some, dead for others.

        With both kinds of share the coordinator could remove both masks of hospital 4.
        """
        one = world(5, 4)
        one.until(Kind.SURVIVORS)
        alive = coordinator(one, Kind.SURVIVORS, Survivors(survivors=(0, 1, 2, 3, 4)))
        dead = coordinator(one, Kind.SURVIVORS, Survivors(survivors=(0, 1, 2, 3)))
        signed = [
            one.answer(name, alive if place < 2 else dead)
            for place, name in enumerate(one.names[:4])
        ]
        relay = coordinator(one, Kind.AGREEMENTS, Relay(messages=tuple(signed)))
        for name in one.names[:4]:
            assert isinstance(refused(one.answer, name, relay), SecAggError)
        assert Kind.REVEAL not in one.sent


def test_different_sharers_to_different_hospitals(world: Any, refused: Any) -> None:
    """A set of masks that cannot cancel is noticed before anything is revealed."""
    one = world(6, 4)
    outgoing = one.until(Kind.DELIVERY)
    victim = one.names[0]
    honest = Delivery.decode(opened(one, outgoing[victim], Kind.DELIVERY))
    fewer = {place: sealed for place, sealed in honest.sealed.items() if place != 5}
    lie = coordinator(one, Kind.DELIVERY, Delivery(sharers=(0, 1, 2, 3, 4), sealed=fewer))
    odd = one.answer(victim, lie)
    assert "masked for other sharers" in str(refused(one.server.receive, odd))
    # A coordinator that goes on regardless gets signatures that do not agree.
    for name in one.names[1:5]:
        one.answer(name, outgoing[name])
    same = coordinator(one, Kind.SURVIVORS, Survivors(survivors=(0, 1, 2, 3, 4)))
    signed = tuple(one.answer(name, same) for name in one.names[:5])
    relay = coordinator(one, Kind.AGREEMENTS, Relay(messages=signed))
    for name in one.names[:5]:
        assert "told the hospitals different things" in str(refused(one.answer, name, relay))


class TestAgreements:
    def signatures(self, world: Any) -> tuple[Any, list[bytes]]:
        one = world(5, 4)
        outgoing = one.until(Kind.SURVIVORS)
        one.step(outgoing)
        return one, [one.sent[Kind.AGREEMENT][name] for name in one.names]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda signed: signed[:3], "3 hospitals signed the survivor set, 4 are needed"),
            (lambda signed: signed[1:], "own signature is missing"),
            (lambda signed: [*signed[:3], signed[2]], "counted twice"),
            (lambda signed: [*signed[:4], signed[4][:-1]], "message is cut"),
            (lambda signed: [*signed[:4], signed[4][:-1] + b"\0"], "signature is not by key"),
            (
                lambda signed: [*signed[:3], signed[3][:37] + b"\0\4" + signed[3][39:]],
                "signature is not by key",
            ),
            (
                lambda signed: [*signed[:3], signed[3][:37] + b"\0\x20" + signed[3][39:]],
                "not among the survivors",
            ),
        ],
    )
    def test_wrong_signatures(self, world: Any, refused: Any, change: Any, words: str) -> None:
        one, signed = self.signatures(world)
        lie = coordinator(one, Kind.AGREEMENTS, Relay(messages=tuple(change(signed))))
        assert words in str(refused(one.answer, one.names[0], lie))
        assert Kind.REVEAL not in one.sent

    def test_another_message_in_place_of_a_signature(self, world: Any, refused: Any) -> None:
        one, signed = self.signatures(world)
        advert = one.sent[Kind.ADVERT][one.names[4]]
        lie = coordinator(one, Kind.AGREEMENTS, Relay(messages=(*signed[:4], advert)))
        assert isinstance(refused(one.answer, one.names[0], lie), MessageError)

    def test_a_peer_that_signs_what_it_likes(self, world: Any, refused: Any, identity: Any) -> None:
        one, signed = self.signatures(world)
        forged = messages.signed(
            identity(one, one.names[4]),
            Kind.AGREEMENT,
            one.terms.digest,
            Agreement(sender=4, agreed=b"x" * 32).encode(),
        )
        lie = coordinator(one, Kind.AGREEMENTS, Relay(messages=(*signed[:4], forged)))
        assert "told the hospitals different things" in str(refused(one.answer, one.names[0], lie))


def test_of_one_peer_one_share_only(world: Any) -> None:
    one = world(6, 4)
    one.run({one.names[5]: 2})
    revealed = {
        name: Reveal.decode(opened(one, data, Kind.REVEAL))
        for name, data in one.sent[Kind.REVEAL].items()
    }
    for place, name in enumerate(one.names[:5]):
        assert revealed[name].of_seeds.keys() == set(range(5)) - {place}
        assert revealed[name].of_keys.keys() == {5}
    both = messages.Writer().u16(0).raw(bytes(64))
    for _ in range(2):
        both.positions([3]).raw(bytes(shamir.SHARE_BYTES))
    with pytest.raises(SecAggError, match="both shares of one hospital"):
        Reveal.decode(messages.Reader(both.done(), "REVEAL"))


class TestCoordinator:
    """The honest coordinator against dishonest hospitals and the wire."""

    REPLIES = (Kind.ADVERT, Kind.SHARES, Kind.MASKED, Kind.AGREEMENT, Kind.REVEAL)

    @pytest.mark.parametrize("kind", REPLIES)
    def test_bad_messages_change_nothing(self, world: Any, refused: Any, kind: Kind) -> None:
        """Forged, cut, flipped and repeated messages are refused; the true one still counts."""
        one = world(4, 3)
        for step, reply_kind in enumerate(self.REPLIES):
            outgoing = one.server.advance() if step else dict.fromkeys(one.names, b"")
            for name, message in outgoing.items():
                true = one.answer(name, message) if step else one.clients[name].advertise()
                if reply_kind is kind:
                    for place in (0, 4, 10, 38, 60, len(true) // 2, len(true) - 70, len(true) - 1):
                        flipped = bytearray(true)
                        flipped[place] ^= 4
                        refused(one.server.receive, bytes(flipped))
                    for cut in (b"", true[:30], true[:-1], true + b"\0"):
                        refused(one.server.receive, cut)
                one.server.receive(true)
                assert name in one.server.heard
                if reply_kind is kind:
                    assert "answered this already" in str(refused(one.server.receive, true))
        one.check(one.server.finish())
        assert "attempt is over" in str(refused(one.server.receive, true))

    def test_one_hospital_in_the_place_of_another(
        self, world: Any, refused: Any, identity: Any
    ) -> None:
        one = world(4, 3)
        outgoing = one.until(Kind.DELIVERY)
        data = one.answer(one.names[1], outgoing[one.names[1]])
        as_other = bytearray(data[:-64])
        as_other[37:39] = b"\0\0"
        digest = hashlib.sha256(as_other).digest()
        forged = bytes(as_other) + messages.sign(identity(one, one.names[1]), Kind.MASKED, digest)
        assert isinstance(refused(one.server.receive, forged), SignatureError)

    def test_a_peer_that_shares_garbage(self, world: Any, identity: Any) -> None:
        """It spoils the attempt when it vanishes, and uncovers nobody."""
        one = world(5, 4)
        one.advertise()
        outgoing = one.server.advance()
        liar = one.names[4]
        client: ClientSession = one.clients[liar]
        assert client._state is not None
        true_seed = client._state.seed
        client._state = replace(client._state, seed=b"z" * 32, masking=b"y" * 32)
        reply = client.answer(outgoing[liar])
        client._state = replace(client._state, seed=true_seed)
        one.step(outgoing, [liar])
        one.server.receive(reply)
        with pytest.raises(SecAggError, match="do not rebuild what it committed to"):
            one.step(one.server.advance(), [liar])
            for _ in range(2):
                one.step(one.server.advance())
            one.server.finish()

    def test_one_wrong_share_is_left_out(self, world: Any, identity: Any) -> None:
        one = world(6, 4)
        outgoing = one.until(Kind.AGREEMENTS, gone=[one.names[5]])
        for name in one.names[:5]:
            reply = one.answer(name, outgoing[name])
            if name == one.names[0]:
                honest = Reveal.decode(opened(one, reply, Kind.REVEAL))
                lying = replace(honest, of_keys={5: honest.of_keys[5] ^ 1})
                reply = messages.signed(
                    identity(one, name), Kind.REVEAL, one.terms.digest, lying.encode()
                )
            one.server.receive(reply)
        one.check(one.server.finish())

    def test_a_seed_other_than_committed(self, world: Any, refused: Any, identity: Any) -> None:
        one = world(4, 3)
        outgoing = one.until(Kind.AGREEMENTS)
        name = one.names[0]
        honest = Reveal.decode(opened(one, one.answer(name, outgoing[name]), Kind.REVEAL))
        for lying, words in (
            (replace(honest, seed=b"s" * 32), "committed to another one"),
            (replace(honest, agreed=b"a" * 32), "agreed to other survivors"),
            (replace(honest, of_seeds={1: 5}), "other shares than asked for"),
        ):
            forged = messages.signed(
                identity(one, name), Kind.REVEAL, one.terms.digest, lying.encode()
            )
            assert words in str(refused(one.server.receive, forged))


def test_with_one_mask_left_the_vector_is_uniform(world: Any) -> None:
    """Even a coordinator that knows every pairwise key sees noise: the self-mask stands."""
    one = world(3, 3, length=20_000)
    one.run()
    words = np.frombuffer(one.sent[Kind.MASKED][one.names[0]][-64 - 80_000 : -64], dtype="<u4")
    counts = np.bincount(words >> 28, minlength=16)
    chi_square = ((counts - 1250) ** 2 / 1250).sum()
    assert chi_square < 45
