"""Skellam noise is, but for a vanishing distance, a Gaussian that was processed afterwards.

So a Skellam release may be charged as a Gaussian one: with the tight PLD accounting, subsampling
and both relations of ``common.privacy.accounting``, which have no counterpart for the Skellam law
in many dimensions.

**The lemma.** Let K(y) = round(y + h·Z) with Z ~ Sk(λ), independent of y, and h an integer. K
commutes with integer shifts. For Y ~ N(0, s²) the cumulants of K(Y) are, up to an aliasing below
exp(-4.9·s²), s² + h²λ + 1/12, then h⁴λ - 1/120, then h⁶λ + 1/252. Choosing
λ = (μ + 1/120)/h⁴ and s² = μ - h²λ - 1/12 makes the second and fourth equal μ, those of Sk(μ).
The laws then differ first in the sixth, relatively (h² - 1)/(720·μ²): η, their total variation
distance, is about 10⁻¹⁷ for μ = 2²⁸ and h = 32, where s² is only 0.1 % below μ.

**What follows.** A release of d integers f(S) + Sk(μ)ᵈ is within d·η of K applied to every
coordinate of f(S) + N(0, s²·I), for any data and sample S: post-processing of a Gaussian release.
If all Gaussian releases together are (ε, δ), the Skellam ones are (ε, δ + (1 + e^ε)·Σ d·η).

**Bounding η.** By Plancherel the squared L2 distance of the two laws is the mean of |φ - φ_K|²
over [-π, π], an integral of known functions; by Cauchy-Schwarz on |k| ≤ R = 14√μ

    2η ≤ √(2R + 1)·‖p - p_K‖₂ + P(|X| > R) + P(|X_K| > R),

with Chernoff's bound for the tails. The integrand is computed from Taylor remainders, so that its
digits survive, summed by the trapezoidal rule (exponentially exact for such functions), and η is
doubled for good measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError

# Below it the sixth cumulant is felt.
SMALLEST_VARIANCE = 2.0**12
_STEPS = np.array([2**power for power in range(11, 0, -1)])
_REACH = 14.0
_GRID = np.arange(1, 4001) * 0.01

# A release's distance that is small against every δ in use.
LARGEST_DISTANCE = 2.0**-40


@dataclass(frozen=True, kw_only=True)
class GaussianEquivalent:
    """``std``: of the Gaussian, in integer units. ``distance``: per release, of all coordinates.

    Charge Gaussian releases of standard deviation ``std``, and add
    (1 + e^ε) · ``distance`` · releases to δ.
    """

    std: float
    distance: float


@lru_cache(maxsize=1024)
def gaussian_equivalent(
    variance: float, *, length: int, largest_distance: float = LARGEST_DISTANCE
) -> GaussianEquivalent:
    """The widest Gaussian behind Sk(``variance``) in ``length`` coordinates.

    Raises PrivacyError when the noise is too coarse for ``largest_distance``; then RDP applies
    (``common.privacy.skellam_accounting``), or a larger scale.

    >>> found = gaussian_equivalent(2.0**28, length=513)
    >>> found.std / 2**14 > 0.999
    True
    """
    if variance >= SMALLEST_VARIANCE:
        for step in _STEPS:
            found = _bound(variance, int(step))
            if found is not None and length * found[1] <= largest_distance:
                return GaussianEquivalent(std=found[0], distance=length * found[1])
    raise PrivacyError(
        f"noise: a variance of {variance:.6g} integers is too coarse to be charged as Gaussian in "
        f"{length} coordinates; use a larger scale"
    )


def delta_slack(*, epsilon: float, distance: float, releases: int) -> float:
    """What to add to δ for ``releases`` of ``distance`` each."""
    return (1 + math.exp(epsilon)) * distance * releases


def _bound(variance: float, step: int) -> tuple[float, float] | None:
    """(s, η) for h = ``step``; None where the construction makes no sense."""
    inner = (variance + 1 / 120) / step**4
    square = variance - step**2 * inner - 1 / 12
    if square <= variance / 2:
        return None
    scale = math.sqrt(variance)
    t: NDArray[np.float64] = np.asarray(_GRID / scale, dtype=np.float64)
    if t[-1] >= math.pi / 2:
        return None
    # log φ - log φ_K beyond the fourth order.
    gap = (
        variance * _cosine_remainder(t)
        - inner * _cosine_remainder(step * t)
        - _sinc_remainder(t / 2)
    )
    log_phi = -2 * variance * np.sin(t / 2) ** 2
    larger = np.maximum(log_phi, log_phi - gap)
    difference = np.exp(larger) * -np.expm1(-np.abs(gap))
    # Even integrand; beyond the grid both functions are below exp(-300).
    norm = math.sqrt(float((difference**2).sum()) * 0.01 / scale / math.pi + math.exp(-600))
    aliases = 4 * math.exp(-4.9 * square)
    reach = _REACH * scale
    theta = reach / variance
    if step * theta > 20:
        return None
    tails = 2 * math.exp(variance * 2 * math.sinh(theta / 2) ** 2 - theta * reach) + 2 * math.exp(
        square * theta**2 / 2
        + inner * 2 * math.sinh(step * theta / 2) ** 2
        + theta / 2
        - theta * reach
    )
    eta = (math.sqrt(2 * reach + 1) * (norm + aliases) + tails) / 2
    return math.sqrt(square), 2 * eta


def _cosine_remainder(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """cos x - 1 + x²/2 - x⁴/24."""
    square = x * x
    series = np.zeros_like(x)
    for order in range(24, 4, -2):
        series = (series + (-1) ** (order // 2) / math.factorial(order)) * square
    near = series * square**2
    far = np.cos(x) - 1 + square / 2 - square**2 / 24
    return np.where(x < 1, near, far)


def _sinc_remainder(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(sin x / x) + x²/6 + x⁴/180, for x < 0.8."""
    square = x * x
    coefficients = (1 / 2835, 1 / 37800, 1 / 467775, 691 / 3831077250, 2 / 127702575)
    series = np.zeros_like(x)
    for coefficient in reversed(coefficients):
        series = (series - coefficient) * square
    return series * square**2
