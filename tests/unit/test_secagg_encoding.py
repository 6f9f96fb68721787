"""Integers that cannot overflow, move no further than stated, and decode to the sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ive

from common.errors import PrivacyError, SecAggError
from common.randomness import SeededNoise, Stream
from common.secagg.encoding import Encoding

SOUND: dict[str, Any] = {
    "length": 20, "clip_norm": 1.0, "scale": 2.0**16, "hospitals": 8, "threshold": 6,
    "colluders": 1, "noise_multiplier": 0.0,
}  # fmt: skip


def stream(*context: str) -> Stream:
    return SeededNoise(seed=1, owner="test").stream("encoding", *context)


def test_the_decoded_sum_is_the_sum_of_clipped_units() -> None:
    encoding = Encoding(**SOUND)
    units = np.random.default_rng(0).normal(size=(30, 20))
    units[3] *= 1e-3
    norms = np.linalg.norm(units, axis=1, keepdims=True)
    expected = (units * np.minimum(1, 1 / norms)).sum(axis=0)
    vector = encoding.finish(encoding.encode(units), None)
    np.testing.assert_allclose(encoding.decode(vector), expected, atol=30 / 2 / 2**16)
    halves = encoding.encode(units[:11]) + encoding.encode(units[11:])
    np.testing.assert_array_equal(encoding.finish(halves, None), vector)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), size=st.floats(1e-3, 1e3), scale=st.sampled_from([0.5, 3, 4096]))
def test_sensitivity_of_every_unit(rounding: Any, seed: int, size: float, scale: float) -> None:
    encoding = Encoding(**SOUND | {"scale": scale, "rounding": rounding})
    unit = np.random.default_rng(seed).normal(size=(1, 20)) * size
    integers = encoding.encode(unit, stream(str(seed)))
    assert np.linalg.norm(integers) <= encoding.l2_sensitivity
    assert np.abs(integers).sum() <= encoding.l1_sensitivity


def test_the_worst_unit_meets_the_nearest_bound() -> None:
    """A corner that rounds up everywhere: the bound is not slack by more than the clipping."""
    encoding = Encoding(**SOUND | {"scale": 1.0, "length": 16, "clip_norm": 2.0 + 1e-8})
    integers = encoding.encode(np.full((1, 16), 0.5 + 1e-9))
    assert np.linalg.norm(integers) == 4.0
    assert encoding.l2_sensitivity == pytest.approx(4.0)


def test_stochastic_rounding_is_unbiased_and_nearest_is_not() -> None:
    units = np.full((40_000, 4), 0.3)
    means = {
        rounding: Encoding(
            **SOUND | {"length": 4, "scale": 1.0, "rounding": rounding, "clip_norm": 2.0}
        ).encode(units, stream())
        / 40_000
        for rounding in ("nearest", "stochastic")
    }
    np.testing.assert_allclose(means["stochastic"], 0.3, atol=0.012)
    np.testing.assert_array_equal(means["nearest"], 0)


def test_a_unit_that_is_not_finite_counts_as_zero() -> None:
    encoding = Encoding(**SOUND)
    units = np.ones((4, 20), dtype=np.float32)
    units[1, 3], units[2, 0] = np.nan, np.inf
    np.testing.assert_array_equal(encoding.encode(units), encoding.encode(units[[0, 3]]))
    for bad in units[1:3]:
        np.testing.assert_array_equal(encoding.release(bad, None), np.zeros(20))
    assert not encoding.encode(np.empty((0, 20))).any()


@settings(max_examples=200)
@given(
    hospitals=st.integers(2, 40), power=st.integers(0, 20), units=st.integers(1, 300),
    multiplier=st.floats(0, 30), length=st.integers(1, 40), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_no_sum_can_overflow(
    hospitals: int, power: int, units: int, multiplier: float, length: int, seed: int
) -> None:
    try:
        encoding = Encoding(
            length=length, clip_norm=1.0, scale=2.0**power, hospitals=hospitals,
            threshold=hospitals, colluders=0, noise_multiplier=multiplier,
        )  # fmt: skip
    except (SecAggError, PrivacyError):
        return
    one = np.zeros((units, length))
    one[:, 0] = np.random.default_rng(seed).choice([-1.0, 1.0])
    vector = encoding.finish(encoding.encode(one), stream(str(seed)))
    assert np.abs(vector.astype(np.int64)).max() <= encoding.input_bound
    assert hospitals * encoding.input_bound < 2**31
    # So all of them at once, added modulo 2^32, give the true integer sum.
    wrapped = (np.full(length, 0, dtype=np.uint32) + hospitals * vector.view(np.uint32)).view(
        np.int32
    )
    np.testing.assert_array_equal(wrapped, hospitals * vector.astype(np.int64))


def test_the_noise_tail_is_rarer_than_stated() -> None:
    """Against the Skellam law itself, for one coordinate at one hospital."""
    for multiplier, scale in ((1.0, 4.0), (3.0, 16.0), (0.3, 64.0)):
        encoding = Encoding(**SOUND | {"noise_multiplier": multiplier, "scale": scale})
        share = encoding.variance / (encoding.threshold - encoding.colluders)
        # Sk(v) has P(k) = exp(-v)·I_k(v).
        values = np.arange(encoding.noise_bound // 2, 3 * encoding.noise_bound)
        probability = ive(values, share)
        for least, is_rare in ((encoding.noise_bound, True), (0.9 * encoding.noise_bound, False)):
            tail = 2 * probability[values >= least].sum()
            assert (tail * 8 * 20 < 2.0**-64) == is_rare


def test_release_equals_encode_and_finish() -> None:
    length = 2**18 + 7
    encoding = Encoding.fitting(
        length=length, clip_norm=0.5, units=1, hospitals=4, threshold=4, colluders=0,
        noise_multiplier=1.0,
    )  # fmt: skip
    update = np.random.default_rng(1).normal(size=length).astype(np.float32)
    whole = encoding.finish(encoding.encode(update[None]), stream("same"))
    difference = whole.astype(np.int64) - encoding.release(update, stream("same"))
    # The norm is summed in another order: a rounding may differ in its last digit.
    assert np.abs(difference).max() <= 1
    assert np.count_nonzero(difference) < 5


def test_fitting_leaves_room_and_keeps_rounding_small() -> None:
    for length, units, multiplier in ((513, 600, 8.0), (10**6, 1, 1.0), (10, 1, 0.0)):
        encoding = Encoding.fitting(
            length=length, clip_norm=1.0, units=units, hospitals=8, threshold=6, colluders=1,
            noise_multiplier=multiplier,
        )  # fmt: skip
        assert encoding.signal_bound >= units * encoding.scale
        assert encoding.l2_sensitivity < encoding.scale * 1.001
        if multiplier:
            event, distance = encoding.charge(sampling_rate=0.5, steps=7)
            assert (event.sampling_rate, event.steps) == (0.5, 7)
            assert multiplier <= event.noise_multiplier <= encoding.noise_multiplier
            assert encoding.noise_multiplier < 1.005 * multiplier
            assert distance <= 7 * 2.0**-40


@pytest.mark.parametrize("noise_multiplier", [0.0, 2.0])
def test_whatever_is_summed_stays_in_a_hospitals_share(noise_multiplier: float) -> None:
    encoding = Encoding(**SOUND | {"noise_multiplier": noise_multiplier})
    for huge in (2**50, -(2**50)):
        vector = encoding.finish(np.full(20, huge), stream("huge")).astype(np.int64)
        assert np.abs(vector).max() <= encoding.input_bound
        # Limited before the noise, not after: there the limit would cut the noise off.
        limited = np.sign(huge) * encoding.signal_bound
        assert np.abs(vector - limited).max() <= encoding.noise_bound
        assert len(set((vector - limited).tolist())) > 10 or not noise_multiplier


def test_limiting_moves_no_two_sums_further_apart() -> None:
    encoding = Encoding(**SOUND | {"scale": 2.0**27})
    bound = encoding.signal_bound
    rng = np.random.default_rng(5)
    for _ in range(50):
        one = rng.integers(-2 * bound, 2 * bound, 20)
        other = one + rng.integers(-(2**24), 2**24, 20)
        apart = np.linalg.norm(
            encoding.finish(one, None).astype(float) - encoding.finish(other, None)
        )
        assert apart <= np.linalg.norm((one - other).astype(float))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scale": 2.0**28}, SecAggError, "choose a smaller scale"),
        ({"noise_multiplier": 1e6}, SecAggError, "choose a smaller scale"),
        ({"noise_multiplier": -1.0}, PrivacyError, "noise multiplier"),
        ({"noise_multiplier": 1e-160}, PrivacyError, "too little to be noise"),
        ({"colluders": 6}, PrivacyError, "leave none"),
        ({"scale": float("nan")}, SecAggError, "scale"),
        ({"clip_norm": 0.0}, SecAggError, "clip_norm"),
        ({"length": 0}, SecAggError, "length"),
    ],
)
def test_unsound_encodings_are_refused(changes: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Encoding(**SOUND | changes)
    with pytest.raises(SecAggError, match="do not fit"):
        Encoding.fitting(
            length=5, clip_norm=1.0, units=2**31, hospitals=2, threshold=2, colluders=0,
            noise_multiplier=0.0,
        )  # fmt: skip


def test_every_field_changes_the_digest() -> None:
    base = Encoding(**SOUND)
    others = [
        replace(base, length=21), replace(base, clip_norm=2.0), replace(base, scale=2.0),
        replace(base, hospitals=7), replace(base, threshold=7), replace(base, colluders=2),
        replace(base, noise_multiplier=1.0), replace(base, rounding="stochastic"),
    ]  # fmt: skip
    assert len({one.digest for one in [base, *others]}) == 9


def test_wrong_calls_are_our_bugs() -> None:
    noisy = Encoding(**SOUND | {"noise_multiplier": 1.0})
    with pytest.raises(ValueError, match="secret stream"):
        noisy.finish(np.zeros(20, dtype=np.int64), None)
    with pytest.raises(ValueError, match="units"):
        noisy.encode(np.zeros((2, 19)))
    with pytest.raises(ValueError, match="needs a stream"):
        replace(noisy, rounding="stochastic").encode(np.ones((1, 20)))
    with pytest.raises(ValueError, match="nearest"):
        replace(noisy, rounding="stochastic").release(np.ones(20), None)
