"""`consilium audit privacy`: does the software do what its privacy statement says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from common.errors import PrivacyError
from common.privacy.accounting import calibrate
from common.privacy.plan import StepPlan
from common.privacy.units import PrivacyUnit, Relation
from common.randomness import NoiseSource, SecretNoise
from simulations.canaries import bound, canary_scores
from simulations.conformance import conformance

DELTA = 1e-5
CONFIDENCE = 0.99
CAVEAT = (
    "A lower bound above the claimed ε proves a fault. A bound below it, even zero, proves "
    "nothing: it only says that this attack found no more. The guarantee rests on the "
    "mathematics, not on this audit."
)
_CANARIES = 1000
_STEPS = 10
_RUNS = 100
_QUICK_RUNS = 12
_SAMPLING_RATES = (1.0, 0.25)


def audit_privacy(
    epsilons: Sequence[float] = (1.0, 3.0, 8.0),
    *,
    runs: int | None = None,
    quick: bool = False,
    noise: NoiseSource | None = None,
) -> dict[str, Any]:
    """Conformance of the client's real answers, and lower bounds on ε by canaries.

    ``runs``: repetitions per bound, each of 1,000 trials. ``noise``: a test's repeatable source;
    fresh secret noise otherwise. ``passed`` is true when every check passes, every bound stays at
    or under its claim, and the same attack sees through noise halved on purpose.

    Raises PrivacyError for an ε or a number of runs that cannot be audited.
    """
    repetitions = runs if runs is not None else (_QUICK_RUNS if quick else _RUNS)
    if repetitions < 2:
        raise PrivacyError(f"runs: expected at least 2, found {repetitions}")
    if not epsilons:
        raise PrivacyError("ε: expected at least one to audit, found none")
    source = noise if noise is not None else SecretNoise.generate()
    checks = conformance(lambda name: _apart(source, name), repeats=5 if quick else 30)
    rows = [
        canary_row(claimed, rate, runs=repetitions, noise=source)
        for rate in (_SAMPLING_RATES[:1] if quick else _SAMPLING_RATES)
        for claimed in epsilons
    ]
    return {
        "passed": all(one.passed for one in checks) and all(row["passed"] for row in rows),
        "conformance": [one.as_dict() for one in checks],
        "canaries": rows,
        "delta": DELTA,
        "confidence": CONFIDENCE,
        "caveat": CAVEAT,
    }


def canary_row(claimed: float, rate: float, *, runs: int, noise: NoiseSource) -> dict[str, Any]:
    """The bounds at a claimed ε, with the right noise and with half of it."""
    plan = claimed_plan(claimed, rate)
    found = _bounds(plan, runs, noise, f"{claimed}/{rate}/whole")
    weak = _bounds(
        replace(plan, noise_multiplier=plan.noise_multiplier / 2),
        runs,
        noise,
        f"{claimed}/{rate}/half",
    )
    kept = max(found["epsilon_low"], found["epsilon_low_gaussian"] or 0.0) <= claimed
    # Poisson sampling has no exact conversion; without one the attack is too weak to be a control.
    seen = weak["epsilon_low_gaussian"] is None or weak["epsilon_low_gaussian"] > claimed
    return {
        "claimed": claimed,
        "sampling_rate": rate,
        "steps": _STEPS,
        "noise_multiplier": plan.noise_multiplier,
        **found,
        "halved": weak,
        "passed": kept and seen,
    }


def claimed_plan(claimed: float, rate: float) -> StepPlan:
    """The plan that spends ``claimed`` at ``DELTA`` over the audit's steps."""
    plan = StepPlan(
        unit=PrivacyUnit.PATIENT,
        relation=Relation.ADD_REMOVE,
        sampling_rate=rate,
        clip_norm=0.7,
        noise_multiplier=1.0,
        records_per_unit=1,
    )
    noise_multiplier = calibrate(
        lambda multiplier: [replace(plan, noise_multiplier=multiplier).event(steps=_STEPS)],
        epsilon=claimed,
        delta=DELTA,
        relation=plan.relation,
    )
    return replace(plan, noise_multiplier=noise_multiplier)


def render(audit: dict[str, Any]) -> list[Table | str]:
    """The audit for a person: two tables, the verdict, and what it does not prove."""
    checks = Table(title="Conformance of the client's answers", title_justify="left")
    for name in ("check", "expected", "found", "", "how"):
        checks.add_column(name)
    for one in audit["conformance"]:
        checks.add_row(
            one["name"],
            f"{one['expected']:.4g}",
            f"{one['found']:.4g}",
            "ok" if one["passed"] else "FAILED",
            one["note"],
        )
    bounds = Table(
        title=f"Lower bounds on ε by canaries, {audit['confidence']:.0%} confidence, "
        f"δ = {audit['delta']:g}",
        title_justify="left",
    )
    for name in ("claimed ε", "rate", "bound", "Gaussian bound", "with noise halved", ""):
        bounds.add_column(name)
    for row in audit["canaries"]:
        halved = row["halved"]
        bounds.add_row(
            f"{row['claimed']:g}",
            f"{row['sampling_rate']:g}",
            f"{row['epsilon_low']:.2f}",
            _shown(row["epsilon_low_gaussian"]),
            _shown(halved["epsilon_low_gaussian"] or halved["epsilon_low"]),
            "ok" if row["passed"] else "FAILED",
        )
    verdict = "No fault found." if audit["passed"] else "FAULT FOUND: do not release anything."
    return [
        checks,
        bounds,
        "The bound assumes nothing about the noise; the Gaussian bound reads the same alarms as a "
        "Gaussian mechanism's, exact where every unit takes part in every step (rate 1).",
        f"{verdict} {audit['caveat']}",
    ]


def _bounds(plan: StepPlan, runs: int, noise: NoiseSource, label: str) -> dict[str, Any]:
    scores = canary_scores(
        plan, steps=_STEPS, runs=runs, canaries=_CANARIES, noise=noise, label=label
    )
    low = bound(scores, sampling_rate=plan.sampling_rate, delta=DELTA, confidence=CONFIDENCE)
    return {
        "epsilon_low": low.epsilon,
        "epsilon_low_gaussian": low.epsilon_gaussian,
        "trials": low.trials,
    }


def _apart(source: NoiseSource, name: str) -> NoiseSource:
    """A hospital's own source, under a key of its own."""
    return SecretNoise(source.stream("audit hospital", name).uniform(4).tobytes())


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
