"""A lower bound on ε from an attack: canaries put into the very step that hospitals run.

A canary is a unit whose clipped contribution is a known direction. Each of ``canaries`` orthogonal
ones takes part or not by a fair coin; the attacker sees every noised sum and says who took part.
Orthogonal canaries meet independent noise, so that one run gives as many independent trials (after
Steinke, Nasr & Jagielski 2023, arXiv 2305.08846; Nasr et al. 2023, arXiv 2302.07956).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor, nn

from common.learning.gradients import choose_engine, private_gradient
from common.learning.records import Records
from common.privacy.plan import StepPlan
from common.randomness import NoiseSource

Floats = NDArray[np.float64]

_LOUDNESS = 100.0  # a canary's gradient before clipping, in clip norms


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The attacker's sum along each canary, in clip norms, for those that took part or did not."""

    present: Floats
    absent: Floats
    steps: int


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Lower bounds on ε that hold together with probability ``confidence``.

    ``epsilon``: from false and missed alarms alone, without any assumption on the noise.
    ``epsilon_gaussian``: the same alarms read as those of a Gaussian mechanism, exact when every
    unit takes part in every step; None otherwise.
    """

    epsilon: float
    epsilon_gaussian: float | None
    confidence: float
    trials: int


def canary_scores(
    plan: StepPlan, *, steps: int, runs: int, canaries: int, noise: NoiseSource, label: str
) -> Scores:
    """Run ``steps`` real private steps ``runs`` times; ``label`` keeps audits' streams apart."""
    model = nn.Linear(canaries, 1, bias=False)
    weights = torch.zeros(canaries)
    loud = torch.eye(canaries) * (_LOUDNESS * plan.clip_norm)
    present, absent = [], []
    for run in range(runs):
        coins = noise.stream("canary coins", label, run).uniform(canaries) < 0.5
        chosen = torch.from_numpy(np.flatnonzero(coins))
        units = len(chosen)
        records = Records(loud[chosen], torch.zeros(units), torch.arange(units), units)
        gradient = private_gradient(
            choose_engine(model, _answer_itself, records),
            records,
            plan,
            expected_units=plan.clip_norm,  # sums in clip norms
            stream=noise.stream("canary step", label, run),
        )
        seen = torch.stack([gradient(weights) for _ in range(steps)]).double().sum(dim=0).numpy()
        present.append(seen[coins])
        absent.append(seen[~coins])
    return Scores(present=np.concatenate(present), absent=np.concatenate(absent), steps=steps)


def bound(scores: Scores, *, sampling_rate: float, delta: float, confidence: float) -> Bound:
    """Lower bounds on ε at ``delta`` from the attacker's scores.

    The threshold is chosen on one half of the trials and judged on the other. Rates of false and
    missed alarms are bounded by Clopper & Pearson 1934, each with half of the allowed doubt.
    """
    doubt = 1 - confidence
    halves = [(one[::2], one[1::2]) for one in (scores.present, scores.absent)]
    (choose_in, judge_in), (choose_out, judge_out) = halves
    low, high = np.quantile(np.concatenate([choose_in, choose_out]), [0.001, 0.999])
    candidates = np.linspace(float(low), float(high), 60)
    best = max(
        candidates,
        key=lambda level: _epsilon(choose_in, choose_out, float(level), delta, doubt),
    )
    free = _epsilon(judge_in, judge_out, float(best), delta, doubt)
    gaussian = None
    if sampling_rate >= 1.0:
        # Half-way between the two means; fixed before any trial, so that all trials may judge.
        false, missed = _alarms(scores.present, scores.absent, scores.steps / 2, doubt)
        mu = float(stats.norm.isf(false) - stats.norm.ppf(missed))
        gaussian = gaussian_epsilon(max(0.0, mu), delta)
    return Bound(
        epsilon=max(0.0, free),
        epsilon_gaussian=gaussian,
        confidence=confidence,
        trials=len(scores.present) + len(scores.absent),
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The ε at ``delta`` of telling N(0, 1) from N(μ, 1) (Balle & Wang 2018, theorem 8).

    Used for this audit's lower bound only, never for a figure that a release is charged.

    >>> round(gaussian_epsilon(0.25, 1e-5), 2)  # noise multiplier 4, once
    0.93
    """
    if mu <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        return float(
            stats.norm.cdf(mu / 2 - epsilon / mu)
            - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
            - delta
        )

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(optimize.brentq(excess, 0.0, high))


def _epsilon(present: Floats, absent: Floats, level: float, delta: float, doubt: float) -> float:
    """(ε, δ)-DP bounds both errors: 1 − missed ≤ e^ε · false + δ, and the other way round."""
    false, missed = _alarms(present, absent, level, doubt)
    return max(_log_odds(1 - delta - missed, false), _log_odds(1 - delta - false, missed))


def _log_odds(right: float, wrong: float) -> float:
    return math.log(right / wrong) if right > 0 and wrong > 0 else 0.0


def _alarms(present: Floats, absent: Floats, level: float, doubt: float) -> tuple[float, float]:
    """Upper confidence bounds of the rates of false and of missed alarms."""
    return (
        _upper(int((absent > level).sum()), len(absent), doubt / 2),
        _upper(int((present <= level).sum()), len(present), doubt / 2),
    )


def _upper(found: int, trials: int, doubt: float) -> float:
    return 1.0 if found == trials else float(stats.beta.isf(doubt, found + 1, trials - found))


def _answer_itself(answers: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - a loss has both
    """A loss whose gradient in the weights is the record itself."""
    return answers[:, 0]
