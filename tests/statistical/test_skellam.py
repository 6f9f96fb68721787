"""Skellam noise has the law it is charged for; wrong laws are told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import ive

from common.errors import PrivacyError
from common.privacy.skellam import PoissonSampler, share_variance, skellam
from common.randomness import SecretNoise, SeededNoise, Stream
from common.secagg.encoding import Encoding


def stream(*context: str | int) -> Stream:
    return SeededNoise(seed=7, owner="test").stream("skellam", *context)


@pytest.mark.parametrize("mean", [0.02, 0.9, 5.5, 15.0, 16.0, 300.0, 12345.6])
def test_poisson_law(mean: float) -> None:
    """Chi-square over values or groups of values, against scipy; 0.9 and 1.1 times are rejected."""
    count = 200_000
    drawn = PoissonSampler(mean).draw(stream(str(mean)), count)
    assert drawn.min() >= 0
    assert chi_square(drawn, mean) > 1e-4
    if mean > 0.1:  # below, 200,000 values hold too few counts
        for wrong in (0.9, 1.1):
            assert chi_square(drawn, mean * wrong) < 1e-12


def chi_square(drawn: np.ndarray, mean: float) -> float:
    """The p-value of ``drawn`` under Poisson(``mean``), in cells of at least 20 expected."""
    cuts = np.unique(stats.poisson.ppf(np.linspace(0, 1, 60)[1:-1], mean).astype(np.int64))
    expected = np.diff([0.0, *stats.poisson.cdf(cuts, mean), 1.0]) * len(drawn)
    observed = np.bincount(np.searchsorted(cuts, drawn), minlength=len(cuts) + 1)
    kept = expected >= 20
    statistic = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    return float(stats.chi2.sf(statistic, max(1, kept.sum() - 1)))


@pytest.mark.parametrize("mean", [1e6, 2.0**36, 2.0**49])
def test_large_means(mean: float) -> None:
    """Mean, variance, third and fourth moments within five standard errors."""
    count = 200_000
    drawn = PoissonSampler(mean).draw(stream("large", str(mean)), count)
    normal = (drawn - mean) / math.sqrt(mean)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normal**power).mean() - expected) < 5 * math.sqrt(variance / count)
    # The lowest bits are uniform: no grid of floating-point numbers shows.
    ones = (drawn & 1).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(count)


def test_log_probability_is_exact() -> None:
    """Against math.lgamma where that is exact enough."""
    for mean in (0.3, 7.7, 40.0, 1000.0):
        sampler = PoissonSampler(mean)
        value = np.arange(0, int(mean + 20 * math.sqrt(mean) + 20))
        exact = [k * math.log(mean) - mean - math.lgamma(k + 1) for k in value.tolist()]
        np.testing.assert_allclose(sampler._log_probability(value), exact, atol=1e-11, rtol=1e-13)


def test_the_envelope_covers_the_law() -> None:
    """Acceptance never exceeds one, anywhere."""
    for mean in (0.02, 0.9, 5.5, 16.0, 99.3, 5000.0):
        sampler = PoissonSampler(mean)
        width = 1 << sampler._bits
        value = np.arange(0, int(mean + 40 * math.sqrt(mean) + 40))
        outward = np.where(value >= sampler._mode, value - sampler._mode, sampler._mode - 1 - value)
        log_ratio = (
            sampler._log_probability(value)
            + (outward // width) * math.log(2)
            - sampler._log_ceiling
        )
        assert log_ratio.max() <= 1e-12


def total_noise(threshold: int, colluders: int, variance: float) -> np.ndarray:
    """The honest hospitals' noise in the sum when the fewest allowed survive."""
    share = share_variance(variance, threshold=threshold, colluders=colluders)
    return np.sum(
        [skellam(stream("sum", one), 100_000, share) for one in range(threshold - colluders)],
        axis=0,
    )


def is_variance(drawn: np.ndarray, variance: float) -> bool:
    """Two-sided chi-square test of the variance of near-normal values, at one in ten thousand."""
    statistic = (drawn.astype(float) ** 2).sum() / variance
    low, high = stats.chi2.ppf([5e-5, 1 - 5e-5], len(drawn))
    return bool(low < statistic < high)


def test_the_sum_has_the_variance_that_is_charged() -> None:
    variance = 900.0
    drawn = total_noise(6, 1, variance)
    assert is_variance(drawn, variance)
    for wrong in (0.9, 1.1):
        assert not is_variance(drawn, variance * wrong)
    law = ive(np.abs(np.arange(-200, 201)), variance)
    observed = np.bincount(drawn + 200, minlength=401)
    kept = law * len(drawn) >= 20
    statistic = ((observed - law * len(drawn))[kept] ** 2 / (law * len(drawn))[kept]).sum()
    assert stats.chi2.sf(statistic, kept.sum() - 1) > 1e-4


def test_one_hospital_too_few_is_told_apart() -> None:
    """What the test must notice: shares sized for all hospitals when some may be gone."""
    wrong = np.sum([skellam(stream("few", one), 100_000, 900.0 / 8) for one in range(7)], axis=0)
    assert not is_variance(wrong, 900.0)


def test_the_released_sum_carries_the_noise() -> None:
    """Through the encoding, as hospitals use it: five honest of six survivors of eight."""
    encoding = Encoding(
        length=100_000, clip_norm=1.0, scale=4.0, hospitals=8, threshold=6, colluders=1,
        noise_multiplier=0.5,
    )  # fmt: skip
    zero = np.zeros((1, 100_000))
    total = np.sum(
        [encoding.finish(encoding.encode(zero), stream("enc", one)) for one in range(5)],
        axis=0, dtype=np.int64,
    )  # fmt: skip
    assert is_variance(total, encoding.variance)
    assert not is_variance(total, 0.9 * encoding.variance)
    assert not is_variance(total, 1.1 * encoding.variance)


def test_streams() -> None:
    """Same context, same noise; another context, independent noise; pieces make no difference."""
    source = SecretNoise.generate()
    one, same, other = (skellam(source.stream("s", context), 70_000, 50.0) for context in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert not skellam(source.stream("z"), 5, 0.0).any()


def test_refusals() -> None:
    for mean in (0.0, -1.0, float("nan"), 2.0**51):
        with pytest.raises(PrivacyError, match="Poisson mean"):
            PoissonSampler(mean)
    with pytest.raises(PrivacyError, match="leave none"):
        share_variance(1.0, threshold=3, colluders=3)
