"""Clip, sum, noise: the only road by which patients' data become a release.

Every function takes its randomness as an argument, and is pure unless its name ends in ``_``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.randomness import Stream, normal_blocks, uniforms


def poisson_sample(stream: Stream, units: int, rate: float) -> Tensor:
    """The indices of the units drawn, each independently with probability ``rate``; may be empty.

    True Poisson sampling on exactly ``rate``: shuffled batches have another (worse) guarantee.
    """
    return torch.from_numpy(np.flatnonzero(poisson_samples([stream], [units], rate)))


def poisson_samples(
    streams: Sequence[Stream], units: Sequence[int], rate: float
) -> NDArray[np.bool_]:
    """Whether each unit is drawn, by the stream of its hospital; one hospital after another."""
    if rate >= 1.0:
        return np.ones(sum(units), dtype=bool)
    return uniforms(streams, units) < rate


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """What each contribution of norm ``norms`` [units] is scaled by: at most ``clip_norm`` remains.

    A norm that is not finite gets 0: that contribution is dropped. So is one so large that its
    factor has lost digits (is subnormal), with which it would stay longer than ``clip_norm``.
    """
    factors = clip_norm / norms.clamp(min=clip_norm)
    exact = torch.isfinite(norms) & (factors >= torch.finfo(factors.dtype).tiny)
    return torch.where(exact, factors, torch.zeros_like(norms))


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
    """``total`` [d] plus independent N(0, ``noise_std``²) in every coordinate."""
    return add_gaussians_(total[None].clone(), [stream], noise_std)[0]


def add_gaussians_(totals: Tensor, streams: Sequence[Stream], noise_std: float) -> Tensor:
    """Adds the noise of its own stream to each of ``totals`` [K, d], in place.

    The noise is drawn and added in float64 and only then rounded to the precision of ``totals``:
    rounding the noised value is post-processing, whereas noise drawn in float32 has gaps that
    single out some inputs (Mironov 2012).
    """
    released = totals.numpy()
    for rows, columns, noise in normal_blocks(streams, totals.shape[1], noise_std):
        np.add(noise, released[rows, columns], out=noise)
        np.copyto(released[rows, columns], noise, casting="same_kind")
    return totals
