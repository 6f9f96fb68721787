"""What it costs to keep the best of several private runs.

A hyper-parameter chosen by its effect on patients is a release about them. With a *fixed* number
of trials nothing better is known in general than composing them all. With a *random* number the
best run alone may be released at a price that hardly grows with how many there were: Liu & Talwar
2019 (arXiv 1811.07971), in Rényi terms Papernot & Steinke 2022 (arXiv 2110.03620), whose symbols
are used here. What the theorems ask for:

- each trial picks its candidate at random, independently of the data, and draws fresh noise;
- a trial's score is part of what the trial itself releases under its own budget;
- the number of trials K is drawn once, independently of the data, and stays secret, as do all
  trials but the best.

Every candidate must keep the Rényi curve ε(λ) that is charged, so the largest of theirs is taken
at each order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from common.errors import PrivacyError
from common.privacy.accounting import Event, check_delta
from common.privacy.skellam_accounting import ORDERS, rdp
from common.privacy.units import Relation
from common.randomness import Stream

Law = Literal["logarithmic", "geometric", "poisson"]
LAWS: tuple[Law, ...] = get_args(Law)

# η of the truncated negative binomial law D_{η,γ} (definition 1 of the paper).
_SHAPES = {"logarithmic": 0.0, "geometric": 1.0}
_LARGEST_MEAN = 500.0  # beyond it exp(-mean) leaves the numbers a draw is made from


@dataclass(frozen=True, kw_only=True)
class Trials:
    """How many runs the best is kept of: a random number K of this ``law`` and mean.

    ``logarithmic`` and ``geometric`` are truncated negative binomial with η = 0 and 1, and at least
    one trial; ``poisson`` may draw none at all, and then the answer is one fixed beforehand.
    """

    law: Law
    mean: float

    def __post_init__(self) -> None:
        """Refuse what is no such law."""
        if self.law not in LAWS:
            raise PrivacyError(f"trials: expected one of {', '.join(LAWS)}, found {self.law!r}")
        if not 1 <= self.mean <= _LARGEST_MEAN:
            raise PrivacyError(
                f"trials: expected a mean from 1 to {_LARGEST_MEAN:g}, found {self.mean:g}"
            )

    @property
    def gamma(self) -> float:
        """γ of the truncated negative binomial law that has this mean (definition 1).

        >>> Trials(law="geometric", mean=4.0).gamma
        0.25
        """
        if self.law == "poisson":
            raise ValueError("a Poisson law has no γ")
        if self.law == "geometric" or self.mean == 1:
            return 1 / self.mean
        # E[K] = (1/γ - 1) / log(1/γ), with t = log(1/γ) above 0.
        found = brentq(lambda t: math.expm1(t) / t - self.mean, 1e-12, 700.0)
        return math.exp(-float(found))

    def draw(self, stream: Stream) -> int:
        """K, by inversion of one secret uniform."""
        target = float(stream.uniform(1)[0])
        count, below = (0, 0.0) if self.law == "poisson" else (1, 0.0)
        probability = self._first()
        while probability > 0 and below + probability <= target:
            below += probability
            count += 1
            probability *= self._ratio(count)
        return count

    def _first(self) -> float:
        if self.law == "poisson":
            return math.exp(-self.mean)
        if self.law == "geometric" or self.mean == 1:
            return self.gamma
        return (1 - self.gamma) / -math.log(self.gamma)

    def _ratio(self, count: int) -> float:
        """P(K = count) / P(K = count - 1)."""
        if self.law == "poisson":
            return self.mean / count
        if self.law == "geometric":
            return 1 - self.gamma
        return (1 - self.gamma) * (count - 1) / count


def selection_epsilon(
    candidates: Iterable[Sequence[Event]], trials: Trials, *, delta: float, relation: Relation
) -> float:
    """The ε at ``delta`` of the best of K trials, each of one candidate's events.

    Raises PrivacyError for sampling under the replace-one relation, which has no Rényi curve here.
    """
    check_delta(delta)
    curves = [_curve(events, relation) for events in candidates]
    if not curves:
        raise ValueError("a selection needs candidates")
    from dp_accounting.rdp import compute_epsilon  # noqa: PLC0415 (a second to load)

    largest = np.max(curves, axis=0)
    kept = selected_rdp(np.array(ORDERS, dtype=np.float64), largest, trials)
    return float(compute_epsilon(ORDERS, kept, delta)[0])


def selected_rdp(
    orders: NDArray[np.float64], curve: NDArray[np.float64], trials: Trials
) -> NDArray[np.float64]:
    """Rényi divergence of the best of K trials at each order, ``curve`` being that of one trial.

    Theorem 2 (truncated negative binomial) and theorem 6 (Poisson) of the paper.

    >>> one = Trials(law="geometric", mean=1.0)
    >>> selected_rdp(np.array([2.0, 1e10]), np.array([0.5, 1.0]), one).round(3)
    array([0.5, 1. ])
    """
    more = math.log(trials.mean) / (orders - 1)
    if trials.law == "poisson":
        return curve + trials.mean * _failure(orders, curve) + more
    shape = _SHAPES[trials.law]
    spread = (1 - 1 / orders) * curve - math.log(trials.gamma) / orders
    # λ̂ = 1 may be chosen as well, where no divergence of the trial enters.
    once_more = min(float(spread.min()), -math.log(trials.gamma))
    return np.asarray(curve + (1 + shape) * once_more + more)


def _failure(orders: NDArray[np.float64], curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """δ̂ of one trial at each ε̂ = log(1 + 1/(λ - 1)) that theorem 6 asks about."""
    from dp_accounting.rdp.rdp_privacy_accountant import (  # noqa: PLC0415 (a second to load)
        compute_delta,
    )

    return np.array([compute_delta(orders, curve, math.log1p(1 / (one - 1)))[0] for one in orders])


def _curve(events: Sequence[Event], relation: Relation) -> NDArray[np.float64]:
    total = np.zeros(len(ORDERS))
    for event in events:
        total += rdp(event, ORDERS, relation)
    return total
