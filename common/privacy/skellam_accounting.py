"""What Skellam noise costs: Rényi differential privacy (RDP), over integer orders.

Agarwal, Kairouz & Liu 2021, "The Skellam mechanism for differentially private federated learning"
(NeurIPS), theorem 3.5 and its corollary in many dimensions: noise of variance μ in every
coordinate of an integer vector whose neighbours differ by at most Δ₂ and Δ₁ gives, for every
integer α > 1,

    ε(α) ≤ α·Δ₂²/(2μ) + min( ((2α - 1)·Δ₂² + 6·Δ₁) / (4μ²), 3·Δ₁ / (2μ) ).

The first term is the Gaussian mechanism's; the second vanishes as the scale grows.

**Poisson sampling** at rate q, add-or-remove relation. For integer α

    ε'(α) ≤ log( Σ_{l=0..α} C(α,l)·(1-q)^(α-l)·q^l·exp((l-1)·ε(l)) ) / (α - 1),

the form of the sampled Gaussian in Mironov, Talwar & Zhang 2019 (arXiv 1908.10530), without the
factor 3 of Zhu & Wang 2019 for arbitrary mechanisms. Why it holds here: fix the sample S of the
other patients (joint quasi-convexity of the divergence) and let P and Q be noise around f(S) and
f(S ∪ {x}). D_α((1-q)P + qQ ‖ P) is the sum above, by the binomial theorem and D_l(Q ‖ P) ≤ ε(l).
The other direction, D_α(P ‖ (1-q)P + qQ), is no larger: the reflection at the midpoint of the two
centres swaps P and Q, since the noise is symmetric and the shift an integer vector. With r = Q/P,
a = 1 - q + qr and b = r + 1 - a, swapping turns the claim into a^α - a^(1-α) ≥ b·(s^α - s^(1-α))
for s = r/b ≤ a. As b = (a - 1)/(s - 1), it compares the slopes of two chords from 1 of the
function x^α - x^(1-α), which is convex above 1 and concave below. The replace-one relation under
sampling has no such proof here and is refused.

**Why not PLD.** A privacy loss distribution needs the worst pair of neighbours. In one dimension
it is known; among integer vectors of bounded L1 and L2 norm it is not, and the one-dimensional
worst case does not bound it. The price of RDP against PLD is some percent of noise (8.5 % at ε = 1,
δ = 1e-5). Where the variance is large enough, ``common.privacy.skellam_gaussian`` avoids it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from common.errors import PrivacyError
from common.privacy.accounting import GaussianEvent, check_delta, smallest_noise
from common.privacy.units import Relation

ORDERS = (*range(2, 129), *range(132, 257, 4), *range(272, 513, 16), 640, 768, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class SkellamEvent:
    """``steps`` releases of an integer sum with Skellam noise, over Poisson samples of units.

    ``l2_sensitivity``, ``l1_sensitivity``: norms of one unit's integers after rounding.
    ``variance``: of the honest survivors' noise, in integer units. ``sampling_rate``: as in
    ``GaussianEvent``.
    """

    l2_sensitivity: float
    l1_sensitivity: float
    variance: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that describe no mechanism."""
        for name in ("l2_sensitivity", "l1_sensitivity", "variance"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise PrivacyError(
                    f"{name}: expected a finite number above 0, found {getattr(self, name)}"
                )
        if self.l1_sensitivity < self.l2_sensitivity:
            raise PrivacyError("l1_sensitivity: expected at least l2_sensitivity")
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(
                f"sampling rate: expected a probability in (0, 1], found {self.sampling_rate}"
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PrivacyError(f"steps: expected a whole number of at least 1, found {self.steps}")


Event = SkellamEvent | GaussianEvent


def rdp(event: Event, orders: Sequence[int], relation: Relation) -> NDArray[np.float64]:
    """Upper bound on the Rényi divergence of ``event`` at each of the integer ``orders`` > 1."""
    if any(order < 2 for order in orders):
        raise ValueError("orders: expected integers above 1")
    if event.sampling_rate == 1:
        one = _unsampled(event, np.asarray(orders, dtype=np.float64), relation)
    elif relation is not Relation.ADD_REMOVE:
        raise PrivacyError(
            "sampling with the replace-one relation is not accounted for Skellam noise; "
            "use add_or_remove_one, or no sampling"
        )
    else:
        every = _unsampled(event, np.arange(2, max(orders) + 1, dtype=np.float64), relation)
        one = np.array([_sampled(every, order, event.sampling_rate) for order in orders])
    return one * event.steps


def epsilon(events: Iterable[Event], *, delta: float, relation: Relation) -> float:
    """The ε at ``delta`` of all ``events`` composed; 0 for none. An upper bound.

    From RDP by Canonne, Kamath & Steinke 2020 (arXiv 2004.00010, proposition 12).

    >>> event = SkellamEvent(l2_sensitivity=1024, l1_sensitivity=8192, variance=4096.0**2)
    >>> round(epsilon([event], delta=1e-5, relation=Relation.ADD_REMOVE), 2)
    1.01
    """
    check_delta(delta)
    total = np.zeros(len(ORDERS))
    for event in events:
        total += _cached_rdp(event, relation)
    if not total.any():
        return 0.0
    from dp_accounting.rdp import compute_epsilon  # noqa: PLC0415 (a second to load)

    return float(compute_epsilon(ORDERS, total, delta)[0])


def calibrate(
    events_at: Callable[[float], Sequence[Event]],
    *,
    epsilon: float,
    delta: float,
    relation: Relation,
    tolerance: float = 1e-3,
) -> float:
    """The smallest noise multiplier whose events stay at or under (``epsilon``, ``delta``).

    Keeps the private side of the root, as ``common.privacy.accounting.calibrate`` does.
    """

    def is_private(noise_multiplier: float) -> bool:
        return _spent(events_at(noise_multiplier), delta, relation) <= epsilon

    return smallest_noise(is_private, epsilon=epsilon, delta=delta, tolerance=tolerance)


def _spent(events: Sequence[Event], delta: float, relation: Relation) -> float:
    return epsilon(events, delta=delta, relation=relation)


@lru_cache(maxsize=4096)
def _cached_rdp(event: Event, relation: Relation) -> NDArray[np.float64]:
    return rdp(event, ORDERS, relation)


def _unsampled(event: Event, order: NDArray[np.float64], relation: Relation) -> NDArray[np.float64]:
    widening = 2.0 if relation is Relation.REPLACE_ONE else 1.0
    if isinstance(event, GaussianEvent):
        return order * widening**2 / (2 * event.noise_multiplier**2)
    square = (widening * event.l2_sensitivity) ** 2
    absolute, variance = widening * event.l1_sensitivity, event.variance
    excess = np.minimum(
        ((2 * order - 1) * square + 6 * absolute) / (4 * variance**2),
        3 * absolute / (2 * variance),
    )
    return np.asarray(order * square / (2 * variance) + excess)


def _sampled(every: NDArray[np.float64], order: int, rate: float) -> float:
    """``every[i]`` is the divergence at order i + 2, unsampled."""
    drawn = np.arange(order + 1)
    log_binomial = gammaln(order + 1) - gammaln(drawn + 1) - gammaln(order - drawn + 1)
    log_moment = np.concatenate([np.zeros(2), (drawn[2:] - 1) * every[: order - 1]])
    terms = log_binomial + (order - drawn) * math.log1p(-rate) + drawn * math.log(rate) + log_moment
    return max(0.0, float(logsumexp(terms))) / (order - 1)
