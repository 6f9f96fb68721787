"""The audit finds no fault in sound software, and finds each fault that is put in on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from common.errors import PrivacyError
from common.privacy import plan as plan_module
from common.privacy.accounting import GaussianEvent, epsilon
from common.privacy.mechanisms import clip_factors
from common.privacy.plan import StepPlan
from common.privacy.units import Relation
from common.randomness import NoiseSource, SeededNoise, Stream
from simulations import audits, conformance
from simulations.audit_cli import audit_app
from simulations.canaries import Scores, bound, canary_scores, gaussian_epsilon

NOISE = SeededNoise(11, "audit")


def source(name: str) -> NoiseSource:
    return SeededNoise(5, name)


@pytest.fixture(scope="module")
def quick() -> Iterator[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield audits.audit_privacy(quick=True, noise=NOISE)
    torch.set_num_threads(threads)


def test_sound_software_passes(quick: dict[str, Any]) -> None:
    assert [one["name"] for one in quick["conformance"] if not one["passed"]] == []
    assert quick["passed"]
    assert json.loads(json.dumps(quick)) == quick


def test_bounds_stay_under_the_claim_and_are_worth_something(quick: dict[str, Any]) -> None:
    for row in quick["canaries"]:
        assert row["epsilon_low"] <= row["claimed"]
        assert row["epsilon_low_gaussian"] <= row["claimed"]
        assert row["epsilon_low_gaussian"] > 0.5 * row["claimed"]
        assert row["epsilon_low"] > 0


def test_noise_halved_on_purpose_is_seen_through(quick: dict[str, Any]) -> None:
    for row in quick["canaries"]:
        assert row["halved"]["epsilon_low_gaussian"] > row["claimed"]


def test_a_zero_bound_is_said_to_prove_nothing(quick: dict[str, Any]) -> None:
    assert "even zero, proves nothing" in quick["caveat"]
    assert quick["caveat"] in audits.render(quick)[-1]  # type: ignore[operator]


def test_poisson_samples_stay_under_the_claim_too() -> None:
    plan = audits.claimed_plan(3.0, 0.25)
    scores = canary_scores(plan, steps=10, runs=6, canaries=500, noise=NOISE, label="poisson")
    low = bound(scores, sampling_rate=0.25, delta=1e-5, confidence=0.99)
    assert low.epsilon_gaussian is None  # no exact conversion, so none is offered
    assert 0 <= low.epsilon <= 3.0


@pytest.mark.parametrize("steps_noise", [(1, 4.0), (10, 3.0)])
def test_gaussian_conversion_agrees_with_privacy_loss_distributions(
    steps_noise: tuple[int, float],
) -> None:
    # Two independent routes: Balle & Wang 2018 in closed form, and dp-accounting.
    steps, noise = steps_noise
    events = [GaussianEvent(noise_multiplier=noise, steps=steps)]
    expected = epsilon(events, delta=1e-5, relation=Relation.ADD_REMOVE)
    assert gaussian_epsilon(steps**0.5 / noise, 1e-5) == pytest.approx(expected, rel=1e-3)


def test_bounds_hold_at_their_confidence() -> None:
    """Over 300 audits of a mechanism with known ε, at 90 % no more than 10 % may exceed it."""
    generator = np.random.default_rng(0)
    true = gaussian_epsilon(1.0, 1e-5)
    exceeded = 0
    for _ in range(300):
        scores = Scores(
            present=generator.normal(1, 1, 400), absent=generator.normal(0, 1, 400), steps=1
        )
        low = bound(scores, sampling_rate=1.0, delta=1e-5, confidence=0.9)
        assert low.epsilon_gaussian is not None
        exceeded += max(low.epsilon, low.epsilon_gaussian) > true
    assert exceeded <= 30


def test_no_difference_gives_no_bound() -> None:
    same = np.random.default_rng(1).normal(0, 1, 2000)
    low = bound(
        Scores(present=same, absent=same, steps=0),
        sampling_rate=1.0,
        delta=1e-5,
        confidence=0.99,
    )
    assert (low.epsilon, low.epsilon_gaussian) == (0.0, 0.0)


# Faults put in on purpose: (what is broken, how, which check must fail).


def _half_noise(total: Tensor, stream: Stream, noise_std: float) -> Tensor:
    return total + torch.from_numpy(stream.normal(total.numel()) * noise_std * 0.9).float()


def _same_noise(total: Tensor, stream: Stream, noise_std: float) -> Tensor:
    torch.manual_seed(0)
    return total + torch.randn(total.numel()) * noise_std


def _loose_clip(norms: Tensor, clip_norm: float) -> Tensor:
    return clip_factors(norms, 1.1 * clip_norm)


def _shuffled(stream: Stream, units: int, rate: float) -> Tensor:
    order = np.argsort(stream.uniform(units))
    return torch.from_numpy(np.sort(order[: round(rate * units)]).copy())


def _eager(stream: Stream, units: int, rate: float) -> Tensor:
    return torch.from_numpy((stream.uniform(units) < 1.2 * rate).nonzero()[0])


FAULTS: list[tuple[str, Callable[..., Tensor], Callable[[], list[conformance.Check]]]] = [
    ("add_gaussian", _half_noise, lambda: [conformance.noise_variance(source, 5)]),
    ("add_gaussian", _same_noise, lambda: [conformance.noise_variance(source, 5)]),
    ("clip_factors", _loose_clip, lambda: [conformance.clipping()]),
    ("poisson_sample", _shuffled, lambda: conformance.sampling(source, 5)[1:]),
    ("poisson_sample", _eager, lambda: conformance.sampling(source, 5)[:1]),
]


@pytest.mark.parametrize(("what", "broken", "check"), FAULTS)
def test_a_fault_put_in_is_found(
    what: str,
    broken: Callable[..., Tensor],
    check: Callable[[], list[conformance.Check]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(one.passed for one in check())
    monkeypatch.setattr(plan_module, what, broken)
    assert not any(one.passed for one in check())


def test_shared_noise_between_hospitals_is_found() -> None:
    def shared(name: str) -> NoiseSource:
        return SeededNoise(5, "everyone")

    hospitals, _ = conformance.distinct_noise(shared)
    assert not hospitals.passed
    assert hospitals.found == pytest.approx(1.0)


def test_a_step_that_is_not_charged_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = StepPlan.noised

    def twice(self: StepPlan, total: Tensor, stream: Stream) -> Tensor:
        self.sample(stream, 0)
        real(self, total, stream)
        return real(self, total, stream)

    monkeypatch.setattr(StepPlan, "noised", twice)
    check = conformance.replay(source)
    assert not check.passed
    assert check.found > check.expected


def test_the_listener_leaves_no_trace() -> None:
    before = plan_module.add_gaussian
    with pytest.raises(RuntimeError), conformance.overheard():
        assert plan_module.add_gaussian is not before
        raise RuntimeError
    assert plan_module.add_gaussian is before


def test_command_prints_json_and_help_ends_with_an_example(
    monkeypatch: pytest.MonkeyPatch, quick: dict[str, Any]
) -> None:
    seen: dict[str, Any] = {}

    def audit(epsilons: list[float], **options: Any) -> dict[str, Any]:
        seen.update(options, epsilons=epsilons)
        return {**quick, "passed": not options["runs"]}

    monkeypatch.setattr(audits, "audit_privacy", audit)
    runner = CliRunner()
    result = runner.invoke(audit_app, ["privacy", "--epsilon", "1,3", "--quick", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["passed"]
    assert seen["epsilons"] == [1.0, 3.0]
    failed = runner.invoke(audit_app, ["privacy", "--runs", "7"])
    assert failed.exit_code == 1
    assert "FAULT FOUND" in failed.output
    help_text = runner.invoke(audit_app, ["privacy", "--help"]).output
    assert "Example: consilium audit privacy" in help_text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(((),), "at least one"), (((1.0,),), "runs: expected at least 2")],
)
def test_what_cannot_be_audited_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        audits.audit_privacy(*arguments, runs=1 if arguments[0] else None)


def test_a_list_that_is_no_list_of_numbers_is_refused() -> None:
    result = CliRunner().invoke(audit_app, ["privacy", "--epsilon", "one"])
    assert isinstance(result.exception, PrivacyError)
