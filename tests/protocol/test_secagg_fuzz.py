"""Whatever happens to messages on their way: the right sum, or a refusal. Nothing else."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConsiliumError
from common.secagg import Kind, messages
from common.secagg.messages import Reveal

STEPS = 5


def mutate(  # noqa: PLR0911 - one line for each kind of harm
    data: bytes, how: str, chance: random.Random, seen: list[bytes]
) -> list[bytes]:
    """What arrives in place of ``data``."""
    place = chance.randrange(len(data))
    match how:
        case "flip":
            return [
                data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
            ]
        case "cut":
            return [data[:place]]
        case "extend":
            return [data + chance.randbytes(chance.randrange(1, 9))]
        case "erase":
            return [data[:place] + data[place + chance.randrange(1, 40) :]]
        case "repeat":
            return [data[:place] + data[max(0, place - chance.randrange(1, 40)) :]]
        case "scramble":
            return [data[:place] + chance.randbytes(8) + data[place + 8 :]]
        case "splice":
            return [data[:place] + chance.choice(seen)[place:]]
        case "replace":
            return [chance.choice(seen)]
        case "twice":
            return [data, data]
        case "lose":
            return []
    raise AssertionError(how)


HOWS = [
    "flip", "cut", "extend", "erase", "repeat", "scramble", "splice", "replace", "twice", "lose",
]  # fmt: skip
attacks = st.lists(
    st.tuples(
        st.integers(0, STEPS - 1),  # step
        st.integers(0, 3),  # hospital
        st.booleans(),  # towards the coordinator
        st.sampled_from(HOWS),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=800, database=None)
@given(attacks=attacks, seed=st.integers(0, 2**32))
def test_the_right_sum_or_a_refusal(
    world: Any, attacks: list[tuple[int, int, bool, str]], seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 - a repeatable test
    one = world(4, 3, length=3)
    planned = {(step, one.names[place], inward): how for step, place, inward, how in attacks}
    seen: list[bytes] = [b"CSA1"]

    def arriving(step: int, name: str, inward: bool, data: bytes) -> list[bytes]:
        seen.append(data)
        how = planned.get((step, name, inward))
        return mutate(data, how, chance, seen) if how else [data]

    try:
        for step in range(STEPS):
            outgoing = one.server.advance() if step else dict.fromkeys(one.names, b"")
            for name, message in outgoing.items():
                for received in arriving(step, name, False, message) if step else [b""]:
                    try:
                        reply = (
                            one.answer(name, received) if step else one.clients[name].advertise()
                        )
                    except ConsiliumError:
                        continue
                    for heard in arriving(step, name, True, reply):
                        try:
                            one.server.receive(heard)
                        except ConsiliumError:
                            continue
        one.check(one.server.finish())
    except ConsiliumError:
        pass
    check_nothing_leaked(one)


def check_nothing_leaked(one: Any) -> None:
    """No vector left unmasked, and of no hospital were both secrets revealed."""
    for name, data in one.sent.get(Kind.MASKED, {}).items():
        plain = np.frombuffer(data[-64 - 12 : -64], dtype="<i4")
        assert not np.array_equal(plain, one.vectors[name])
    kinds: dict[int, set[str]] = defaultdict(set)
    for data in one.sent.get(Kind.REVEAL, {}).values():
        reveal = Reveal.decode(
            messages.body_of(data, Kind.REVEAL, one.terms.digest, is_signed=True)
        )
        kinds[reveal.sender].add("seed")
        for owner in reveal.of_seeds:
            kinds[owner].add("seed")
        for owner in reveal.of_keys:
            kinds[owner].add("key")
    assert all(len(revealed) == 1 for revealed in kinds.values())


@settings(max_examples=250, database=None)
@given(seed=st.integers(0, 2**32))
def test_a_lying_coordinator_learns_no_single_vector(world: Any, seed: int) -> None:
    """It makes up sharers, survivors and signatures for each hospital as it likes."""
    chance = random.Random(seed)  # noqa: S311 - a repeatable test
    one = world(5, 4, length=3)
    one.advertise()
    outgoing = one.server.advance()
    kept: dict[str, bytes] = {}

    def deliver(name: str, kind: Kind, body: Any) -> None:
        message = messages.unsigned(kind, one.terms.digest, body.encode())
        try:
            kept[name] = one.answer(name, message)
        except ConsiliumError:
            kept.pop(name, None)

    def some(least: int) -> tuple[int, ...]:
        return tuple(sorted(chance.sample(range(5), chance.randint(least, 5))))

    one.step(outgoing)
    for name, message in one.server.advance().items():
        honest = messages.Delivery.decode(
            messages.body_of(message, Kind.DELIVERY, one.terms.digest, is_signed=False)
        )
        sharers = some(4)
        sealed = {place: data for place, data in honest.sealed.items() if place in sharers}
        deliver(name, Kind.DELIVERY, messages.Delivery(sharers=sharers, sealed=sealed))
    sets = [some(4) for _ in range(2)]
    for name in list(kept):
        deliver(name, Kind.SURVIVORS, messages.Survivors(survivors=chance.choice(sets)))
    signed = list(one.sent.get(Kind.AGREEMENT, {}).values())
    for name in list(kept):
        relayed = chance.sample(signed, chance.randint(0, len(signed)))
        deliver(name, Kind.AGREEMENTS, messages.Relay(messages=tuple(relayed)))
    check_nothing_leaked(one)
