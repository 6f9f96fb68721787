"""A study's whole budget: one noise multiplier, calibrated so that all stages together keep ε.

Two sets of patients pay, each from a budget of its own: those the model is trained on
(:func:`budget_of`), and those it is tested on (:func:`evaluation_budget_of`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from common.errors import PrivacyError
from common.features import moment_norm
from common.privacy.accounting import (
    Event,
    GaussianEvent,
    calibrate,
    epsilon,
    library_epsilon,
)
from common.privacy.plan import StepPlan
from common.privacy.skellam_gaussian import LARGEST_DISTANCE, delta_slack
from common.privacy.units import Relation, Trust
from common.stages import DistillSpec, FinetuneSpec
from common.study import PrivacySpec, Study

# Two implementations of the same pessimistic bound, on different grids.
_AGREEMENT = 0.01
_NUDGE = 5e-4


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one stage costs every patient of its cohort: ``releases`` noised steps of ``plan``."""

    stage: str
    plan: StepPlan
    rounds: int
    steps_per_round: int

    def events(self, rounds: int | None = None) -> tuple[Event, ...]:
        """The events of the first ``rounds`` rounds (all by default)."""
        count = self.rounds if rounds is None else rounds
        steps = count * self.steps_per_round
        return (self.plan.event(steps=steps),) if self.plan.private and steps else ()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The charges of one set of patients, stage by stage in their order; empty stages cost nothing.

    ``spare``: what failed attempts at secure sums may cost besides, budgeted beforehand.
    ``distance``: the part of ``delta`` set aside for noise that is only nearly Gaussian.
    """

    charges: tuple[Charge, ...]
    relation: Relation
    epsilon: float | None
    delta: float | None
    spare: tuple[Charge, ...] = ()
    distance: float = 0.0

    def charge(self, stage: str) -> Charge:
        """The charge of ``stage``; a KeyError is our bug."""
        for one in self.charges:
            if one.stage == stage:
                return one
        raise KeyError(stage)

    @property
    def noise_multiplier(self) -> float:
        """The calibrated noise multiplier of the training stages; 0 without privacy."""
        return self.charge("finetune").plan.noise_multiplier

    def spent(self, stage: str, rounds: int) -> float | None:
        """ε after ``rounds`` rounds of ``stage`` and all stages before it; None without privacy."""
        if self.delta is None:
            return None
        events: list[Event] = []
        for one in self.charges:
            if one.stage == stage:
                events += one.events(rounds)
                delta = self.delta - self.distance
                return epsilon(events, delta=delta, relation=self.relation)
            events += one.events()
        raise KeyError(stage)

    def total(self) -> float | None:
        """ε of all charges, spare ones included; never above ``epsilon``."""
        if self.delta is None:
            return None
        delta = self.delta - self.distance
        return epsilon(self.events(), delta=delta, relation=self.relation)

    def verified_total(self) -> float | None:
        """The larger of our ε and ``dp-accounting``'s; raises PrivacyError where they disagree."""
        ours = self.total()
        if ours is None or self.delta is None:
            return None
        delta = self.delta - self.distance
        theirs = library_epsilon(self.events(), delta=delta, relation=self.relation)
        if abs(ours - theirs) > _AGREEMENT * ours:
            raise PrivacyError(
                f"ε of the study: expected two accountants to agree within {_AGREEMENT:.0%}, "
                f"found {ours:.6g} and {theirs:.6g}; no statement is made"
            )
        return max(ours, theirs)

    def events(self) -> list[Event]:
        """All that is charged, spare attempts included."""
        return [event for one in (*self.charges, *self.spare) for event in one.events()]


@lru_cache(maxsize=256)
def budget_of(study: Study) -> Budget:
    """The study's budget, computed alike by every hospital and the coordinator from the study.

    A hospital takes σ from here, never from a message.
    """
    return _budget(
        study.privacy,
        study.finetune,
        study.distill,
        moment_norm(study.dictionary) if study.scaling == "private" else None,
    )


@lru_cache(maxsize=256)
def _budget(
    privacy: PrivacySpec,
    finetune: FinetuneSpec,
    distill: DistillSpec,
    statistics_norm: float | None,
) -> Budget:
    private = privacy.trust is not Trust.NONE
    blank = _blank_plan(privacy)
    charges = []
    if statistics_norm is not None:
        charges.append(
            Charge(
                stage="statistics",
                rounds=1,
                steps_per_round=1,
                plan=replace(blank, clip_norm=statistics_norm),
            )
        )
    charges.append(
        Charge(
            stage="finetune",
            rounds=finetune.rounds,
            steps_per_round=finetune.local_steps,
            plan=replace(blank, sampling_rate=finetune.sampling_rate),
        )
    )
    if distill.on == "patients":
        charges.append(
            Charge(
                stage="distill",
                rounds=distill.rounds,
                steps_per_round=distill.local_steps,
                plan=replace(blank, sampling_rate=distill.sampling_rate),
            )
        )
    if not private:
        return Budget(charges=tuple(charges), relation=privacy.relation, epsilon=None, delta=None)

    share = privacy.statistics_share
    # Squared signal-to-noise of the training stages at noise multiplier 1; small rates add ~ q².
    training = sum(
        one.rounds * one.steps_per_round * one.plan.sampling_rate**2
        for one in charges
        if one.stage != "statistics"
    )

    def at(noise_multiplier: float) -> tuple[Charge, ...]:
        statistics = noise_multiplier / math.sqrt(training * share / (1 - share))
        return tuple(
            replace(
                one,
                plan=replace(
                    one.plan,
                    noise_multiplier=statistics if one.stage == "statistics" else noise_multiplier,
                ),
            )
            for one in charges
        )

    def spare_at(charges: tuple[Charge, ...]) -> tuple[Charge, ...]:
        # Of the training stages, whichever fails: the one that samples more patients costs more.
        trained = [one for one in charges if one.stage != "statistics"]
        worst = max(trained, key=lambda one: one.plan.sampling_rate)
        # The statistics have noise of their own, so that neither is sure to cost more: both.
        scaled = [one for one in charges if one.stage == "statistics"]
        return _spare((worst, *scaled), privacy.spare_attempts)

    assert privacy.epsilon is not None  # noqa: S101
    return _whole(privacy, privacy.epsilon, lambda noise: (at(noise), spare_at(at(noise))))


@lru_cache(maxsize=256)
def evaluation_budget_of(study: Study) -> Budget | None:
    """What the released histogram costs the test patients; None if the study grants nothing.

    A patient adds at most 1 in all, so the clip norm is 1 (see ``score_histogram``).
    """
    if study.evaluation.epsilon is None:
        return None
    return _evaluation_budget(study.privacy, study.evaluation.epsilon)


def stage_charge(study: Study, stage: str) -> Charge:
    """The charge of ``stage``, whoever pays it; raises KeyError where the study charges none."""
    testing = evaluation_budget_of(study)
    budget = testing if testing is not None and stage == "evaluate" else budget_of(study)
    return budget.charge(stage)


def evaluation_charge(study: Study) -> Charge | None:
    """The charge of the released histogram; None if the study grants nothing."""
    budget = evaluation_budget_of(study)
    return None if budget is None else budget.charge("evaluate")


@lru_cache(maxsize=256)
def _evaluation_budget(privacy: PrivacySpec, target: float) -> Budget:
    charge = Charge(
        stage="evaluate",
        rounds=1,
        steps_per_round=1,
        plan=replace(_blank_plan(privacy), clip_norm=1.0),
    )

    def at(noise_multiplier: float) -> tuple[Charge, ...]:
        plan = replace(charge.plan, noise_multiplier=noise_multiplier)
        return (replace(charge, plan=plan),)

    if not charge.plan.private:
        return Budget(charges=(charge,), relation=privacy.relation, epsilon=None, delta=None)
    spare = privacy.spare_attempts
    return _whole(privacy, target, lambda noise: (at(noise), _spare(at(noise), spare)))


def _blank_plan(privacy: PrivacySpec) -> StepPlan:
    """A step on all patients, whose noise is yet to be found."""
    private = privacy.trust is not Trust.NONE
    return StepPlan(
        unit=privacy.unit,
        relation=privacy.relation,
        sampling_rate=1.0,
        clip_norm=privacy.clip_norm,
        noise_multiplier=1.0 if private else 0.0,
        records_per_unit=privacy.records_per_patient if privacy.unit == "patient" else 1,
        private=private,
    )


def _spare(charges: tuple[Charge, ...], attempts: int) -> tuple[Charge, ...]:
    """What ``attempts`` more rounds of each charge cost."""
    return tuple(
        replace(one, stage=f"failed attempts ({one.stage})", rounds=attempts)
        for one in charges
        if attempts
    )


def _whole(
    privacy: PrivacySpec,
    target: float,
    at: Callable[[float], tuple[tuple[Charge, ...], tuple[Charge, ...]]],
) -> Budget:
    """The budget with the least noise that keeps (``target``, δ).

    ``at(noise_multiplier)``: the charges and the spare ones at that noise.
    """
    charges, spare = at(1.0)
    distance = _distance(privacy, target, (*charges, *spare))
    assert privacy.delta is not None  # noqa: S101
    noise = _calibrated(
        lambda noise: [event for part in at(noise) for one in part for event in one.events()],
        epsilon=target,
        delta=privacy.delta - distance,
        relation=privacy.relation,
    )
    charges, spare = at(noise)
    return Budget(
        charges=charges,
        relation=privacy.relation,
        epsilon=target,
        delta=privacy.delta,
        spare=spare,
        distance=distance,
    )


def _distance(privacy: PrivacySpec, epsilon: float, charges: Iterable[Charge]) -> float:
    """What to set aside of δ: Skellam noise is charged as the Gaussian it is so near to."""
    if privacy.trust is not Trust.DISTRIBUTED:
        return 0.0
    releases = sum(one.rounds for one in charges)
    distance = delta_slack(epsilon=epsilon, distance=LARGEST_DISTANCE, releases=releases)
    assert privacy.delta is not None  # noqa: S101
    if distance >= privacy.delta:
        raise PrivacyError(f"δ = {privacy.delta:g} is too small for {releases} secure sums")
    return distance


def _calibrated(
    events_at: Callable[[float], list[GaussianEvent]],
    *,
    epsilon: float,
    delta: float,
    relation: Relation,
) -> float:
    """The least noise multiplier with which both accountants find ``epsilon`` kept."""
    noise = calibrate(events_at, epsilon=epsilon, delta=delta, relation=relation)
    # Their grids differ by a hair.
    while library_epsilon(events_at(noise), delta=delta, relation=relation) > epsilon:
        noise *= 1 + _NUDGE
    return noise
