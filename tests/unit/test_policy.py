"""No request, however crafted, gets past what the policy forbids; no policy is half understood."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.policy import Policy, ReleaseRequest, check
from client.policyfile import default_text, load_policy, parse_policy, sign_policy
from common.auditlog import AuditLog
from common.errors import ConsiliumError, PolicyError, RefusalError
from common.identity import Identity
from common.privacy.accounting import GaussianEvent
from common.privacy.units import PrivacyUnit, Relation

TEXT = default_text()
POLICY = parse_policy(TEXT.encode())
NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)
GOOD = ReleaseRequest(
    study="s",
    study_digest="0" * 64,
    task="diagnosis",
    stage="finetune",
    trust="local",
    unit=PrivacyUnit.PATIENT,
    relation=Relation.ADD_REMOVE,
    events=(GaussianEvent(noise_multiplier=1.0, sampling_rate=0.1, steps=10),),
    delta=1e-5,
    cohort_patients=1000,
    peers=3,
    max_records_per_patient=10,
    now=NOON,
)


def edited(old: str, new: str) -> Policy:
    assert old in TEXT
    return parse_policy(TEXT.replace(old, new).encode())


def test_a_good_request_passes() -> None:
    check(POLICY, GOOD)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"task": "treatment"}, "release.tasks"),
        ({"task": "Diagnosis"}, "release.tasks"),
        ({"stage": "pretrain"}, "release.stages"),
        ({"trust": "none"}, "release.trust"),
        ({"trust": "distributed"}, "release.trust"),
        ({"unit": PrivacyUnit.RECORD}, "release.units"),
        ({"relation": Relation.REPLACE_ONE}, "budget.relation"),
        ({"cohort_patients": 49}, "release.smallest_cohort"),
        ({"cohort_patients": math.nan}, "release.smallest_cohort"),
        ({"peers": 1}, "release.fewest_peers"),
        ({"max_records_per_patient": 21}, "release.most_records_per_patient"),
        ({"max_records_per_patient": 0}, "release.most_records_per_patient"),
        ({"delta": 2e-4}, "release.largest_delta_times_cohort"),
        ({"delta": 0.0}, "release.largest_delta_times_cohort"),
        ({"delta": math.nan}, "release.largest_delta_times_cohort"),
        ({"cohort_patients": 10**9, "delta": 1e-12}, "release.largest_delta_times_cohort"),
        ({"events": ()}, "release.smallest_noise_multiplier"),
        ({"events": ("gaussian",)}, "release.smallest_noise_multiplier"),
        (
            {"events": (*GOOD.events, GaussianEvent(noise_multiplier=0.49))},
            "release.smallest_noise_multiplier",
        ),
        ({"now": NOON.replace(tzinfo=None)}, "hours.quiet"),
    ],
)
def test_each_rule_refuses_and_is_named(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(RefusalError, match=rule) as refusal:
        check(POLICY, replace(GOOD, **change))
    assert refusal.value.rule == rule
    assert "policy expects" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_record_level_noise_is_judged_per_patient() -> None:
    policy = edited('units = ["patient"]', 'units = ["patient", "record"]')
    request = replace(GOOD, unit=PrivacyUnit.RECORD, max_records_per_patient=2)
    check(policy, request)
    with pytest.raises(RefusalError, match="smallest_noise_multiplier"):
        check(policy, replace(request, max_records_per_patient=3))


def test_a_replace_one_policy_takes_both_relations() -> None:
    policy = edited('"add_or_remove_one"', '"replace_one"')
    check(policy, GOOD)
    check(policy, replace(GOOD, relation=Relation.REPLACE_ONE))


@pytest.mark.parametrize(
    ("hour", "is_quiet"), [(21, False), (22, True), (23, True), (0, True), (5, True), (6, False)]
)
def test_quiet_hours_may_span_midnight_in_the_hospitals_zone(hour: int, is_quiet: bool) -> None:
    text = TEXT.replace("quiet = []", 'quiet = ["22:00-06:00"]')
    text = text.replace('timezone = "UTC"', 'timezone = "Asia/Tokyo"')
    request = replace(GOOD, now=datetime(2026, 5, 4, (hour - 9) % 24, tzinfo=UTC))
    if is_quiet:
        with pytest.raises(RefusalError, match=r"hours\.quiet"):
            check(parse_policy(text.encode()), request)
    else:
        check(parse_policy(text.encode()), request)


numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-5, 10**9), st.floats(0, 1e-3)
)


def gaussian(noise: float, rate: float, steps: int) -> GaussianEvent | None:
    try:
        return GaussianEvent(noise_multiplier=noise, sampling_rate=rate, steps=steps)
    except ConsiliumError:
        return None


@settings(max_examples=400)
@given(
    request=st.builds(
        ReleaseRequest,
        study=st.text(max_size=5),
        study_digest=st.text(max_size=5),
        task=st.sampled_from(["diagnosis", "diagnosis ", "notes", ""]),
        stage=st.sampled_from(["finetune", "distill", "pretrain"]),
        trust=st.sampled_from(["local", "distributed", "none", "LOCAL"]),
        unit=st.sampled_from(list(PrivacyUnit)),
        relation=st.sampled_from(list(Relation)),
        events=st.lists(
            st.builds(
                gaussian,
                st.one_of(st.floats(1e-300, 3), st.floats()),
                st.floats(0, 1),
                st.integers(1, 5),
            ),
            max_size=3,
        ).map(lambda events: tuple(event for event in events if event)),
        delta=numbers,
        cohort_patients=numbers,
        peers=numbers,
        max_records_per_patient=st.integers(-2, 40),
        now=st.datetimes(timezones=st.just(UTC)),
    ),
    units=st.sampled_from(['["patient"]', '["record"]', '["patient", "record"]']),
    relation=st.sampled_from(["add_or_remove_one", "replace_one"]),
)
def test_whatever_passes_obeys_every_rule(
    request: ReleaseRequest, units: str, relation: str
) -> None:
    text = TEXT.replace('["patient"]', units).replace('"add_or_remove_one"', f'"{relation}"')
    policy = parse_policy(text.replace("quiet = []", 'quiet = ["08:00-17:30"]').encode())
    try:
        check(policy, request)
    except RefusalError:
        return
    assert request.task == "diagnosis"
    assert request.stage in {"finetune", "distill"}
    assert request.trust == "local"
    assert request.unit.value in units
    assert request.relation is Relation.ADD_REMOVE or relation == "replace_one"
    assert request.cohort_patients >= 50
    assert request.peers >= 2
    assert 1 <= request.max_records_per_patient <= 20
    assert 0 < request.delta * request.cohort_patients <= 0.1
    assert request.events
    share = request.max_records_per_patient if request.unit is PrivacyUnit.RECORD else 1
    assert all(event.noise_multiplier / share >= 0.5 for event in request.events)
    assert not (8, 0) <= (request.now.hour, request.now.minute) < (17, 30)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "fewest_peers",
            "fewest_pears",
            "release.fewest_pears: unknown key; did you mean 'fewest_peers'",
        ),
        ("[budget]", "[budgets]", "budget"),
        ("version = 1", "version = 2", "version: input should be 1"),
        ("epsilon_lifetime = 8.0", "epsilon_lifetime = inf", "budget.epsilon_lifetime: .*finite"),
        ("epsilon_lifetime = 8.0", "epsilon_lifetime = -1", "greater than 0"),
        ("epsilon_lifetime = 8.0", "epsilon_lifetime = '8'", "valid number"),
        ("epsilon_lifetime = 8.0", "epsilon_lifetime = 1.0", "may not exceed epsilon_lifetime"),
        ("epsilon_lifetime = 8.0\n", "", "budget.epsilon_lifetime: expected, but not there"),
        ("delta = 1e-06", "delta = 1.0", "budget.delta"),
        ("delta = 1e-06", "delta = nan", "budget.delta"),
        ("smallest_cohort = 50", "smallest_cohort = 50.0", "valid integer"),
        ("smallest_cohort = 50", "smallest_cohort = true", "valid integer"),
        ('trust = ["local"]', 'trust = ["none"]', "release.trust.0"),
        ("quiet = []", 'quiet = ["25:00-06:00"]', "expected hours such as"),
        ('timezone = "UTC"', 'timezone = "Mars/Base"', "expected a zone such as"),
        ("[consent]", "[consent", "expected TOML"),
    ],
)
def test_a_policy_that_is_not_fully_understood_is_refused(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(PolicyError, match=message) as refusal:
        parse_policy(TEXT.replace(old, new, 1).encode())
    assert "\n" not in str(refusal.value)


def test_the_example_policy_is_the_default_one() -> None:
    example = Path(__file__).parents[2] / "deploy" / "policy.toml"
    assert example.read_text() == TEXT


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ledger-and-policy.md").read_text()
    for section in ("budget", "release", "consent", "hours"):
        for key in Policy.model_fields[section].annotation.model_fields:  # type: ignore[union-attr]
            assert f"`{section}.{key}`" in page


def test_only_the_policy_signed_last_is_in_force(tmp_path: Path) -> None:
    identity = Identity.generate()
    log = AuditLog(tmp_path / "audit.log", identity)
    path, signature = tmp_path / "policy.toml", tmp_path / "policy.toml.sig"
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(path, identity.public, log)
    path.write_text(TEXT)
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(path, identity.public, log)
    sign_policy(path, identity, log)
    assert load_policy(path, identity.public, log) == POLICY
    first = path.read_bytes(), signature.read_bytes()

    path.write_text(TEXT.replace("epsilon_lifetime = 8.0", "epsilon_lifetime = 80.0"))
    with pytest.raises(PolicyError, match="changed after signing"):
        load_policy(path, identity.public, log)
    path.write_text(TEXT.replace("epsilon_lifetime = 8.0", "epsilon_lifetime = 4.0"))
    sign_policy(path, identity, log)
    assert load_policy(path, identity.public, log).budget.epsilon_lifetime == 4.0

    # The weaker one was validly signed, but in its time.
    path.write_bytes(first[0])
    signature.write_bytes(first[1])
    with pytest.raises(PolicyError, match="signed last"):
        load_policy(path, identity.public, log)
    with pytest.raises(PolicyError, match="changed after signing"):
        load_policy(path, Identity.generate().public, log)


def test_an_invalid_policy_is_not_signed(tmp_path: Path) -> None:
    identity = Identity.generate()
    log = AuditLog(tmp_path / "audit.log", identity)
    (tmp_path / "policy.toml").write_text("version = 1")
    with pytest.raises(PolicyError, match="budget: expected"):
        sign_policy(tmp_path / "policy.toml", identity, log)
    assert not (tmp_path / "policy.toml.sig").exists()
    assert log.latest("policy_changed") is None
