"""A privacy filter: a budget that holds when each step is chosen after seeing the last.

Composition theorems assume that the mechanisms were fixed in advance. When a hospital's next noise
or sampling rate depends on earlier releases, the sum of Rényi divergences at one order fixed
beforehand still bounds the whole (Feldman & Zrnic 2021, arXiv 2008.11193): stop
before the sum exceeds its budget, and everything released so far is (ε, δ)-DP.

The order is fixed at construction. Choosing the best order afterwards, or allowing any of several,
is tighter but rests on a union over orders that this module does not attempt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from common.errors import PrivacyError
from common.privacy.accounting import GaussianEvent, check_delta, merged
from common.privacy.units import Relation

_ORDERS = (1.25, 1.5, 1.75, *(2.0 + 0.25 * i for i in range(32)), *map(float, range(10, 65)),
           80.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0, 1024.0)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RdpFilter:
    """What is left of (``epsilon``, ``delta``) at one Rényi ``order``; ``charge`` gives the next.

    >>> start = RdpFilter.opened(epsilon=1.0, delta=1e-5, relation=Relation.ADD_REMOVE)
    >>> after = start.charge([GaussianEvent(noise_multiplier=8.0)])
    >>> 0 < after.spent < start.budget
    True
    """

    epsilon: float
    delta: float
    relation: Relation
    order: float
    spent: float = 0.0

    @classmethod
    def opened(
        cls,
        *,
        epsilon: float,
        delta: float,
        relation: Relation,
        expected: Sequence[GaussianEvent] = (),
    ) -> RdpFilter:
        """A fresh filter at the order under which ``expected`` can be repeated most often.

        ``expected`` is a public guess of a typical round, made before any release; a bad guess
        costs utility, never privacy. Without one, the order suits whole-cohort Gaussians.
        Raises PrivacyError when no order leaves any budget.
        """
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise PrivacyError(f"ε: expected a finite number above 0, found {epsilon}")
        check_delta(delta)
        typical = tuple(expected) or (GaussianEvent(noise_multiplier=10.0),)

        def repeats(order: float) -> float:
            return _budget(epsilon, delta, order) / renyi(typical, order=order, relation=relation)

        best = max(_ORDERS, key=repeats)
        if repeats(best) <= 0:
            raise PrivacyError(
                f"ε = {epsilon} at δ = {delta}: too small for a privacy filter at any order; "
                f"raise ε or δ, or fix the mechanisms in advance"
            )
        return cls(epsilon=epsilon, delta=delta, relation=relation, order=best)

    @property
    def budget(self) -> float:
        """The Rényi divergence at ``order`` that implies (``epsilon``, ``delta``)."""
        return _budget(self.epsilon, self.delta, self.order)

    def charge(self, events: Sequence[GaussianEvent]) -> RdpFilter:
        """The filter after ``events``; PrivacyError, with nothing charged, if they do not fit."""
        spent = self.spent + renyi(events, order=self.order, relation=self.relation)
        if not spent <= self.budget:
            raise PrivacyError(
                f"privacy filter: expected a Rényi divergence of at most {self.budget:.6g} at "
                f"order {self.order:g}, the next step brings it to {spent:.6g}; stop, or add noise"
            )
        return replace(self, spent=spent)

    def spent_epsilon(self) -> float:
        """The ε at ``delta`` that the divergence spent so far implies."""
        return max(0.0, self.spent + _conversion(self.delta, self.order)) if self.spent else 0.0


def renyi(events: Sequence[GaussianEvent], *, order: float, relation: Relation) -> float:
    """The Rényi divergence of ``events`` at ``order``, summed; Poisson sampling amplifies it.

    Under replace-one a Poisson sample is counted as the whole cohort (quasi-convexity makes that
    an upper bound): no closed form for it is known to us.
    """
    return math.fsum(_event_renyi(event, order, relation) for event in merged(events))


@lru_cache(maxsize=8192)
def _event_renyi(event: GaussianEvent, order: float, relation: Relation) -> float:
    sigma = event.noise_multiplier
    if relation is Relation.REPLACE_ONE:
        return event.steps * 2.0 * order / sigma**2  # the sum moves by two clip norms
    if event.sampling_rate == 1.0:
        return event.steps * order / (2.0 * sigma**2)  # Mironov 2017, proposition 7
    import dp_accounting  # noqa: PLC0415 (a second to load)
    from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415

    accountant = RdpAccountant([order], dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(
        dp_accounting.PoissonSampledDpEvent(
            event.sampling_rate, dp_accounting.GaussianDpEvent(sigma)
        ),
        event.steps,
    )
    return float(accountant.rdp[0])


def _conversion(delta: float, order: float) -> float:
    """What turns a divergence into ε (Canonne, Kamath & Steinke 2020, proposition 12)."""
    return math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1.0)


def _budget(epsilon: float, delta: float, order: float) -> float:
    return max(0.0, epsilon - _conversion(delta, order))
