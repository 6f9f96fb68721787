"""No study, however crafted, gets a release that the hospital's policy forbids."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as some

from client import rounds
from client.guard import LedgerGuard
from client.hospital import Hospital
from client.policyfile import sign_policy
from client.safe import create_safe, open_safe
from common.errors import ConsiliumError
from common.features import FeatureMap, range_scaling, scaling_tensor
from common.models import build_student, build_teacher
from common.privacy.accounting import library_epsilon
from common.study import Study
from common.wire import TrainTask


def mostly(usual: Any, *unusual: Any) -> some.SearchStrategy[Any]:
    """The usual value four times in five, so that whole requests pass often enough to matter."""
    return some.integers(0, 4).flatmap(
        lambda draw: some.sampled_from(unusual) if draw == 4 else some.just(usual)
    )


STUDIES = some.fixed_dictionaries(
    {
        "privacy__epsilon": some.sampled_from([0.05, 0.5, 1.0, 2.0, 9.0, 100.0]),
        "privacy__delta": mostly(1e-6, 1e-9, 1e-4, 9e-3),
        "privacy__relation": mostly("add_or_remove_one", "replace_one"),
        "privacy__unit": mostly("patient", "record"),
        "finetune__rounds": some.integers(1, 3),
        "finetune__local_steps": some.integers(1, 3),
        "finetune__sampling_rate": some.sampled_from([0.1, 0.5, 1.0]),
        "federation__minimum_hospitals": some.integers(2, 6),
    }
)
RELEASES = some.fixed_dictionaries(
    {
        "smallest_noise_multiplier": mostly(0.1, 1.0, 5.0),
        "smallest_cohort": mostly(10, 500),
        "fewest_peers": mostly(1, 4),
        "largest_delta_times_cohort": mostly(0.1, 1e-4),
        "tasks": mostly(["diagnosis"], ["imaging"]),
        "stages": mostly(["finetune"], ["distill", "statistics"]),
        "units": mostly(["patient", "record"], ["patient"]),
    }
)
BUDGETS = some.sampled_from([0.1, 1.0, 5.0, 20.0])


def policy_for(folder: Path, release: dict[str, Any], budget: float) -> None:
    policy = tomllib.loads((folder / "policy.toml").read_text())
    policy["release"] |= {"trust": ["local"], **release}
    policy["budget"] |= {"epsilon_lifetime": budget, "epsilon_per_year": budget, "delta": 1e-6}
    policy["hours"]["quiet"] = []
    (folder / "policy.toml").write_text(tomli_w.dumps(policy))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=STUDIES, release=RELEASES, budget=BUDGETS)
def test_no_study_gets_what_the_policy_forbids(
    small: Study,
    make_hospital: Callable[..., Hospital],
    changes: dict[str, Any],
    release: dict[str, Any],
    budget: float,
) -> None:
    study = small.revised(**changes)
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    task = TrainTask(
        study_digest=study.digest(),
        stage="finetune",
        round=0,
        attempt=0,
        teacher=build_teacher(study, features).state_dict(),
        student=build_student(study, features).state_dict(),
        scaling=scaling_tensor(study.dictionary, features.scaling),
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "safe"
        create_safe(folder, {})
        policy_for(folder, release, budget)
        with open_safe(folder, {}) as safe:
            sign_policy(safe.folder.policy, safe.identity, safe.log)
            hospital = replace(make_hospital(study), guard=LedgerGuard(safe, safe.noise()))
            released = 0
            for number in range(study.finetune.rounds):
                try:
                    rounds.train(hospital, replace(task, round=number))
                    released += 1
                except ConsiliumError:
                    pass
            entries, cohorts = safe.ledger.entries(), safe.ledger.cohorts()
            policy = safe.policy()
    event(f"released: {released > 0}")
    assert len(entries) == released  # nothing left uncharged, nothing charged in vain
    if not released:
        return
    # Judged here from the raw numbers, not by the code that decided.
    patients = cohorts[0].patients
    assert "diagnosis" in release["tasks"]
    assert "finetune" in release["stages"]
    assert study.privacy.unit.value in release["units"]
    assert patients >= release["smallest_cohort"]
    assert study.federation.minimum_hospitals - 1 >= release["fewest_peers"]
    assert study.privacy.delta is not None
    assert study.privacy.delta * patients <= release["largest_delta_times_cohort"]
    assert study.privacy.relation is policy.budget.relation
    events = [event for entry in entries for event in entry.charge.events]
    assert all(one.noise_multiplier >= release["smallest_noise_multiplier"] for one in events)
    cost = library_epsilon(events, delta=1e-6, relation=policy.budget.relation)
    assert cost <= budget * 1.001
