"""Clip, sum, noise: the only road by which patients' data become a release.

Every function is pure and takes its randomness as an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.randomness import Stream


def poisson_sample(stream: Stream, units: int, rate: float) -> Tensor:
    """The indices of the units drawn, each independently with probability ``rate``; may be empty.

    True Poisson sampling on exactly ``rate``: shuffled batches have another (worse) guarantee.
    """
    if rate >= 1.0:
        return torch.arange(units)
    return torch.from_numpy((stream.uniform(units) < rate).nonzero()[0])


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """What each contribution of norm ``norms`` [units] is scaled by: at most ``clip_norm`` remains.

    A norm that is not finite gets 0: that contribution is dropped.
    """
    factors = clip_norm / norms.clamp(min=clip_norm)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(norms))


def clip_sum(contributions: Tensor, clip_norm: float) -> Tensor:
    """Sum of ``contributions`` [units, d] after scaling each to L2 norm at most ``clip_norm``.

    A contribution that is not finite counts as zero: dropping it changes the sum by no more than
    ``clip_norm``, so the sensitivity holds for every possible record. No rows give a zero sum.
    Adding or removing one unit moves the result by at most ``clip_norm`` (Abadi et al. 2016,
    algorithm 1).
    """
    norms = torch.linalg.vector_norm(contributions, dim=1)
    # A norm overflows to infinity before its entries do; both are dropped alike.
    sound = torch.isfinite(norms)[:, None]
    finite = torch.where(sound, contributions, torch.zeros_like(contributions))
    return clip_factors(norms, clip_norm) @ finite


def add_gaussian(total: Tensor, stream: Stream, noise_std: float) -> Tensor:
    """``total`` [d] plus independent N(0, ``noise_std``²) in every coordinate.

    The noise is drawn and added in float64 and only then rounded to ``total``'s precision:
    rounding the noised value is post-processing, whereas noise drawn in float32 has gaps that
    single out some inputs (Mironov 2012).
    """
    noise = torch.from_numpy(stream.normal(total.numel())).mul_(noise_std)
    return noise.add_(total.double()).to(total.dtype)
