"""What it would cost the patients to choose among a sweep's combinations by their outcomes.

A sweep itself chooses nothing. Who picks the best row has used the patients behind every row: at
worst all runs are composed; with a private selection (``common.privacy.selection``) the best of a
random number of trials is charged alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.errors import PrivacyError
from common.privacy.accounting import Event, epsilon
from common.privacy.budget import Budget, budget_of, evaluation_budget_of
from common.privacy.selection import LAWS, Law, Trials, selection_epsilon
from common.privacy.skellam_gaussian import LARGEST_DISTANCE, delta_slack
from common.privacy.units import Relation
from common.study import Study
from simulations.combinations import Combination


@dataclass(frozen=True, kw_only=True)
class Cost:
    """ε for each training and each test patient, at δ of the study; None where nothing bounds it.

    ``testing`` is None too where the study releases nothing about test patients: then only exact
    scores could decide, which no budget covers.
    """

    training: float | None
    testing: float | None


@dataclass(frozen=True, kw_only=True)
class Price:
    """What choosing would cost.

    ``each_once``: every combination run once, all of it published: plain composition.
    ``all_runs``: the whole sweep with all its seeds, in which a patient may be trained on under one
    seed and tested on under another; None where nothing bounds it.
    ``selected``: the best of a random number of trials (mean ``trials``) and nothing else.
    """

    delta: float
    trials: int
    runs: int
    each_once: Cost
    all_runs: float | None
    selected: Mapping[Law, Cost]


def price_of(study: Study, sweep: Sequence[Combination], seeds: int) -> Price | None:
    """The price of choosing among ``sweep``; None where the study promises nothing to begin with.

    Every ε is stated at the study's own δ.
    """
    delta = study.privacy.delta
    if delta is None:
        return None
    pools = _Pools.of([one.study for one in sweep])
    trials = max(1, len(sweep))
    return Price(
        delta=delta,
        trials=trials,
        runs=len(sweep) * seeds,
        each_once=Cost(
            training=_bounded(pools, lambda: pools.composed(pools.training, 1, delta)),
            testing=_bounded(pools, lambda: pools.composed(pools.testing, 1, delta)),
        ),
        all_runs=_bounded(pools, lambda: pools.over_seeds(seeds, delta)),
        selected={
            law: selection_cost(
                [one.study for one in sweep], Trials(law=law, mean=float(trials)), delta=delta
            )
            for law in LAWS
        },
    )


def selection_cost(studies: Sequence[Study], trials: Trials, *, delta: float) -> Cost:
    """What the best of a random number of trials, each one of ``studies``, costs."""
    pools = _Pools.of(studies)
    return Cost(
        training=_bounded(pools, lambda: pools.selected(pools.training, trials, delta)),
        testing=_bounded(pools, lambda: pools.selected(pools.testing, trials, delta)),
    )


@dataclass(frozen=True)
class _Pools:
    """The budgets of all combinations; ``relation`` is None where they promise different things."""

    relation: Relation | None
    training: tuple[Budget, ...]
    testing: tuple[Budget, ...]

    @classmethod
    def of(cls, studies: Sequence[Study]) -> _Pools:
        promises = {(one.privacy.unit, one.privacy.relation) for one in studies}
        private = all(one.privacy.delta is not None for one in studies)
        testing = [evaluation_budget_of(one) for one in studies]
        return cls(
            relation=studies[0].privacy.relation if private and len(promises) == 1 else None,
            training=tuple(budget_of(one) for one in studies),
            testing=tuple(one for one in testing if one is not None) if None not in testing else (),
        )

    def composed(self, budgets: Sequence[Budget], times: int, delta: float) -> float | None:
        """All of ``budgets``, each ``times`` times."""
        if not budgets:
            return None
        events = [event for one in budgets for event in one.events()] * times
        return self._within(events, _releases(budgets) * times, delta)

    def over_seeds(self, seeds: int, delta: float) -> float | None:
        """A patient's worst mixture of seeds that train on it and seeds that test on it."""
        found = []
        for tested in range(seeds + 1 if self.testing else 1):
            parts = [(self.training, seeds - tested), (self.testing, tested)]
            events = [
                event
                for budgets, times in parts
                for one in budgets
                for event in one.events() * times
            ]
            releases = sum(_releases(budgets) * times for budgets, times in parts)
            found.append(self._within(events, releases, delta))
        return None if None in found else max(one for one in found if one is not None)

    def selected(self, budgets: Sequence[Budget], trials: Trials, delta: float) -> float | None:
        """The best of a random number of trials."""
        if not budgets:
            return None
        most = max(_releases([one]) for one in budgets)

        def find(at: float) -> float:
            assert self.relation is not None  # noqa: S101  (see _bounded)
            events = [one.events() for one in budgets]
            return selection_epsilon(events, trials, delta=at, relation=self.relation)

        return _near_gaussian(find, math.ceil(most * trials.mean), delta)

    def _within(self, events: Sequence[Event], releases: int, delta: float) -> float | None:
        def find(at: float) -> float:
            assert self.relation is not None  # noqa: S101  (see _bounded)
            return epsilon(events, delta=at, relation=self.relation)

        return _near_gaussian(find, releases, delta)


def _near_gaussian(find: Callable[[float], float], releases: int, delta: float) -> float | None:
    """``find`` at ``delta``, half of it set aside where noise is only nearly Gaussian."""
    if not releases:
        found = find(delta)
    else:
        found = find(delta / 2)
        if math.isinf(found) or found > 700:
            return None
        slack = delta_slack(epsilon=found, distance=LARGEST_DISTANCE, releases=releases)
        if slack > delta / 2:
            return None
    return found if math.isfinite(found) else None


def _releases(budgets: Sequence[Budget]) -> int:
    """Releases whose noise is only nearly Gaussian, in all budgets together."""
    return sum(
        charge.rounds for one in budgets if one.distance for charge in (*one.charges, *one.spare)
    )


def _bounded(pools: _Pools, find: Callable[[], float | None]) -> float | None:
    """``find()``; None where nothing bounds it, as where combinations promise different things."""
    if pools.relation is None:
        return None
    try:
        return find()
    except PrivacyError:  # sampling under replace-one has no Rényi curve
        return None
