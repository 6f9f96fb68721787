"""Whole rounds: the sum is exact whoever vanishes and whenever, or there is none."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConsiliumError, MessageError, RefusalError, SecAggError
from common.secagg import AggregationPolicy, Kind, MemoryAttempts, Terms, messages


def test_the_sum_is_exact(world: Any) -> None:
    one = world(8, 6, colluders=1, length=70_001)
    aggregate = one.run()
    assert list(aggregate.survivors) == one.names
    one.check(aggregate)


def test_what_leaves_is_not_the_vector(world: Any) -> None:
    one = world(length=4096)
    one.run()
    for name, message in one.sent[Kind.MASKED].items():
        words = np.frombuffer(message[-64 - 4 * 4096 : -64], dtype="<i4")
        assert (words == one.vectors[name]).mean() < 0.01
        # Masks are uniform over 32 bits: the correlation with the vector is that of noise.
        assert abs(np.corrcoef(words, one.vectors[name])[0, 1]) < 0.1


schedules = st.integers(3, 6).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.integers(size // 2 + 1, size),
        st.lists(st.integers(0, 7), min_size=size, max_size=size),
        st.randoms(use_true_random=False),
    )
)


@settings(max_examples=1000, database=None)
@given(schedule=schedules)
def test_any_schedule_of_dropouts(
    world: Any, schedule: tuple[int, int, list[int], random.Random]
) -> None:
    size, threshold, steps, order = schedule
    _check_schedule(world(size, threshold, length=2), threshold, steps, order)


def test_many_random_schedules(world: Any) -> None:
    chance = random.Random(4)  # noqa: S311 - a repeatable test
    completed = 0
    for _ in range(1500):
        size = chance.choice([3, 3, 4, 4, 5])
        threshold = chance.randint(size // 2 + 1, size)
        steps = [chance.choice([0, 1, 2, 3, 4, 9, 9, 9, 9, 9, 9, 9]) for _ in range(size)]
        completed += _check_schedule(world(size, threshold, length=1), threshold, steps, chance)
    assert 300 < completed < 1350


def _check_schedule(one: Any, threshold: int, steps: list[int], order: random.Random) -> bool:
    gone_at = dict(zip(one.names, steps, strict=True))
    alive = [sum(gone > step for gone in steps) for step in range(5)]
    if min(alive) >= threshold:
        aggregate = one.run(gone_at, order.shuffle)
        # A hospital counts once its vector has arrived, whatever becomes of it later.
        assert list(aggregate.survivors) == [name for name in one.names if gone_at[name] > 2]
        one.check(aggregate)
        return True
    with pytest.raises(SecAggError):
        one.run(gone_at, order.shuffle)
    if min(alive[:4]) < threshold:
        assert not one.sent.get(Kind.REVEAL)
    return False


@pytest.mark.parametrize("step", range(5))
def test_a_sparse_graph_survives_dropouts(world: Any, step: int) -> None:
    one = world(40, 36, colluders=3, length=3)
    gone = random.Random(step).sample(one.names, 4)  # noqa: S311 - a repeatable test
    one.check(one.run(dict.fromkeys(gone, step)))
    shape = one.server._roster.graph.shape
    assert 0 < shape.degree < 39


def test_too_few_neighbours_on_the_ring_reveal_nothing(world: Any, refused: Any) -> None:
    one = world(84, 71, colluders=1, length=3)
    outgoing = one.until(Kind.DELIVERY)
    graph = one.server._roster.graph
    lost = graph.shape.window - graph.shape.quorum + 1
    # Enough hospitals are left, but the coordinator says that one stretch of the ring is gone.
    assert 0 < lost <= one.terms.hospitals - one.terms.threshold
    survivors = set(range(84)) - set(graph._ring[:lost])
    victim = one.names[min(survivors)]
    one.answer(victim, outgoing[victim])
    lie = messages.unsigned(
        Kind.SURVIVORS,
        one.terms.digest,
        messages.Survivors(survivors=tuple(sorted(survivors))).encode(),
    )
    assert "neighbours on the ring" in str(refused(one.answer, victim, lie))


def test_a_failed_attempt_is_followed_by_another(world: Any) -> None:
    first = world(4, 4)
    with pytest.raises(SecAggError, match="3 hospitals are left, 4 are needed"):
        first.run({first.names[0]: 2})
    second = world(4, 3, attempt=1)
    second.attempts = first.attempts
    second.clients = {name: second.session(name) for name in second.names}
    second.check(second.run({second.names[0]: 2}))


def test_exposed_says_when_a_release_must_be_charged(world: Any) -> None:
    one = world()
    outgoing = one.until(Kind.DELIVERY)
    client = one.clients[one.names[0]]
    assert not client.exposed
    one.answer(one.names[0], outgoing[one.names[0]])
    assert client.exposed


def test_a_hospital_may_restart_between_messages(world: Any) -> None:
    one = world(5, 4)
    one.advertise()
    for _ in range(4):
        outgoing = one.server.advance()
        for name in outgoing:
            frozen = one.clients[name].freeze()
            one.clients[name] = one.session(name).thaw(frozen)
        one.step(outgoing)
    one.check(one.server.finish())


def test_a_restored_copy_repeats_no_step(world: Any, refused: Any) -> None:
    one = world(5, 4)
    outgoing = one.until(Kind.SURVIVORS)
    name = one.names[0]
    frozen = one.clients[name].freeze()
    one.answer(name, outgoing[name])
    one.clients[name] = one.session(name).thaw(frozen)
    error = refused(one.answer, name, outgoing[name])
    assert isinstance(error, RefusalError)
    assert error.rule == "secagg.attempt"
    other = world(5, 4, attempt=1)
    assert isinstance(refused(other.session(name).thaw, frozen), MessageError)


def test_wrong_calls_are_our_bugs(world: Any) -> None:
    one = world(3, 3)
    name = one.names[0]
    client = one.clients[name]
    with pytest.raises(RuntimeError, match="advertise comes first"):
        client.answer(b"")
    with pytest.raises(RuntimeError, match="nothing to freeze"):
        client.freeze()
    with pytest.raises(RuntimeError, match="finish follows"):
        one.server.finish()
    outgoing = one.until(Kind.DELIVERY)
    with pytest.raises(RuntimeError, match="once"):
        client.advertise()
    with pytest.raises(RuntimeError, match="takes the place"):
        client.thaw(client.freeze())
    with pytest.raises(RuntimeError, match="a vector is needed"):
        client.answer(outgoing[name])
    for wrong in (
        np.zeros(5, dtype=np.int64),
        np.zeros(4, dtype=np.int32),
        np.zeros(10, dtype=np.int32)[::2],
    ):
        with pytest.raises(ValueError, match="expected 5 int32"):
            client.answer(outgoing[name], wrong)
    one.step(outgoing)
    for _ in range(2):
        one.step(one.server.advance())
    with pytest.raises(RuntimeError, match="finish"):
        one.server.advance()
    one.check(one.server.finish())
    with pytest.raises(RuntimeError, match="once"):
        one.server.finish()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": 1}, "threshold"),
        ({"threshold": 9}, "threshold"),
        ({"threshold": 4}, "lets two survivor sets be signed"),
        ({"threshold": 6, "colluders": 4}, "lets two survivor sets be signed"),
        ({"threshold": 6, "colluders": 5}, "colluders"),
        ({"input_bound": 2**31 // 8}, "overflow 32 bits"),
        ({"input_bound": 0}, "overflow 32 bits"),
        ({"length": 0}, "length"),
        ({"attempt": -1}, "attempt"),
        ({"model": b"short"}, "model"),
    ],
)
def test_unsound_terms_are_refused(changes: dict[str, Any], words: str) -> None:
    sound: dict[str, Any] = {
        "run": "run", "stage": "s", "round": 0, "step": 0, "attempt": 0, "model": bytes(32),
        "plan": bytes(32), "hospitals": 8, "threshold": 6, "colluders": 1, "length": 3,
        "input_bound": 2**28 - 1,
    }  # fmt: skip
    Terms(**sound)
    with pytest.raises(SecAggError, match=words):
        Terms(**(sound | changes))


def test_every_term_changes_the_digest() -> None:
    sound: dict[str, Any] = {
        "run": "run", "stage": "s", "round": 0, "step": 0, "attempt": 0, "model": bytes(32),
        "plan": bytes(32), "hospitals": 8, "threshold": 6, "colluders": 1, "length": 3,
        "input_bound": 99, "complete_up_to": 32,
    }  # fmt: skip
    others: dict[str, Any] = {
        "run": "ruN", "stage": "t", "round": 1, "step": 1, "attempt": 1, "model": bytes(31) + b"1",
        "plan": bytes(31) + b"1", "hospitals": 9, "threshold": 7, "colluders": 0, "length": 4,
        "input_bound": 98, "complete_up_to": 31,
    }  # fmt: skip
    assert others.keys() == sound.keys()
    digests = {Terms(**(sound | {name: value})).digest for name, value in others.items()}
    assert len(digests | {Terms(**sound).digest}) == len(others) + 1


def test_attempts_only_move_forward(refused: Any) -> None:
    attempts = MemoryAttempts()
    attempts.claim(b"r", 0, 1)
    attempts.claim(b"r", 0, 3)
    attempts.claim(b"other", 0, 1)
    attempts.claim(b"r", 2, 1)
    for attempt, step in ((2, 1), (2, 0), (1, 9), (0, 4)):
        assert refused(attempts.claim, b"r", attempt, step).rule == "secagg.attempt"


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (AggregationPolicy(minimum_hospitals=5), "secagg.minimum_hospitals"),
        (AggregationPolicy(maximum_dropouts=0), "secagg.maximum_dropouts"),
        (AggregationPolicy(minimum_colluders=1), "secagg.minimum_colluders"),
    ],
)
def test_terms_below_the_policy_are_refused(world: Any, policy: Any, rule: str) -> None:
    one = world(5, 4)
    with pytest.raises(RefusalError) as caught:
        one.session(one.names[0], policy=policy)
    assert caught.value.rule == rule
    assert issubclass(RefusalError, ConsiliumError)
