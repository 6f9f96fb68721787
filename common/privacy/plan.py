"""One frozen plan gives sampler, clipper, noise and accounting event from the same numbers.

They cannot disagree, because none of them can be set alone. The plan holds public settings only;
what is sensitive (the cohort, its size, the random stream) is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PrivacyError
from common.privacy.accounting import GaussianEvent
from common.privacy.mechanisms import (
    add_gaussian,
    add_gaussians_,
    clip_factors,
    clip_sum,
    poisson_sample,
    poisson_samples,
)
from common.privacy.units import PrivacyUnit, Relation
from common.randomness import Stream


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One private step: sample units, clip each once, sum, add noise, divide by a public number.

    ``sampling_rate``: Poisson probability of each unit.
    ``clip_norm``: largest L2 norm of one unit's contribution.
    ``noise_multiplier``: noise standard deviation over ``clip_norm``; 0 only when ``private`` is
    false, and then nothing is clipped either.
    ``records_per_unit``: at most so many records of one unit enter one step, chosen at random.
    """

    unit: PrivacyUnit
    relation: Relation
    sampling_rate: float
    clip_norm: float
    noise_multiplier: float
    records_per_unit: int
    private: bool = True

    def __post_init__(self) -> None:
        """Refuse a plan that could not keep its promise."""
        if self.private:
            self.event(steps=1)  # validates the rate and the noise
            if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
                raise PrivacyError(
                    f"clip norm: expected a finite number above 0, found {self.clip_norm}"
                )
        if self.records_per_unit < 1:
            raise PrivacyError(
                f"records per unit: expected at least 1, found {self.records_per_unit}"
            )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum, in gradient units."""
        return self.noise_multiplier * self.clip_norm

    def event(self, *, steps: int) -> GaussianEvent:
        """What ``steps`` such steps cost."""
        return GaussianEvent(
            noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate, steps=steps
        )

    def sample(self, stream: Stream, units: int) -> Tensor:
        """Indices of the units in this step, [≤ units]."""
        return poisson_sample(stream, units, self.sampling_rate)

    def sample_each(self, streams: Sequence[Stream], units: Sequence[int]) -> NDArray[np.bool_]:
        """Which units of each of K hospitals are in this step: [Σ units]."""
        return poisson_samples(streams, units, self.sampling_rate)

    def clipped_sum(self, contributions: Tensor) -> Tensor:
        """Sum [d] of per-unit contributions [units, d], each clipped once.

        Sums over parts of a batch add up to the sum over the batch: a large batch is taken in
        chunks, as long as no unit is split over two of them.
        """
        return clip_sum(contributions, self.clip_norm)

    def clip_factors(self, norms: Tensor) -> Tensor:
        """What ``clipped_sum`` scales contributions of these norms [units] by."""
        return clip_factors(norms, self.clip_norm)

    def noised(self, total: Tensor, stream: Stream) -> Tensor:
        """The releasable sum [d]: ``total`` plus this step's noise."""
        return add_gaussian(total, stream, self.noise_std)

    def noised_each_(self, totals: Tensor, streams: Sequence[Stream]) -> Tensor:
        """``totals`` [K, d] made the releasable sums of K hospitals, each with noise of its own."""
        return add_gaussians_(totals, streams, self.noise_std)


def combine_records(gradients: Tensor, owners: Tensor, units: int) -> Tensor:
    """The mean gradient of each unit's records: [records, d] → [units, d].

    ``owners`` [records] names each record's unit in ``0..units-1``. A mean, so that a patient with
    many encounters speaks no louder than one with a single visit; the clip comes after it, once.
    """
    sums = gradients.new_zeros(units, gradients.shape[1])
    sums.index_add_(0, owners, gradients)
    counts = torch.bincount(owners, minlength=units).clamp(min=1)
    return sums / counts[:, None].to(gradients.dtype)
