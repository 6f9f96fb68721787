"""Skellam noise: integers whose sum over hospitals is Skellam again, from a secret keystream.

Sk(v), the difference of two Poisson(v/2), is symmetric with variance v; independent Sk(v) and
Sk(w) add up to Sk(v + w) (Skellam 1946). So each of n hospitals adds a share Sk(v/t) and the sum
over any t of them carries at least Sk(v): what is there beyond is independent noise on top.

The Poisson sampler is a rejection sampler whose proposal is drawn exactly, with integers: a block
of 2ʲ integers on one side of the mode, blocks halving in probability outwards, and a place in the
block. Only the acceptance is computed in floating point, from Loader's saddle-point form of the
Poisson probability (Loader 2000, "Fast and accurate computation of binomial probabilities"), which
loses no digits at large means. The law of one draw is within a total variation distance of about
2⁻⁴⁵ of the exact one at any mean up to 2⁵⁰ (rounding of the acceptance); what the proposal cannot
reach, beyond 60 blocks, has probability below 2⁻²⁰⁰. Running time depends on the noise: an
adversary able to time a hospital's processor is out of scope.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.randomness import Stream

LARGEST_MEAN = 2.0**50
_BLOCKS = 60
_PIECE = 2**16
_SMALL = 16
_LOG_FACTORIALS = np.array([math.lgamma(k + 1) for k in range(_SMALL)])
_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


def share_variance(variance: float, *, threshold: int, colluders: int) -> float:
    """The variance of one hospital's share, so that the honest survivors' sum has ``variance``.

    ``threshold``: fewest hospitals in the sum (hospitals - tolerated dropouts). ``colluders``: may
    leave out their noise, or subtract it.
    """
    honest = threshold - colluders
    if honest < 1:
        raise PrivacyError(f"noise: {threshold} hospitals with {colluders} colluders leave none")
    return variance / honest


def skellam(stream: Stream, count: int, variance: float) -> NDArray[np.int64]:
    """``count`` independent Sk(``variance``) integers; zero variance gives zeros."""
    if variance == 0:
        return np.zeros(count, dtype=np.int64)
    sampler = PoissonSampler(variance / 2)
    drawn = np.empty(count, dtype=np.int64)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        drawn[start : start + size] = sampler.draw(stream, size)
        drawn[start : start + size] -= sampler.draw(stream, size)
    return drawn


class PoissonSampler:
    """Poisson integers of one mean, from keystream words."""

    def __init__(self, mean: float) -> None:
        """``mean``: above 0, at most 2⁵⁰."""
        if not 0 < mean <= LARGEST_MEAN:
            raise PrivacyError(f"Poisson mean: expected above 0 and at most 2⁵⁰, found {mean}")
        self._mean = mean
        self._mode = math.floor(mean)
        # Halving every 0.7 standard deviations is close to the tightest such envelope.
        self._bits = max(0, round(math.log2(max(1.0, 0.85 * math.sqrt(mean)))))
        self._log_ceiling = self._envelope()
        standing = self._log_ceiling + math.log(4.0) + self._bits * math.log(2.0)
        self._acceptance = min(1.0, math.exp(-standing))

    def draw(self, stream: Stream, count: int) -> NDArray[np.int64]:
        """``count`` independent values."""
        found = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            size = int(1.05 * (count - filled) / self._acceptance) + 16
            kept = self._propose(stream, size)[: count - filled]
            found[filled : filled + len(kept)] = kept
            filled += len(kept)
        return found

    def _propose(self, stream: Stream, size: int) -> NDArray[np.int64]:
        """The accepted ones of ``size`` proposals."""
        words = stream.words(2 * size).astype(np.uint64)
        place, coin = words[:size], words[size:]
        offset = (place >> np.uint64(1) & np.uint64((1 << self._bits) - 1)).astype(np.int64)
        # The lowest set bit of ``coin`` is bit b with probability 2^-(b+1).
        lowest = coin & (~coin + np.uint64(1))
        block = np.frexp(lowest.astype(np.float64))[1].astype(np.int64) - 1
        step = (block << self._bits) + offset
        below = (place & np.uint64(1)).astype(bool)
        value = np.where(below, self._mode - 1 - step, self._mode + step)
        sound = (value >= 0) & (block >= 0) & (block < _BLOCKS)
        value, block = value[sound], block[sound]
        log_ratio = self._log_probability(value) + block * math.log(2.0) - self._log_ceiling
        uniform = stream.uniform(len(value))
        return value[uniform < np.exp(log_ratio)]

    def _envelope(self) -> float:
        """log max P(value)·2^block over all values that can be proposed.

        Within a block the Poisson probability is greatest at the place nearest the mode.
        """
        width = 1 << self._bits
        outward = np.arange(_BLOCKS, dtype=np.int64)
        above = self._mode + outward * width
        below = self._mode - 1 - outward * width
        best = self._log_probability(above) + outward * math.log(2.0)
        greatest = float(best.max())
        if (reachable := below >= 0).any():
            best = self._log_probability(below[reachable]) + outward[reachable] * math.log(2.0)
            greatest = max(greatest, float(best.max()))
        return greatest

    def _log_probability(self, value: NDArray[np.int64]) -> NDArray[np.float64]:
        """log P(value) of Poisson(mean), to about 15 digits."""
        k = value.astype(np.float64)
        log_p = -self._deviance(k)
        if k.min(initial=_SMALL) >= _SMALL:
            return log_p - (_HALF_LOG_TAU + 0.5 * np.log(k) + _stirling_error(k))
        large = np.maximum(k, _SMALL)
        log_p -= np.where(
            k < _SMALL,
            _small_correction(value),
            _HALF_LOG_TAU + 0.5 * np.log(large) + _stirling_error(large),
        )
        return log_p

    def _deviance(self, k: NDArray[np.float64]) -> NDArray[np.float64]:
        """k·log(k/mean) + mean - k, without cancellation near the mean (Loader's bd0)."""
        mean = self._mean
        v = (k - mean) / (k + mean)
        near = np.abs(v) < 0.1
        square = v * v
        # Each term is below a hundredth of the last: eight reach 2⁻⁵³.
        series = np.zeros_like(k)
        for odd in range(17, 1, -2):
            series = (series + 1.0 / odd) * square
        close = (k - mean) * v + 2 * k * v * series
        if near.all():
            return close
        with np.errstate(divide="ignore", invalid="ignore"):
            far = np.where(k > 0, k * np.log(k / mean), 0.0) + mean - k
        return np.where(near, close, far)


def _small_correction(value: NDArray[np.int64]) -> NDArray[np.float64]:
    """log k! - k·log k + k for k below 16: what the deviance leaves out of -log P."""
    k = np.minimum(value, _SMALL - 1)
    table = _LOG_FACTORIALS - np.array(
        [0.0, *(one * math.log(one) - one for one in range(1, _SMALL))]
    )
    return np.asarray(table[k])


def _stirling_error(k: NDArray[np.float64]) -> NDArray[np.float64]:
    """log k! - (log√(2πk) + k·log k - k), for k ≥ 16. Loader 2000."""
    square = k * k
    return np.asarray(
        (
            1 / 12
            - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 / square) / square) / square) / square
        )
        / k
    )
