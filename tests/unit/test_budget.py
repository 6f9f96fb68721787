"""A study's budget: never above the promise, hardly below it, and the same for both sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from client import rounds, training
from client.hospital import Hospital
from common.errors import PrivacyError
from common.features import FeatureMap, range_scaling, scaling_tensor
from common.privacy.accounting import GaussianEvent, epsilon
from common.privacy.budget import Charge, budget_of, evaluation_charge
from common.privacy.plan import StepPlan
from common.privacy.units import PrivacyUnit, Relation
from common.study import Study, parse_study
from common.wire import TrainTask

STUDIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"finetune__sampling_rate": 0.2, "finetune__rounds": 8},
    "steps": {"finetune__local_steps": 4},
    "patients": {"distill__on": "patients", "distill__sampling_rate": 0.5},
    "statistics": {"scaling": "private"},
    "all": {"scaling": "private", "distill__on": "patients", "privacy__epsilon": 1.0},
    "replace": {"privacy__relation": "replace_one"},
    "record": {"privacy__unit": "record"},
}


@pytest.fixture(params=STUDIES)
def study(request: pytest.FixtureRequest, small: Study) -> Study:
    return small.revised(**STUDIES[request.param])


def test_the_whole_stays_just_within_the_promise(study: Study) -> None:
    total, promised = budget_of(study).total(), study.privacy.epsilon
    assert total is not None
    assert promised is not None
    assert 0.98 * promised < total <= promised


def test_spending_is_the_composition_of_events_and_only_grows(study: Study) -> None:
    budget, events, last = budget_of(study), [], 0.0
    assert study.privacy.delta is not None
    for charge in budget.charges:
        for number in range(1, charge.rounds + 1):
            events.append(charge.plan.event(steps=charge.steps_per_round))
            spent = budget.spent(charge.stage, number)
            assert spent is not None
            assert spent > last
            last = spent
            if number in (1, charge.rounds):
                composed = epsilon(
                    events, delta=study.privacy.delta, relation=study.privacy.relation
                )
                assert spent == pytest.approx(composed, rel=1e-3)
    assert last == budget.total()


def test_stages_on_patients_are_charged_and_public_ones_free(small: Study) -> None:
    def stages(**changes: Any) -> list[str]:
        return [one.stage for one in budget_of(small.revised(**changes)).charges]

    assert stages() == ["finetune"]
    assert stages(distill__on="patients") == ["finetune", "distill"]
    assert stages(scaling="private", distill__on="patients") == [
        "statistics",
        "finetune",
        "distill",
    ]
    plain = budget_of(small).noise_multiplier
    for more in ({"distill__on": "patients"}, {"scaling": "private"}, {"finetune__rounds": 4}):
        assert budget_of(small.revised(**more)).noise_multiplier > plain


def test_statistics_are_clipped_at_the_largest_record(small: Study) -> None:
    """Two columns, three numbers of at most 1 each: a record's norm is at most √6."""
    budget = budget_of(small.revised(scaling="private"))
    assert budget.charge("statistics").plan.clip_norm == pytest.approx(math.sqrt(6))
    with pytest.raises(KeyError):
        budget.charge("pretrain")


def test_replacing_a_patient_needs_twice_the_noise(small: Study) -> None:
    """A clipped sum of the whole cohort moves by 2 C when one unit is exchanged."""
    add, swap = (budget_of(small.revised(privacy__relation=one)) for one in Relation)
    assert swap.noise_multiplier == pytest.approx(2 * add.noise_multiplier, rel=2e-3)
    graded = small.revised(evaluation__epsilon=1.0)
    one, two = (evaluation_charge(graded.revised(privacy__relation=rel)) for rel in Relation)
    assert one is not None
    assert two is not None
    assert two.plan.noise_multiplier == pytest.approx(2 * one.plan.noise_multiplier, rel=2e-3)


def test_the_noise_of_one_full_release_is_the_analytic_gaussian(small: Study) -> None:
    """Balle & Wang 2018 (ICML), theorem 8, solved here by bisection."""
    study = small.revised(finetune__rounds=1, privacy__epsilon=1.0)

    def delta_of(sigma: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return phi(0.5 / sigma - sigma) - math.e * phi(-0.5 / sigma - sigma)

    low, high = 0.5, 50.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > 1e-5 else (low, middle)
    assert budget_of(study).noise_multiplier == pytest.approx(high, rel=2e-3)


def test_without_trust_nothing_is_promised(small: Study) -> None:
    none = small.revised(privacy__trust="none", privacy__epsilon=None, privacy__delta=None)
    budget = budget_of(none)
    assert budget.total() is None
    assert budget.spent("finetune", 1) is None
    assert budget.noise_multiplier == 0
    assert budget.charge("finetune").events() == ()
    assert evaluation_charge(none) is None


def test_both_sides_compute_the_same_noise(
    study: Study, make_hospital: Callable[..., Hospital], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hospital draws what the coordinator's statement says, from its own copy of the study."""
    drawn: list[StepPlan] = []
    original = training.charge_of

    def watched(own: Study, stage: str, number: int) -> Charge:
        charge = original(own, stage, number)
        drawn.append(charge.plan)
        return charge

    monkeypatch.setattr(training, "charge_of", watched)
    held = parse_study(
        study.model_dump(mode="json", exclude_unset=True, exclude_none=True), origin="copy"
    )
    hospital = make_hospital(held)
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    rounds.train(
        hospital,
        TrainTask(
            study_digest=study.digest(),
            stage="finetune",
            round=0,
            attempt=0,
            teacher=dict(training.build_teacher(study, features).state_dict()),
            student=dict(training.build_student(study, features).state_dict()),
            scaling=scaling_tensor(study.dictionary, range_scaling(study.dictionary)),
        ),
    )
    assert drawn == [budget_of(study).charge("finetune").plan]


def test_a_plan_is_one_set_of_numbers() -> None:
    plan = StepPlan(
        unit=PrivacyUnit.PATIENT,
        relation=Relation.ADD_REMOVE,
        sampling_rate=0.25,
        clip_norm=3.0,
        noise_multiplier=1.5,
        records_per_unit=4,
    )
    assert plan.noise_std == 4.5
    assert plan.event(steps=7) == GaussianEvent(noise_multiplier=1.5, sampling_rate=0.25, steps=7)
    for wrong in (
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.0001},
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"records_per_unit": 0},
    ):
        with pytest.raises(PrivacyError, match="expected"):
            replace(plan, **wrong)  # type: ignore[arg-type]


def test_a_looser_promise_needs_less_noise(small: Study) -> None:
    noises = [
        budget_of(small.revised(privacy__epsilon=one)).noise_multiplier for one in (0.1, 1.0, 8.0)
    ]
    assert noises == sorted(noises, reverse=True)
    assert np.isfinite(noises).all()


def test_spare_attempts_are_in_the_total_from_the_start(small: Study) -> None:
    """Whether a sum failed or not, what the statement says was never exceeded."""
    study = small.revised(
        privacy__trust="distributed",
        federation__hospitals=6,
        finetune__local_steps=1,
        finetune__optimiser={"kind": "sgd", "learning_rate": 0.1},
    )
    spare = study.revised(privacy__spare_attempts=3)
    plain, budgeted = budget_of(study), budget_of(spare)
    assert budgeted.noise_multiplier > plain.noise_multiplier
    rounds_only = budgeted.spent("finetune", spare.finetune.rounds)
    total, promised = budgeted.total(), spare.privacy.epsilon
    assert rounds_only is not None
    assert total is not None
    assert promised is not None
    assert rounds_only < 0.95 * total
    assert 0.98 * promised < total <= promised
