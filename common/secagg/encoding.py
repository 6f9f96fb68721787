"""Real vectors as integers modulo 2³², with a range proven to hold every sum.

A unit's contribution (a patient's gradient, or a hospital's whole update) is clipped to an L2
norm, multiplied by a public scale and rounded to integers. A hospital adds its units' integers
exactly, limits every coordinate to its share of the range, adds its noise, and masks.

What rounding does to the sensitivity, in integer units with s the scale, C the clip norm and d the
length:

* ``nearest``: each coordinate moves by at most 1/2, so Δ₂ ≤ s·C + √d/2, always. The error of the
  decoded sum is at most 1/(2s) a unit and coordinate, and biased below that.
* ``stochastic``: up or down at random, without bias; conditional on Kairouz, Liu & Steinke 2021,
  "The distributed discrete Gaussian mechanism" (ICML), proposition 22:
  Δ₂² ≤ min(s²C² + d/4 + √(2·log(1/β))·(s·C + √d/2), (s·C + √d)²). Each unit is rounded again
  until it keeps that bound; a try fails with probability at most β.

An integer vector also has Δ₁ ≤ min(√d·Δ₂, Δ₂²). No randomised Hadamard transform is applied: it
serves to fit a vector into few bits, and 32 are sent anyway.

Weights and patient counts have no field here. Whatever must be weighted is weighted before it is
clipped; a count that must be summed is one more coordinate, clipped, noised and masked like the
rest.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError, SecAggError
from common.privacy.accounting import GaussianEvent
from common.privacy.skellam import share_variance, skellam
from common.privacy.skellam_gaussian import gaussian_equivalent
from common.randomness import Stream

Rounding = Literal["nearest", "stochastic"]
_RANGE = 2**31 - 1
# Room for the noise of all coordinates of one release, but for this probability.
_TAIL_BITS = 64
# Far less would underflow; real noise is counted in thousands.
_SMALLEST_VARIANCE = 2.0**-10
_BETA = math.exp(-0.5)
_PIECE = 2**16
# Rounding error of norms and products in float64 stays far below this fraction.
_FLOAT_SLACK = 2.0**-30


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How one release is turned into integers, noised and decoded.

    ``length``: coordinates. ``clip_norm``: largest L2 norm of one unit. ``scale``: integers per 1.
    ``hospitals``, ``threshold``, ``colluders``: as in ``Terms``. ``noise_multiplier``: standard
    deviation of the noise in the sum of the honest survivors, over ``l2_sensitivity``; 0 for none.
    """

    length: int
    clip_norm: float
    scale: float
    hospitals: int
    threshold: int
    colluders: int
    noise_multiplier: float
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        """Refuse an encoding whose sum could wrap, or whose noise has no sense."""
        for name in ("clip_norm", "scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise SecAggError(f"{name}: expected a finite number above 0")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyError(
                f"noise multiplier: expected 0 or more, found {self.noise_multiplier}"
            )
        if not (self.length >= 1 and 1 <= self.threshold <= self.hospitals):
            raise SecAggError("encoding: expected a length and a threshold of at least 1")
        if self.noise_multiplier and self.variance < _SMALLEST_VARIANCE:
            raise PrivacyError(
                f"noise: a variance of {self.variance:.3g} integers is too little to be noise; "
                f"use a larger scale or noise multiplier"
            )
        share_variance(self.variance, threshold=self.threshold, colluders=self.colluders)
        one_unit = math.ceil(self.scale * self.clip_norm) + 1
        if self.signal_bound < one_unit:
            raise SecAggError(
                f"range: {self.hospitals} hospitals of noise leave {max(0, self.signal_bound)} of "
                f"2³¹ for each, one unit needs {one_unit}; choose a smaller scale"
            )

    @property
    def l2_sensitivity(self) -> float:
        """Largest L2 norm of one unit's integers."""
        clipped, root = self.scale * self.clip_norm, math.sqrt(self.length)
        if self.rounding == "nearest":
            return clipped + root / 2
        spread = math.sqrt(-2 * math.log(_BETA)) * (clipped + root / 2)
        return min(math.sqrt(clipped**2 + self.length / 4 + spread), clipped + root)

    @property
    def l1_sensitivity(self) -> float:
        """Largest L1 norm of one unit's integers."""
        return min(math.sqrt(self.length) * self.l2_sensitivity, self.l2_sensitivity**2)

    @property
    def variance(self) -> float:
        """Variance of the noise that the guarantee counts on, in integer units."""
        return (self.noise_multiplier * self.l2_sensitivity) ** 2

    def noise_std(self, survivors: int) -> float:
        """Standard deviation of the noise in the decoded sum of ``survivors`` honest hospitals."""
        share = share_variance(self.variance, threshold=self.threshold, colluders=self.colluders)
        return math.sqrt(survivors * share) / self.scale

    @cached_property
    def noise_bound(self) -> int:
        """No coordinate of a hospital's noise is larger, but for a probability of 2⁻⁶⁴ a release.

        Chernoff's bound for Sk(v): log P(X ≥ τ) ≤ √(v² + τ²) - v - τ·arsinh(τ/v); both signs, all
        hospitals and coordinates.
        """
        if not self.variance:
            return 0
        v = share_variance(self.variance, threshold=self.threshold, colluders=self.colluders)
        goal = -(_TAIL_BITS * math.log(2) + math.log(2 * self.length * self.hospitals))

        def exponent(tau: float) -> float:
            # √(v² + τ²) - v without cancellation.
            return tau * tau / (math.hypot(v, tau) + v) - tau * math.asinh(tau / v)

        low, high = 0.0, 1.0
        while exponent(high) > goal:
            low, high = high, 2 * high
        while high - low > 1e-6 * high + 0.5:
            middle = (low + high) / 2
            low, high = (low, middle) if exponent(middle) <= goal else (middle, high)
        return math.ceil(high)

    @property
    def input_bound(self) -> int:
        """Largest absolute value a hospital may mask: hospitals · input_bound < 2³¹."""
        return _RANGE // self.hospitals

    @property
    def signal_bound(self) -> int:
        """Largest absolute value of a hospital's integers before noise."""
        return self.input_bound - self.noise_bound

    def charge(self, *, sampling_rate: float = 1.0, steps: int = 1) -> tuple[GaussianEvent, float]:
        """What ``steps`` noised sums cost: a Gaussian event, and the distance it leaves out.

        (1 + e^ε) times the distance is to be added to δ; see ``common.privacy.skellam_gaussian``.
        Raises PrivacyError when the noise is too coarse; then ``skellam_accounting`` applies.
        """
        found = gaussian_equivalent(self.variance, length=self.length)
        event = GaussianEvent(
            noise_multiplier=found.std / self.l2_sensitivity,
            sampling_rate=sampling_rate,
            steps=steps,
        )
        return event, found.distance * steps

    @property
    def digest(self) -> bytes:
        """SHA-256 of all fields: ``Terms.plan``."""
        numbers = struct.pack(
            ">QddQQQd",
            self.length, self.clip_norm, self.scale, self.hospitals, self.threshold,
            self.colluders, self.noise_multiplier,
        )  # fmt: skip
        text = f"consilium-secagg-encoding-v1 {self.rounding}".encode()
        return hashlib.sha256(text + numbers).digest()

    @classmethod
    def fitting(
        cls,
        *,
        length: int,
        clip_norm: float,
        units: int,
        hospitals: int,
        threshold: int,
        colluders: int,
        noise_multiplier: float,
        rounding: Rounding = "nearest",
    ) -> Encoding:
        """The encoding with the largest useful power of two as its scale.

        ``noise_multiplier``: the least that ``charge`` shall name; the encoding's own is a hair
        above it. ``units``: most units a hospital is expected to sum; beyond, single coordinates
        may be limited. The scale is not raised further once rounding widens the sensitivity by
        less than 0.1 % and the noise is fine enough to be charged as Gaussian.
        """

        def at(power: int) -> Encoding:
            return cls(
                length=length, clip_norm=clip_norm, scale=2.0**power, hospitals=hospitals,
                threshold=threshold, colluders=colluders, noise_multiplier=noise_multiplier,
                rounding=rounding,
            )  # fmt: skip

        fine = 1000 * math.sqrt(length)
        if noise_multiplier:
            fine = max(fine, 2**12 * length**0.25 / noise_multiplier)
        finest = math.ceil(math.log2(fine / clip_norm))
        for power in range(finest, finest - 40, -1):
            try:
                encoding = at(power)
            except SecAggError:
                continue
            if encoding.signal_bound >= units * (encoding.scale * clip_norm + 1):
                return encoding._charged_at_least(noise_multiplier)
        raise SecAggError(
            f"range: {hospitals} hospitals with {units} units each do not fit into 32 bits"
        )

    def _charged_at_least(self, noise_multiplier: float) -> Encoding:
        if not noise_multiplier:
            return self
        found = self
        while (charged := found.charge()[0].noise_multiplier) < noise_multiplier:
            more = noise_multiplier / charged * (1 + 1e-6)
            found = replace(found, noise_multiplier=found.noise_multiplier * more)
        return found

    def encode(
        self, units: NDArray[np.floating], stream: Stream | None = None
    ) -> NDArray[np.int64]:
        """Sum [length] of the integers of ``units`` [count, length], each clipped and rounded.

        A unit that is not finite counts as zero. ``stream`` is needed for stochastic rounding.
        Sums over parts of a batch add up. Memory: a few rows at a time.
        """
        if units.ndim != 2 or units.shape[1] != self.length:
            raise ValueError(f"expected units [count, {self.length}], found {units.shape}")
        total = np.zeros(self.length, dtype=np.int64)
        rows = max(1, _PIECE // self.length)
        for start in range(0, len(units), rows):
            scaled = self._clipped(units[start : start + rows])
            total += self._rounded(scaled, stream).sum(axis=0)
        return total

    def finish(self, total: NDArray[np.int64], noise: Stream | None) -> NDArray[np.int32]:
        """The vector to mask: ``total`` limited to ``signal_bound``, plus this hospital's noise.

        Limiting a coordinate never moves two sums further apart, so the sensitivity holds.
        """
        vector = np.empty(self.length, dtype="<i4")
        for start in range(0, self.length, _PIECE):
            piece = slice(start, start + _PIECE)
            limited = np.clip(total[piece], -self.signal_bound, self.signal_bound)
            vector[piece] = self._noised(limited, noise)
        return vector

    def release(self, update: NDArray[np.floating], noise: Stream | None) -> NDArray[np.int32]:
        """The vector to mask, of a single unit ``update`` [length] with nearest rounding.

        Equal to ``finish(encode(update[None]), noise)`` in a third of the memory.
        """
        if self.rounding != "nearest" or update.shape != (self.length,):
            raise ValueError(f"expected nearest rounding and one update [{self.length}]")
        pieces = [slice(at, at + _PIECE) for at in range(0, self.length, _PIECE)]
        room = np.empty(min(_PIECE, self.length))
        squares = math.fsum(_square(update[piece], room) for piece in pieces)
        factor = float(self._factors(np.array([squares]))[0])
        vector = np.empty(self.length, dtype="<i4")
        for piece in pieces:
            scaled = room[: len(update[piece])]
            if factor:
                np.multiply(update[piece], factor, out=scaled, dtype=np.float64)
            else:
                scaled[:] = 0
            # One unit is clipped to far less than ``signal_bound``: see ``__post_init__``.
            np.rint(scaled, out=scaled)
            vector[piece] = self._noised(scaled, noise)
        return vector

    def decode(self, values: NDArray[np.int32]) -> NDArray[np.float64]:
        """The noised real sum [length] of an aggregate."""
        return np.asarray(values, dtype=np.float64) / self.scale

    def _clipped(self, units: NDArray[np.floating]) -> NDArray[np.float64]:
        """``units`` in integer units, each of norm at most scale · clip_norm."""
        factors = self._factors(_squares(units))
        wide = units.astype(np.float64)
        wide[factors == 0] = 0.0
        wide *= factors[:, None]
        return wide

    def _factors(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """What to multiply units of these squared norms by; 0 for one that is not finite."""
        limit = self.clip_norm * (1 - _FLOAT_SLACK)
        norms = np.sqrt(np.where(np.isfinite(squares), squares, 0.0))
        factors = self.scale * limit / np.maximum(norms, limit)
        return np.where(np.isfinite(squares), factors, 0.0)

    def _noised(self, limited: NDArray[Any], noise: Stream | None) -> NDArray[Any]:
        """``limited``, integers within ``signal_bound``, plus noise, in place; exact in float64."""
        if not self.noise_multiplier:
            return limited
        if noise is None:
            raise ValueError("the encoding has noise: a secret stream is needed")
        share = share_variance(self.variance, threshold=self.threshold, colluders=self.colluders)
        limited += skellam(noise, len(limited), share)
        # Beyond it with probability below 2⁻⁶⁴ only; the limit then keeps the sum from wrapping.
        np.clip(limited, -self.input_bound, self.input_bound, out=limited)
        return limited

    def _rounded(self, scaled: NDArray[np.float64], stream: Stream | None) -> NDArray[np.int64]:
        if self.rounding == "nearest":
            return np.rint(scaled).astype(np.int64)
        if stream is None:
            raise ValueError("stochastic rounding needs a stream")
        rounded = np.empty(scaled.shape, dtype=np.float64)
        left = np.arange(len(scaled))
        while len(left):
            uniform = stream.uniform(len(left) * self.length).reshape(len(left), self.length)
            tried = np.floor(scaled[left] + uniform)
            rounded[left] = tried
            squares = np.einsum("ij,ij->i", tried, tried)
            left = left[squares > self.l2_sensitivity**2 * (1 - _FLOAT_SLACK)]
        return rounded.astype(np.int64)


def _square(part: NDArray[np.floating], room: NDArray[np.float64]) -> float:
    """Sum of squares, in float64, by way of ``room``."""
    wide = room[: len(part)]
    np.copyto(wide, part)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(wide, wide))


def _squares(units: NDArray[np.floating]) -> NDArray[np.float64]:
    """Squared L2 norm of each row, in float64; not finite where a value is, or is too large."""
    wide = units.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.einsum("ij,ij->i", wide, wide))
