"""A study's whole budget: one noise multiplier, calibrated so that all stages together keep ε."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from common.errors import PrivacyError
from common.privacy.accounting import (
    Event,
    GaussianEvent,
    calibrate,
    epsilon,
    library_epsilon,
)
from common.privacy.plan import StepPlan
from common.privacy.skellam_gaussian import LARGEST_DISTANCE
from common.privacy.units import Relation, Trust
from common.study import DistillSpec, FinetuneSpec, PrivacySpec, Study

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
    """The charges of a study, stage by stage in their order; empty stages cost nothing.

    ``spare``: what failed attempts at secure sums may cost besides, budgeted beforehand.
    """

    charges: tuple[Charge, ...]
    relation: Relation
    epsilon: float | None
    delta: float | None
    spare: tuple[Event, ...] = ()

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
                return epsilon(events, delta=self.delta, relation=self.relation)
            events += one.events()
        raise KeyError(stage)

    def total(self) -> float | None:
        """ε of the whole study; never above the study's own."""
        if self.delta is None:
            return None
        return epsilon(self._events(), delta=self.delta, relation=self.relation)

    def verified_total(self) -> float | None:
        """The larger of our ε and ``dp-accounting``'s; raises PrivacyError where they disagree."""
        ours = self.total()
        if ours is None or self.delta is None:
            return None
        theirs = library_epsilon(self._events(), delta=self.delta, relation=self.relation)
        if abs(ours - theirs) > _AGREEMENT * ours:
            raise PrivacyError(
                f"ε of the study: expected two accountants to agree within {_AGREEMENT:.0%}, "
                f"found {ours:.6g} and {theirs:.6g}; no statement is made"
            )
        return max(ours, theirs)

    def _events(self) -> list[Event]:
        return [*(event for one in self.charges for event in one.events()), *self.spare]


def budget_of(study: Study) -> Budget:
    """The study's budget, computed alike by every hospital and the coordinator from the study.

    A hospital takes σ from here, never from a message.
    """
    numeric = sum(column.kind == "numeric" for column in study.dictionary.columns)
    return _budget(
        study.privacy,
        study.finetune,
        study.distill,
        numeric if study.scaling == "private" else None,
    )


@lru_cache(maxsize=256)
def _budget(
    privacy: PrivacySpec, finetune: FinetuneSpec, distill: DistillSpec, scaled_columns: int | None
) -> Budget:
    private = privacy.trust is not Trust.NONE
    blank = StepPlan(
        unit=privacy.unit,
        relation=privacy.relation,
        sampling_rate=1.0,
        clip_norm=privacy.clip_norm,
        noise_multiplier=1.0 if private else 0.0,
        records_per_unit=privacy.records_per_patient if privacy.unit == "patient" else 1,
        private=private,
    )
    charges = []
    if scaled_columns is not None:
        # A record's three bounded numbers per column: value, square, presence; each at most 1.
        bound = math.sqrt(3 * max(1, scaled_columns))
        charges.append(
            Charge(
                stage="statistics",
                rounds=1,
                steps_per_round=1,
                plan=replace(blank, clip_norm=bound),
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

    def spare_at(noise_multiplier: float) -> tuple[GaussianEvent, ...]:
        if not privacy.spare_attempts:
            return ()
        # Whichever stage fails: the one that samples more patients costs more.
        worst = max(charges, key=lambda one: one.plan.sampling_rate).plan
        plan = replace(worst, noise_multiplier=noise_multiplier)
        return (plan.event(steps=privacy.spare_attempts),)

    def events_at(noise_multiplier: float) -> list[GaussianEvent]:
        events = [event for one in at(noise_multiplier) for event in one.events()]
        return [*events, *spare_at(noise_multiplier)]

    assert privacy.epsilon is not None and privacy.delta is not None  # noqa: S101
    delta = privacy.delta
    if privacy.trust is Trust.DISTRIBUTED:
        releases = privacy.spare_attempts + sum(one.rounds for one in charges)
        # Skellam noise is charged as the Gaussian it is within this distance of.
        delta -= (1 + math.exp(privacy.epsilon)) * releases * LARGEST_DISTANCE
    if delta <= 0:
        raise PrivacyError(f"δ = {privacy.delta:g} is too small for {releases} secure sums")
    noise = calibrate(events_at, epsilon=privacy.epsilon, delta=delta, relation=privacy.relation)
    # Both accountants must find the promise kept; their grids differ by a hair.
    while (
        library_epsilon(events_at(noise), delta=delta, relation=privacy.relation) > privacy.epsilon
    ):
        noise *= 1 + _NUDGE
    return Budget(
        charges=at(noise),
        relation=privacy.relation,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        spare=spare_at(noise),
    )


def evaluation_charge(study: Study) -> Charge | None:
    """What the one released histogram costs the test patients; None if the study grants nothing.

    A patient adds at most 1 in all, so the clip norm is 1 (see ``score_histogram``).
    """
    privacy = study.privacy
    if study.evaluation.epsilon is None:
        return None
    noise = 0.0
    if privacy.delta is not None:
        noise = _single_release_noise(study.evaluation.epsilon, privacy.delta, privacy.relation)
    plan = StepPlan(
        unit=privacy.unit,
        relation=privacy.relation,
        sampling_rate=1.0,
        clip_norm=1.0,
        noise_multiplier=noise,
        records_per_unit=privacy.records_per_patient if privacy.unit == "patient" else 1,
        private=privacy.trust is not Trust.NONE,
    )
    return Charge(stage="evaluate", rounds=1, steps_per_round=1, plan=plan)


@lru_cache(maxsize=256)
def _single_release_noise(target: float, delta: float, relation: Relation) -> float:
    return calibrate(
        lambda noise: [GaussianEvent(noise_multiplier=noise)],
        epsilon=target,
        delta=delta,
        relation=relation,
    )
