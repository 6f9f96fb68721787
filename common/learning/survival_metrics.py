"""How good predicted survival curves are, where some patients' times are censored.

Times are the patients' own, never rounded to the intervals of a model. Weights by the inverse
probability of censoring (IPCW) come from the same records, by Kaplan and Meier's estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True)
class StepCurve:
    """Kaplan and Meier's estimate: ``survival`` holds from each of ``times`` on, 1 before.

    ``spread``: Greenwood's sum Σ d / (n (n − d)) up to each time: Var S ≈ S² · spread.
    """

    times: Floats
    survival: Floats
    spread: Floats

    def at(self, when: Floats, *, before: bool = False) -> Floats:
        """Survival at ``when``; ``before``: just before it (its left limit)."""
        return np.concatenate([[1.0], self.survival])[self._steps(when, before=before)]

    def interval(self, when: Floats) -> tuple[Floats, Floats]:
        """95 % interval at ``when``, on the log-log scale, which stays within [0, 1]
        (Kalbfleisch & Prentice 1980)."""
        survival = self.at(when)
        spread = np.concatenate([[0.0], self.spread])[self._steps(when)]
        inside = (survival > 0) & (survival < 1)
        logs = np.log(np.where(inside, survival, 0.5))
        width = np.exp(1.96 * np.sqrt(spread) / np.abs(logs))
        low, high = (
            np.where(inside, np.exp(logs * power), survival) for power in (width, 1 / width)
        )
        return low, high

    def _steps(self, when: Floats, *, before: bool = False) -> NDArray[np.intp]:
        return np.searchsorted(self.times, when, side="left" if before else "right")


def kaplan_meier(times: Floats, seen: Booleans) -> StepCurve:
    """The share of patients still without the event (Kaplan & Meier 1958).

    >>> curve = kaplan_meier(np.array([1.0, 2, 3, 4]), np.array([True, False, True, False]))
    >>> curve.at(np.array([0.5, 1, 2, 3])).tolist()
    [1.0, 0.75, 0.75, 0.375]
    """
    unique, where = np.unique(times, return_inverse=True)
    events = np.bincount(where, weights=seen, minlength=len(unique))
    at_risk = len(times) - np.searchsorted(np.sort(times), unique, side="left")
    left = at_risk - events
    survival: Floats = np.cumprod(left / at_risk, dtype=np.float64)
    terms = np.divide(events, at_risk * left, out=np.zeros(len(unique)), where=left > 0)
    return StepCurve(unique, survival, np.cumsum(terms))


def censoring(times: Floats, seen: Booleans) -> StepCurve:
    """The share of patients not yet censored; an event at the same time comes first."""
    unique, where = np.unique(times, return_inverse=True)
    censored = np.bincount(where, weights=~seen, minlength=len(unique))
    events = np.bincount(where, weights=seen, minlength=len(unique))
    at_risk = len(times) - np.searchsorted(np.sort(times), unique, side="left") - events
    rate = np.divide(censored, at_risk, out=np.zeros(len(unique)), where=at_risk > 0)
    return StepCurve(unique, np.cumprod(1 - rate), np.zeros(len(unique)))


def concordance(
    times: Floats, seen: Booleans, risk: Floats, *, until: float = math.inf, weighted: bool = False
) -> float:
    """Of pairs whose order in time is known, the share in which the higher risk comes first.

    Harrell's C (1982); ties of risk count one half, a pair with equal times counts where one of
    them is censored. ``weighted``: each pair by 1 / G(t)², which makes it independent of who was
    censored (Uno et al. 2011). ``until``: only events before. NaN without a pair.
    """
    weights = np.ones(len(times))
    if weighted:
        kept = censoring(times, seen).at(times, before=True)
        weights = np.divide(1.0, kept**2, out=np.zeros(len(times)), where=kept > 0)
    wins = pairs = 0.0
    for one in np.flatnonzero(seen & (times < until)):
        later = (times > times[one]) | ((times == times[one]) & ~seen)
        won = (risk[later] < risk[one]).sum() + 0.5 * (risk[later] == risk[one]).sum()
        wins += weights[one] * float(won)
        pairs += weights[one] * float(later.sum())
    return wins / pairs if pairs > 0 else math.nan


def brier(times: Floats, seen: Booleans, survival: Floats, when: Floats) -> Floats:
    """Squared error of predicted ``survival`` [rows, cuts] at each of ``when`` [cuts].

    A patient counts by 1 / G: at the event's time if it came before, at ``when`` if still under
    observation then; one censored before counts nothing (Graf et al. 1999). NaN beyond the last
    patient.
    """
    curve = censoring(times, seen)
    own = curve.at(times, before=True)[:, None]
    then = curve.at(when)[None, :]
    gone = (times[:, None] <= when) & seen[:, None]
    left = times[:, None] > when
    error = np.where(gone, survival**2, np.where(left, (1 - survival) ** 2, 0.0))
    kept = np.where(gone, own, then)
    known = gone | left
    weights = np.divide(1.0, kept, out=np.zeros(error.shape), where=known & (kept > 0))
    found: Floats = (weights * error).mean(axis=0)
    return np.where(when < times.max(initial=0.0), found, math.nan)


def integrated_brier(times: Floats, seen: Booleans, survival: Floats, when: Floats) -> float:
    """The mean of :func:`brier` over time, by the trapezoid rule between those of ``when`` at
    which it exists; NaN with fewer than two."""
    each = brier(times, seen, survival, when)
    known = ~np.isnan(each)
    if known.sum() < 2:
        return math.nan
    at, values = when[known], each[known]
    return float(np.trapezoid(values, at) / (at[-1] - at[0]))


def calibration(times: Floats, seen: Booleans, survival: Floats, when: float) -> float:
    """|mean of predicted ``survival`` [rows] − Kaplan and Meier's| at ``when``: in the large.

    NaN beyond the last patient.
    """
    if not when < times.max(initial=0.0):
        return math.nan
    observed = kaplan_meier(times, seen).at(np.array([when]))[0]
    return float(abs(survival.mean() - observed))


def lost_share(survival: Floats, when: Floats) -> Floats:
    """The share of the time up to the last of ``when`` [cuts] that is lost, [rows] in [0, 1].

    One minus the restricted mean survival time over its greatest value, for a curve that is
    ``survival`` [rows, cuts] at ``when`` and straight between: the risk by which patients are
    ordered, also where curves cross.
    """
    whole = np.concatenate([np.ones((len(survival), 1)), survival], axis=1)
    area = np.trapezoid(whole, np.concatenate([[0.0], when]), axis=1)
    return np.asarray(1 - area / when[-1], dtype=np.float64)


def outcome_groups(intervals: int) -> int:
    """Rows of the histogram that :func:`risk_histogram` adds to."""
    return 2 * intervals + 1


def risk_histogram(
    labels: Floats, survival: Floats, owners: NDArray[np.int64], when: Floats, bins: int
) -> Floats:
    """Each patient's contribution to a histogram of risk by outcome:
    [patients, outcomes · bins].

    Outcomes are the event in each of the intervals that end at ``when``, then the censored in
    each, then all who passed the last. Bins are of the root of :func:`lost_share`, finer where
    risks are low. A patient with k records adds 1/k at each: entries are non-negative and sum to
    1, so the L2 norm is at most 1 and so is the sensitivity of the sum.
    """
    times, seen = labels[:, 0], labels[:, 1] > 0
    interval = np.searchsorted(when, times, side="left")
    past = interval == len(when)
    group = np.where(past | seen, interval, len(when) + interval)
    group = np.where(past, 2 * len(when), group)
    risk = np.sqrt(np.clip(lost_share(survival, when), 0.0, 1.0))
    place = np.minimum((risk * bins).astype(np.int64), bins - 1)
    patients = int(owners.max()) + 1 if len(owners) else 0
    table = np.zeros((patients, outcome_groups(len(when)) * bins))
    weights = 1.0 / np.bincount(owners, minlength=patients)[owners]
    np.add.at(table, (owners, group * bins + place), weights)
    return table


def concordance_from_histogram(counts: Floats) -> float:
    """Harrell's C from (noised) counts [2 · intervals + 1, bins]; ties within a bin count one half.

    Only pairs count that fall in different intervals. Negative counts, which noise makes, are
    kept, as in ``auc_from_histogram``; NaN without a pair.
    """
    intervals = len(counts) // 2
    wins = pairs = 0.0
    for interval in range(intervals):
        first = counts[interval]
        later = counts[interval + 1 : intervals].sum(axis=0) + counts[
            intervals + interval + 1 :
        ].sum(axis=0)
        below = np.cumsum(later) - later
        wins += float((first * (below + later / 2)).sum())
        pairs += float(first.sum() * later.sum())
    return wins / pairs if pairs > 0 else math.nan
