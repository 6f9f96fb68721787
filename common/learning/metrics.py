"""How good a model is, and how sure we are of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bounds = tuple[float | None, float | None]
"""Lowest and highest that a figure can be; None where it has no end."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval and the number of values behind it."""

    mean: float
    low: float
    high: float
    count: int


def auc(labels: NDArray[np.int64], probabilities: Floats) -> float:
    """Area under the ROC curve; for more than two classes the mean over one-against-the-rest.

    NaN when only one class is present: the area does not exist there.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return math.nan
    if probabilities.shape[1] == 2:
        return auc_of_scores(labels == 1, probabilities[:, 1])
    return float(np.mean([auc_of_scores(labels == one, probabilities[:, one]) for one in present]))


def auc_of_scores(positive: NDArray[np.bool_], scores: Floats) -> float:
    """How often a positive's score is above a negative's, equal ones counted one half.

    NaN without either, and where a score is NaN.
    """
    if np.isnan(scores).any():
        return math.nan
    bins, place = np.unique(scores, return_inverse=True)
    counts = [np.bincount(place[one], minlength=len(bins)) for one in (~positive, positive)]
    return auc_from_histogram(np.stack(counts).astype(np.float64))


def accuracy(labels: NDArray[np.int64], probabilities: Floats) -> float:
    """Share of records whose most probable class is the label."""
    return float((probabilities.argmax(axis=1) == labels).mean())


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent repetitions with Student's t interval; NaNs are left out.

    >>> mean_interval([0.9, 0.92, 0.94]).mean
    0.92
    """
    known = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if len(known) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(known.mean())
    if len(known) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    from scipy import stats  # noqa: PLC0415 (takes a second)

    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return Interval(round(mean, 12), mean - half, mean + half, len(known))


def histogram_shape(classes: int, bins: int) -> tuple[int, int]:
    """Rows (labels) and columns of the histogram that :func:`score_histogram` adds to."""
    return classes, bins if classes == 2 else classes


def score_histogram(
    labels: NDArray[np.int64], probabilities: Floats, owners: NDArray[np.int64], bins: int
) -> Floats:
    """Each patient's contribution to the histogram of scores by label: [patients, classes · bins].

    A patient with k records adds 1/k at each: entries are non-negative and sum to 1, so the L2
    norm is at most 1 and so is the sensitivity of the sum (add or remove one patient).
    Two classes are binned by the probability of class 1, more by the predicted class.
    """
    classes, bins = histogram_shape(probabilities.shape[1], bins)
    if classes == 2:
        position = np.minimum((probabilities[:, 1] * bins).astype(np.int64), bins - 1)
    else:
        position = probabilities.argmax(axis=1)
    patients = int(owners.max()) + 1 if len(owners) else 0
    table = np.zeros((patients, classes * bins))
    weights = 1.0 / np.bincount(owners, minlength=patients)[owners]
    np.add.at(table, (owners, labels * bins + position), weights)
    return table


def auc_from_histogram(histogram: Floats) -> float:
    """AUC from (noised) counts [2, bins] by score; ties within a bin count one half.

    Negative counts, which noise makes, are kept: the noise of the two rows is independent, so
    that it cancels on average in the products. Noise can push the figure out of [0, 1]; to be
    shown, it is held within (see ``noise_interval``).
    """
    negatives, positives = histogram
    if negatives.sum() <= 0 or positives.sum() <= 0:
        return math.nan
    below = np.cumsum(negatives) - negatives
    wins = (positives * (below + negatives / 2)).sum()
    return float(wins / (positives.sum() * negatives.sum()))


def accuracy_from_histogram(histogram: Floats) -> float:
    """Accuracy from (noised) counts [classes, bins]; two classes split at probability one half."""
    total = histogram.sum()
    if total <= 0:
        return math.nan
    if len(histogram) == 2:
        middle = histogram.shape[1] // 2
        right = histogram[0, :middle].sum() + histogram[1, middle:].sum()
    else:
        right = np.trace(histogram)
    return float(right / total)


def held(value: float, bounds: Bounds) -> float:
    """A figure within what it can be; NaN stays.

    >>> held(1.2, (0.0, 1.0)), held(-3.0, (0.0, None)), held(7.0, (None, None))
    (1.0, 0.0, 7.0)
    """
    low, high = bounds
    if low is not None and value < low:
        return low
    return high if high is not None and value > high else value


def noise_interval(
    histogram: Floats, noise_std: float, figure: Callable[[Floats], float], *, bounds: Bounds
) -> Interval:
    """``figure`` of a noised histogram, with the 95 % interval that its noise alone explains.

    A parametric bootstrap: the same noise is added again, many times. Post-processing, so free.
    Noise can push a figure out of its ``bounds``: it is held within.
    """
    generator = np.random.default_rng(0)
    again = [
        figure(histogram + generator.normal(0, noise_std, histogram.shape)) for _ in range(400)
    ]
    known = [value for value in again if not math.isnan(value)]
    mean = figure(histogram)
    if math.isnan(mean) or not known:
        return Interval(held(mean, bounds), math.nan, math.nan, 0)
    half = 1.96 * float(np.std(known))
    low, mean, high = (held(one, bounds) for one in (mean - half, mean, mean + half))
    return Interval(mean, low, high, 1)
