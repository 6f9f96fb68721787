"""Privacy loss distributions on nested grids, fast enough for a hospital's whole history.

``dp-accounting`` composes a handful of distinct mechanisms well, but spends 16 to 90 ms on each; a
ledger of a thousand must answer in three seconds. Here each mechanism is discretised on the grid
that suits its own spread (a power of two, so that grids nest), composed with itself by one FFT, and
merged with the others in a balanced tree that coarsens as the spread grows.

Every step is pessimistic. Discretising and coarsening split a loss between two grid points so that
both probabilities it stands for are kept ("connect the dots", Doroshenko et al. 2022, arXiv
2207.04380): the result dominates the mechanism. Trimmed upper tails, FFT window overflow and FFT
rounding are all added to the probability of an infinite loss. ``dp-accounting`` is the oracle of
the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Grid points per standard deviation of one step's loss: splitting adds at most h²/4 to its
# variance, so 16 keeps ε within a tenth of a percent.
_POINTS_PER_STD = 16
_FULL_BATCH_POINTS_PER_STD = 64
# A composed distribution finer than this is coarsened; it then has 128 to 256 points per deviation.
_FINEST_POINTS_PER_STD = 256
_LARGEST_SIZE = 2**18
_TAIL = 1e-15
# Total error of one FFT convolution of probabilities in double precision, generously.
_FFT_ERROR = 5e-15
# Beyond this many standard deviations a normal has less than 1e-22 of its mass.
_REACH = 9.8
_CHERNOFF_ORDERS = np.geomspace(0.5, 16.0, 11)


@dataclass(frozen=True, kw_only=True, eq=False)
class LossPmf:
    """A discrete privacy loss: ``probs[i]`` at loss ``(lowest + i) * 2**-exponent``.

    ``infinite`` is the probability of an unbounded loss. One direction of a neighbouring relation.
    """

    exponent: int
    lowest: int
    probs: Floats
    infinite: float

    @property
    def step(self) -> float:
        """The distance of two neighbouring losses."""
        return math.ldexp(1.0, -self.exponent)

    def losses(self) -> Floats:
        """The losses of ``probs``, ascending."""
        indices = np.arange(self.lowest, self.lowest + len(self.probs), dtype=np.float64)
        return indices * self.step

    def std(self) -> float:
        """The standard deviation of the finite part."""
        losses = self.losses()
        mass = float(self.probs.sum())
        losses -= _dot(self.probs, losses) / mass
        return math.sqrt(_dot(self.probs, losses * losses) / mass)

    def epsilon(self, delta: float) -> float:
        """The smallest ε ≥ 0 whose hockey-stick divergence is at most ``delta``; may be infinite.

        Source: Koskela, Jälkö & Honkela 2020 (arXiv 1906.03049), equation 3.1.
        """
        if self.infinite > delta:
            return math.inf
        losses, probs = self.losses(), self.probs

        def divergence(index: int) -> float:
            above = slice(index + 1, None)
            lost = _dot(-np.expm1(losses[index] - losses[above]), probs[above])
            return self.infinite + float(lost)

        low, high = -1, len(probs) - 1  # the divergence at `high` is within δ, at `low` it is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if divergence(middle) <= delta else (middle, high)
        excess = self.infinite + float(probs[high:].sum()) - delta
        if excess <= 0:
            return 0.0
        weight = float(_dot(np.exp(losses[high] - losses[high:]), probs[high:]))
        return max(0.0, float(losses[high]) + math.log(excess / weight))


@dataclass(frozen=True, kw_only=True, eq=False)
class Pld:
    """The privacy loss in every direction of the relation; ε is the worst of them."""

    directions: tuple[LossPmf, ...]

    def epsilon(self, delta: float) -> float:
        """The ε at ``delta``."""
        return max(pmf.epsilon(delta) for pmf in self.directions)


def gaussian(
    *, noise_multiplier: float, sampling_rate: float, steps: int, replace_one: bool
) -> Pld:
    """``steps`` compositions of the (Poisson-subsampled) Gaussian mechanism of sensitivity 1."""
    directions = ("replace",) if replace_one else ("remove", "add")
    return Pld(
        directions=tuple(
            _self_compose(_discretise(noise_multiplier, sampling_rate, direction), steps)
            for direction in directions
        )
    )


def compose(first: Pld, second: Pld) -> Pld:
    """Both mechanisms, one after the other, on the same data."""
    pairs = zip(first.directions, second.directions, strict=True)
    return Pld(directions=tuple(_convolve(a, b) for a, b in pairs))


def _dot(weights: Floats, values: Floats) -> Any:
    """The sum of products over the last axis.

    Not ``@``: on thousands of short vectors BLAS spends its time waking threads.
    """
    return np.einsum("...i,i->...", weights, values)


def _discretise(sigma: float, rate: float, direction: str) -> LossPmf:
    """One step of the mechanism, by connecting the dots between grid points.

    Removing: P = (1-q) N(0, σ²) + q N(1, σ²) against Q = N(0, σ²); adding: P and Q exchanged;
    replacing: against Q = (1-q) N(0, σ²) + q N(-1, σ²).
    """
    sides = 2 if direction == "replace" else 1
    one_step_std = sides * min(1.0 / sigma, rate * math.sqrt(math.expm1(min(sigma**-2, 50.0))))
    points = _FULL_BATCH_POINTS_PER_STD if rate == 1.0 else _POINTS_PER_STD
    exponent = math.ceil(math.log2(points / one_step_std))
    centre = -1.0 if direction == "replace" else 0.0
    lowest_loss = _loss(centre - _REACH * sigma, sigma, rate, direction)
    highest_loss = _loss(1.0 + _REACH * sigma, sigma, rate, direction)
    if direction == "add":
        lowest_loss, highest_loss = -highest_loss, -lowest_loss
    while (highest_loss - lowest_loss) * 2.0**exponent > _LARGEST_SIZE:
        exponent -= 1
    step = 2.0**-exponent
    lowest, highest = math.floor(lowest_loss / step), math.ceil(highest_loss / step)
    edges: Floats = np.arange(lowest, highest + 1, dtype=np.float64) * step

    # Bucket i holds the outcomes whose loss lies between edges[i] and edges[i + 1].
    if direction == "add":
        cuts = _outcome(-edges[::-1], sigma, rate, "remove")
    else:
        cuts = _outcome(edges, sigma, rate, direction)
    base, shifted = _mass(cuts / sigma), _mass((cuts - 1.0) / sigma)
    upper, lower = (1 - rate) * base + rate * shifted, base
    if direction == "add":
        upper, lower = lower[::-1], upper[::-1]
    elif direction == "replace":
        lower = (1 - rate) * base + rate * _mass((cuts + 1.0) / sigma)
    with np.errstate(all="ignore"):
        to_right = (upper - lower * np.exp(edges[:-1])) / -math.expm1(-step)
    # An overflow goes to the right, the pessimistic side; rounding may not leave the bucket.
    to_right = np.clip(np.where(np.isfinite(to_right), to_right, upper), 0.0, upper)
    probs = np.zeros(len(edges))
    probs[:-1] += upper - to_right
    probs[1:] += to_right
    # Whatever lies below the first edge counts as the first edge, above the last as infinite.
    missing = max(0.0, 1.0 - float(probs.sum()))
    probs[0] += missing
    return _trimmed(exponent, lowest, probs, math.erfc(_REACH / math.sqrt(2)))


def _loss(outcome: float, sigma: float, rate: float, direction: str) -> float:
    """The privacy loss of one outcome (of removal for "add", whose loss is its negative)."""

    def log_mixture(exponent: float) -> float:
        rest = math.log1p(-rate) if rate < 1 else -math.inf
        return float(np.logaddexp(rest, math.log(rate) + exponent))

    up = log_mixture((2 * outcome - 1) / (2 * sigma**2))
    if direction == "replace":
        return up - log_mixture((-2 * outcome - 1) / (2 * sigma**2))
    return up


def _outcome(losses: Floats, sigma: float, rate: float, direction: str) -> Floats:
    """The outcome at which the loss takes each value; the inverse of ``_loss``, increasing."""
    with np.errstate(all="ignore"):
        if direction == "remove":
            if rate == 1.0:
                return np.asarray(losses * sigma**2 + 0.5)
            # e^ε = 1 - q + q e^t, written so that neither a large nor a small ε loses digits.
            inner = np.where(
                losses > 1.0,
                losses + np.log1p(-(1.0 - rate) * np.exp(-losses)) - math.log(rate),
                np.log(np.maximum(np.expm1(losses) + rate, 0.0)) - math.log(rate),
            )
            return np.asarray(inner * sigma**2 + 0.5)
        if rate == 1.0:
            return np.asarray(losses * sigma**2 / 2.0)
        # With t = e^{x/σ²} and c = q e^{-1/(2σ²)}: c t² - (1-q)(e^ε - 1) t - c e^ε = 0. The
        # loss is odd in x, so the positive half settles both.
        size = np.abs(losses)
        log_c = math.log(rate) - 0.5 / sigma**2
        # Divide by e^ε to keep every term finite.
        half = 0.5 * (1.0 - rate) * -np.expm1(-size)
        root = half + np.sqrt(half**2 + np.exp(2 * log_c - size))
        return np.asarray(np.sign(losses) * sigma**2 * (np.log(root) + size - log_c))


def _mass(cuts: Floats) -> Floats:
    """The standard normal's probability between neighbouring ``cuts``, exact in both tails."""
    from scipy.special import ndtr  # noqa: PLC0415 (half a second, and only who composes needs it)

    tails = ndtr(-np.abs(cuts))
    left, right = tails[:-1], tails[1:]
    inside = np.where(cuts[:-1] > 0, left - right, 1.0 - left - right)
    return np.asarray(np.maximum(np.where(cuts[1:] < 0, right - left, inside), 0.0))


def _self_compose(pmf: LossPmf, times: int) -> LossPmf:
    """``times`` convolutions of ``pmf`` with itself, by one FFT over a Chernoff window."""
    from scipy.fft import irfft, next_fast_len, rfft  # noqa: PLC0415 (as in ``_mass``)

    if times == 1:
        return _settled(pmf)
    window = _window(pmf, times)
    while window[1] - window[0] >= _LARGEST_SIZE:
        pmf = _coarser(pmf)
        window = _window(pmf, times)
    lowest, highest = window
    size = next_fast_len(highest - lowest + 1, real=True)
    # Folding modulo the window keeps all mass: what wraps around is counted twice, never lost.
    folded = np.bincount(np.arange(len(pmf.probs)) % size, weights=pmf.probs, minlength=size)
    power = irfft(_power(rfft(folded), times), size)
    composed = np.roll(power, (pmf.lowest * times - lowest) % size)
    infinite = (
        -math.expm1(times * math.log1p(-pmf.infinite)) + _TAIL + max(_FFT_ERROR, times * 2.5e-16)
    )
    return _settled(_trimmed(pmf.exponent, lowest, np.maximum(composed, 0.0), infinite))


def _power(spectrum: NDArray[np.complex128], times: int) -> NDArray[np.complex128]:
    """``spectrum ** times`` by squaring: numpy's own complex power is ten times slower."""
    result = np.ones_like(spectrum)
    while times:
        if times & 1:
            result = result * spectrum
        spectrum = spectrum * spectrum
        times >>= 1
    return result


def _window(pmf: LossPmf, times: int) -> tuple[int, int]:
    """Grid indices outside which ``times`` losses add up with probability below ``_TAIL`` a side.

    Chernoff's bound over a range of orders around 1 / std.
    """
    losses = pmf.losses()
    orders = _CHERNOFF_ORDERS / max(pmf.std() * math.sqrt(times), pmf.step)

    def reach(sign: int) -> float:
        exponents = sign * np.outer(orders, losses)
        peak = exponents.max(axis=1)
        log_mgf = peak + np.log(_dot(np.exp(exponents - peak[:, None]), pmf.probs))
        return float(np.min((times * log_mgf - math.log(_TAIL)) / orders))

    top = pmf.lowest + len(pmf.probs) - 1
    lowest = max(math.floor(-reach(-1) / pmf.step), pmf.lowest * times)
    highest = min(math.ceil(reach(1) / pmf.step), top * times)
    return lowest, max(highest, lowest)


def _convolve(first: LossPmf, second: LossPmf) -> LossPmf:
    while first.exponent > second.exponent:
        first = _coarser(first)
    while second.exponent > first.exponent:
        second = _coarser(second)
    probs = np.maximum(_convolved(first.probs, second.probs), 0.0)
    infinite = first.infinite + second.infinite + _FFT_ERROR
    return _settled(_trimmed(first.exponent, first.lowest + second.lowest, probs, infinite))


def _coarser(pmf: LossPmf) -> LossPmf:
    """The same distribution on a grid twice as wide; it dominates ``pmf``.

    A loss x between the points x - h and x + h moves up with probability 1 / (1 + e^-h): that
    keeps P (the sum) and Q (the sum weighted by e^-loss).
    """
    odd_start = pmf.lowest % 2
    padded = np.zeros((len(pmf.probs) + odd_start) // 2 * 2 + 1)
    padded[odd_start : odd_start + len(pmf.probs)] = pmf.probs
    even, odd = padded[0::2].copy(), padded[1::2]
    up = 1.0 / (1.0 + math.exp(-pmf.step))
    even[: len(odd)] += odd * (1.0 - up)
    even[1 : len(odd) + 1] += odd * up
    lowest = (pmf.lowest - odd_start) // 2
    return LossPmf(exponent=pmf.exponent - 1, lowest=lowest, probs=even, infinite=pmf.infinite)


def _settled(pmf: LossPmf) -> LossPmf:
    """Coarsened until its grid is no finer than its spread needs."""
    std = pmf.std()
    while std > _FINEST_POINTS_PER_STD * pmf.step:
        pmf = _coarser(pmf)
    return pmf


def _trimmed(exponent: int, lowest: int, probs: Floats, infinite: float) -> LossPmf:
    """Without the tails: the lower one joins the first point kept, the upper one is infinite."""
    from_left, from_right = np.cumsum(probs), np.cumsum(probs[::-1])
    start = int(np.searchsorted(from_left, _TAIL / 2, side="right"))
    stop = len(probs) - int(np.searchsorted(from_right, _TAIL / 2, side="right"))
    start = min(start, len(probs) - 1)
    stop = max(stop, start + 1)
    kept = probs[start:stop].copy()
    kept[0] += float(probs[:start].sum())
    return LossPmf(
        exponent=exponent,
        lowest=lowest + start,
        probs=kept,
        infinite=infinite + float(probs[stop:].sum()),
    )


def _convolved(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The full linear convolution, by real transforms."""
    from scipy.fft import irfft, next_fast_len, rfft  # noqa: PLC0415 (as in ``_mass``)

    length = len(left) + len(right) - 1
    size = next_fast_len(length, real=True)
    product = rfft(left, size) * rfft(right, size)
    return np.asarray(irfft(product, size)[:length])
