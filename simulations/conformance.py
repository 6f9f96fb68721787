"""Does a hospital's real answer keep to its plan? Each check can fail, and says by how much.

Everything goes through ``client.rounds.train`` on made-up patients; nothing is computed twice in
the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from common.privacy import plan as plan_module
from common.privacy.accounting import GaussianEvent, epsilon
from common.privacy.budget import budget_of
from common.randomness import NoiseSource, SeededNoise
from common.study import Study
from common.tables import Table
from server.statement import privacy_statement
from simulations.made_up import (
    PATIENTS,
    joined,
    made_up_hospital,
    made_up_study,
    made_up_table,
    real_update,
    rows_of,
)

# A sound release fails a check with this probability.
_SIGNIFICANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: what was measured, what was expected, and whether they agree."""

    name: str
    passed: bool
    expected: float
    found: float
    note: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "passed": self.passed,
            "expected": self.expected,
            "found": self.found,
            "note": self.note,
        }


@dataclass
class Performed:
    """What the mechanisms were really asked to do, overheard below the plan."""

    noise_std: list[float] = field(default_factory=list)
    clip_norm: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)

    def events(self) -> list[GaussianEvent]:
        """One event a step; a step whose parts do not match is no step."""
        if not len(self.noise_std) == len(self.rate):
            raise ValueError(f"{len(self.rate)} samples, {len(self.noise_std)} noises")
        # The weakest clip of a run bounds the sensitivity of each of its steps.
        bound = max(self.clip_norm)
        return [
            GaussianEvent(noise_multiplier=noise / bound, sampling_rate=rate)
            for noise, rate in zip(self.noise_std, self.rate, strict=True)
        ]


def conformance(noise_of: Callable[[str], NoiseSource], *, repeats: int) -> list[Check]:
    """All checks; ``repeats`` requests each. ``noise_of(hospital)`` gives its noise source."""
    return [
        noise_variance(noise_of, repeats),
        *distinct_noise(noise_of),
        clipping(),
        *sampling(noise_of, repeats),
        replay(noise_of),
    ]


def noise_variance(noise_of: Callable[[str], NoiseSource], repeats: int) -> Check:
    """The same round asked twice differs by two noises: χ² over all coordinates."""
    study = made_up_study()
    hospital = made_up_hospital(study, "north", noise_of("north"))
    updates = [real_update(hospital, attempt=one) for one in range(2 * repeats)]
    scaled = [_difference(study, one, other) for one, other in _pairs(updates)]
    values = torch.cat(scaled).double()
    statistic, count = float(values.square().sum()), values.numel()
    return Check(
        name="noise variance",
        passed=_plausible(float(stats.chi2.sf(statistic, count))),
        expected=1.0,
        found=statistic / count,
        note=f"variance over the plan's, {count} draws, chi-square",
    )


def distinct_noise(noise_of: Callable[[str], NoiseSource]) -> list[Check]:
    """Hospitals with equal patients, and rounds of one hospital, share no noise."""
    study = made_up_study()
    north, south = (made_up_hospital(study, name, noise_of(name)) for name in ("north", "south"))
    noises = {
        name: _difference(
            study, real_update(one, attempt=0, round=at), real_update(one, attempt=1, round=at)
        )
        for name, one, at in (("north", north, 0), ("south", south, 0), ("later", north, 1))
    }
    checks = []
    for name, other in (("hospitals", "south"), ("rounds", "later")):
        pair = torch.stack([noises["north"], noises[other]]).double()
        correlation = float(torch.corrcoef(pair)[0, 1])
        limit = float(stats.norm.isf(_SIGNIFICANCE / 2)) / pair.shape[1] ** 0.5
        checks.append(
            Check(
                name=f"distinct noise between {name}",
                passed=abs(correlation) < limit,
                expected=0.0,
                found=correlation,
                note=f"correlation over {pair.shape[1]} coordinates, at most {limit:.3f}",
            )
        )
    return checks


def clipping() -> Check:
    """The most that one adversarial patient moves the sum below the noise, in clip norms."""
    study = made_up_study()
    table = made_up_table(study, PATIENTS)

    def sum_below_noise(rows: Table) -> Tensor:
        hospital = made_up_hospital(study, "north", SeededNoise(0, "north"), rows)
        with overheard() as performed:
            real_update(hospital, attempt=0)
        return performed.sums[0]

    base = sum_below_noise(table)
    clip_norm = budget_of(study).charge("finetune").plan.clip_norm
    moved = [
        float((sum_below_noise(joined(table, one)) - base).norm()) / clip_norm
        for one in _adversaries(study)
    ]
    return Check(
        name="clipping",
        passed=max(moved) <= 1 + 1e-3,
        expected=1.0,
        found=max(moved),
        note=f"largest of {len(moved)} adversarial patients, in clip norms",
    )


def sampling(noise_of: Callable[[str], NoiseSource], repeats: int) -> list[Check]:
    """Patients are drawn at the plan's rate, and each by itself: batch sizes vary as they must."""
    study = made_up_study(sampling_rate=0.3, local_steps=10)
    hospital = made_up_hospital(study, "north", noise_of("north"))
    with overheard() as performed:
        for attempt in range(repeats):
            real_update(hospital, attempt=attempt)
    rate = budget_of(study).charge("finetune").plan.sampling_rate
    sizes = np.array([len(one) for one in performed.sampled])
    drawn = int(sizes.sum())
    trials = len(sizes) * PATIENTS
    spread = float(((sizes - rate * PATIENTS) ** 2).sum() / (PATIENTS * rate * (1 - rate)))
    return [
        Check(
            name="sampling rate",
            passed=bool(stats.binomtest(drawn, trials, rate).pvalue > _SIGNIFICANCE),
            expected=rate,
            found=drawn / trials,
            note=f"{trials} patients asked, binomial",
        ),
        Check(
            name="independent sampling",
            # Sums of Bernoulli draws are a little less spread than normal ones; χ² is close enough.
            passed=_plausible(float(stats.chi2.sf(spread, len(sizes)))),
            expected=1.0,
            found=spread / len(sizes),
            note="variance of batch sizes over the binomial's (0 for shuffled batches)",
        ),
    ]


def replay(noise_of: Callable[[str], NoiseSource]) -> Check:
    """ε recomputed from what the mechanisms were really asked to do, against the statement."""
    study = made_up_study(sampling_rate=0.3, local_steps=3, distill=True)
    hospital = made_up_hospital(study, "north", noise_of("north"))
    with overheard() as performed:
        for charge in budget_of(study).charges:
            for number in range(charge.rounds):
                real_update(hospital, attempt=0, stage=charge.stage, round=number)
    assert study.privacy.delta is not None  # noqa: S101
    spent = epsilon(performed.events(), delta=study.privacy.delta, relation=study.privacy.relation)
    stated = privacy_statement(study, {"secret_noise": True, "hospitals": ["north"]})
    claimed = float(stated["epsilon_spent"])
    return Check(
        name="budget replay",
        passed=abs(spent - claimed) <= 1e-3 * claimed,
        expected=claimed,
        found=spent,
        note=f"ε of the {len(performed.noise_std)} releases overheard against the statement's",
    )


@contextmanager
def overheard() -> Iterator[Performed]:
    """Listen to the mechanisms below every plan."""
    performed = Performed()
    names = ("add_gaussian", "clip_factors", "clip_sum", "poisson_sample")
    real = {name: getattr(plan_module, name) for name in names}

    def add_gaussian(total: Tensor, stream: Any, noise_std: float) -> Any:
        performed.noise_std.append(noise_std)
        performed.sums.append(total.clone())
        return real["add_gaussian"](total, stream, noise_std)

    def clip_factors(norms: Tensor, clip_norm: float) -> Any:
        performed.clip_norm.append(clip_norm)
        return real["clip_factors"](norms, clip_norm)

    def clip_sum(contributions: Tensor, clip_norm: float) -> Any:
        performed.clip_norm.append(clip_norm)
        return real["clip_sum"](contributions, clip_norm)

    def poisson_sample(stream: Any, units: int, rate: float) -> Any:
        performed.rate.append(rate)
        performed.sampled.append(real["poisson_sample"](stream, units, rate))
        return performed.sampled[-1]

    listeners = (add_gaussian, clip_factors, clip_sum, poisson_sample)
    for name, listener in zip(names, listeners, strict=True):
        setattr(plan_module, name, listener)
    try:
        yield performed
    finally:
        for name in names:
            setattr(plan_module, name, real[name])


def _plausible(probability: float) -> bool:
    return _SIGNIFICANCE / 2 < probability < 1 - _SIGNIFICANCE / 2


def _pairs(updates: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(updates[::2], updates[1::2], strict=True)


def _difference(study: Study, one: Tensor, other: Tensor) -> Tensor:
    """Two updates' difference in units of what two noises make: standard normal."""
    noise_std = budget_of(study).charge("finetune").plan.noise_std / PATIENTS
    return (one - other) / (noise_std * 2**0.5)


def _adversaries(study: Study) -> list[Table]:
    """One patient each: extremes of every sign, absurd values, many records, both outcomes."""
    columns = [one.name for one in study.dictionary.columns]
    made = []
    for records in (1, 40):
        for value in (4.0, -4.0, 1e300, -1e300, float("nan")):
            for label in (0, 1):
                values = {name: np.full(records, value) for name in columns}
                made.append(rows_of(study, values, [label] * records, ["intruder"] * records))
    return made
