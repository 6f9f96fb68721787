"""Intervals over patients: how much a figure owes to who happened to be among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DRAWS = 400


def interval(
    figure: Callable[..., float],
    labels: NDArray[np.int64],
    *columns: NDArray[Any],
    seed: int,
) -> tuple[float, float, float]:
    """``figure(labels, *columns)`` with its 95 % interval: (value, low, high).

    A percentile bootstrap over rows within each class (Efron & Tibshirani 1993, chapter 13). With
    several columns their rows are drawn together, so that a difference is a paired one.

    >>> interval(lambda labels, x: float(x.mean()), np.zeros(4, np.int64), np.ones(4), seed=0)
    (1.0, 1.0, 1.0)
    """
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == one) for one in np.unique(labels)]
    values = []
    for _ in range(_DRAWS):
        rows = np.concatenate([generator.choice(one, size=len(one)) for one in groups])
        values.append(figure(labels[rows], *(column[rows] for column in columns)))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return figure(labels, *columns), float(low), float(high)
