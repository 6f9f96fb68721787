"""How well effects of a treatment are estimated, and how far patients' data can say so."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Propensities are held within, so that no single patient's weight decides an estimate.
TRIM = 0.01


def sqrt_pehe(effect: Floats, truth: Floats) -> float:
    """Root mean squared error of each patient's effect (Hill 2011), both [rows].

    >>> sqrt_pehe(np.array([1.0, 3.0]), np.array([0.0, 2.0]))
    1.0
    """
    return float(np.sqrt(np.square(effect - truth).mean()))


def factual_rmse(treated: Floats, outcome: Floats, mu0: Floats, mu1: Floats) -> float:
    """Root mean squared error of the outcome that was seen; says nothing of the other one."""
    return float(np.sqrt(np.square(np.where(treated > 0, mu1, mu0) - outcome).mean()))


def doubly_robust(
    treated: Floats, outcome: Floats, mu0: Floats, mu1: Floats, propensity: Floats
) -> tuple[Floats, Floats]:
    """Each patient's scores for the outcome without and with treatment, [rows] each.

    Their means are right where either the outcomes or the propensity are (AIPW; Robins, Rotnitzky
    & Zhao 1994). Propensities are held within [0.01, 0.99].
    """
    held = np.clip(propensity, TRIM, 1 - TRIM)
    with_it = mu1 + (treated > 0) * (outcome - mu1) / held
    without = mu0 + (treated <= 0) * (outcome - mu0) / (1 - held)
    return without, with_it


def mean_with_interval(scores: Floats) -> tuple[float, float, float]:
    """The mean of independent scores and its 95 % interval, by their spread; NaN without two."""
    if len(scores) < 2:
        return math.nan, math.nan, math.nan
    mean = float(scores.mean())
    half = 1.96 * float(scores.std(ddof=1)) / math.sqrt(len(scores))
    return mean, mean - half, mean + half


def policy_scores(policy: NDArray[np.bool_], without: Floats, with_it: Floats) -> Floats:
    """Scores [rows] of treating whom ``policy`` [rows] says; their mean is the policy's value."""
    return np.where(policy, with_it, without)


def outside_overlap(propensity: Floats, margin: float = 0.1) -> float:
    """Share of patients almost always or almost never treated: of them data say little.

    >>> outside_overlap(np.array([0.05, 0.5, 0.95, 0.1]))
    0.5
    """
    return float(((propensity < margin) | (propensity > 1 - margin)).mean())


def effective_share(treated: Floats, propensity: Floats) -> float:
    """Kish's effective sample size of the inverse propensity weights, as a share of the patients;
    of the smaller arm's."""
    held = np.clip(propensity, TRIM, 1 - TRIM)
    shares = []
    for arm, chance in ((treated > 0, held), (treated <= 0, 1 - held)):
        weights = 1 / chance[arm]
        if not len(weights):
            return math.nan
        shares.append(weights.sum() ** 2 / np.square(weights).sum() / len(weights))
    return float(min(shares))
