"""The price of keeping the best of several runs, against its paper and an independent library.

Papernot & Steinke 2022, "Hyperparameter tuning with Rényi differential privacy" (arXiv 2110.03620).
"""

from __future__ import annotations

import hashlib
import math

import dp_accounting
import numpy as np
import pytest

from common.errors import PrivacyError
from common.privacy.accounting import GaussianEvent, epsilon
from common.privacy.selection import LAWS, Law, Trials, selected_rdp, selection_epsilon
from common.privacy.skellam_accounting import ORDERS
from common.privacy.units import Relation
from common.randomness import Stream

ADD = Relation.ADD_REMOVE
SHAPES = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}


@pytest.mark.parametrize(("law", "times"), [("logarithmic", 2.0), ("geometric", 3.0)])
@pytest.mark.parametrize("mean", [2.0, 10.0, 400.0])
def test_a_pure_trial_costs_2_plus_eta_times_its_own(law: Law, times: float, mean: float) -> None:
    # Corollary 3: (2 + η)·ε, whatever the mean; η = 1 is theorem 3.3 of Liu & Talwar 2019: 3·ε.
    orders = np.array([1e10])
    found = selected_rdp(orders, np.array([0.5]), Trials(law=law, mean=mean))
    assert found[0] == pytest.approx(times * 0.5, abs=1e-6)


@pytest.mark.parametrize(("law", "shape"), [("logarithmic", 0.0), ("geometric", 1.0)])
def test_a_gaussian_trial_costs_what_corollary_4_says(law: Law, shape: float) -> None:
    rho, trials = 0.1, Trials(law=law, mean=10.0)
    log_gamma = math.log(1 / trials.gamma)
    # The corollary's own choice λ̂ = √(log(1/γ)/ρ), and orders above 1 + √(log E[K]/ρ).
    orders = np.array([math.sqrt(log_gamma / rho), 20.0, 100.0])
    found = selected_rdp(orders, rho * orders, trials)
    for order, value in list(zip(orders, found, strict=True))[1:]:
        said = (
            rho * (order - 1)
            + math.log(10) / (order - 1)
            + 2 * (1 + shape) * math.sqrt(rho * log_gamma)
            - shape * rho
        )
        assert value == pytest.approx(said, rel=1e-9)


def test_a_poisson_number_of_gaussian_trials_costs_what_theorem_6_says() -> None:
    sigma, mean = 5.0, 10.0
    orders = np.array(ORDERS, dtype=np.float64)
    found = selected_rdp(orders, orders / (2 * sigma**2), Trials(law="poisson", mean=mean))
    for order, value in zip(orders, found, strict=True):
        # With the exact δ̂ of a Gaussian; ours, from its Rényi curve, is somewhat larger.
        hat = math.log1p(1 / (order - 1))
        x, y = (hat * sigma - 0.5 / sigma), (hat * sigma + 0.5 / sigma)
        delta = (math.erfc(x / math.sqrt(2)) - math.exp(hat) * math.erfc(y / math.sqrt(2))) / 2
        said = order / (2 * sigma**2) + mean * delta + math.log(mean) / (order - 1)
        assert said <= value + 1e-12
        if order > 64:
            assert value <= said * 8


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("mean", [1.5, 8.0, 60.0])
@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.5, 1.0, 1), (4.0, 0.3, 40)])
def test_agrees_with_dp_accounting(
    law: Law, mean: float, noise: float, rate: float, steps: int
) -> None:
    event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise)
    if rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(rate, event)
    repeated = dp_accounting.dp_event.RepeatAndSelectDpEvent(
        dp_accounting.SelfComposedDpEvent(event, steps), mean, SHAPES[law]
    )
    accountant = dp_accounting.rdp.RdpAccountant(orders=list(ORDERS))
    accountant.compose(repeated)
    ours = selection_epsilon(
        [[GaussianEvent(noise_multiplier=noise, sampling_rate=rate, steps=steps)]],
        Trials(law=law, mean=mean),
        delta=1e-5,
        relation=ADD,
    )
    # No larger: λ̂ = 1 is allowed, and the library does not try it.
    assert ours <= accountant.get_epsilon(1e-5) * (1 + 1e-6)
    if not (rate < 1 and law == "poisson"):
        assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)


@pytest.mark.parametrize("law", ["logarithmic", "geometric"])
def test_a_single_trial_costs_itself(law: Law) -> None:
    event = GaussianEvent(noise_multiplier=2.0)
    found = selection_epsilon([[event]], Trials(law=law, mean=1.0), delta=1e-5, relation=ADD)
    assert found == pytest.approx(epsilon([event], delta=1e-5, relation=ADD), rel=0.1)
    assert found >= epsilon([event], delta=1e-5, relation=ADD)


def test_the_costliest_candidate_is_charged_wherever_its_curve_is_highest() -> None:
    trials = Trials(law="geometric", mean=4.0)
    weak, strong = GaussianEvent(noise_multiplier=1.0), GaussianEvent(noise_multiplier=6.0)
    alone = selection_epsilon([[weak]], trials, delta=1e-5, relation=ADD)
    both = selection_epsilon([[strong], [weak]], trials, delta=1e-5, relation=ADD)
    # A lower curve cannot help: the best trial may be of the other kind.
    assert both == alone > selection_epsilon([[strong]], trials, delta=1e-5, relation=ADD)


def test_keeping_the_best_costs_less_than_publishing_many() -> None:
    event, count = GaussianEvent(noise_multiplier=3.0), 40
    all_of_them = epsilon([event] * count, delta=1e-5, relation=ADD)
    best = selection_epsilon(
        [[event]], Trials(law="logarithmic", mean=count), delta=1e-5, relation=ADD
    )
    assert best < all_of_them / 3


@pytest.mark.parametrize("law", LAWS)
def test_draws_follow_the_law(law: Law) -> None:
    trials, many = Trials(law=law, mean=6.0), 4000
    drawn = np.array(
        [trials.draw(Stream(hashlib.sha256(f"{one}".encode()).digest())) for one in range(many)]
    )
    assert drawn.min() == (0 if law == "poisson" else 1)
    assert drawn.mean() == pytest.approx(6.0, abs=0.6)
    if law == "poisson":
        first = math.exp(-6.0)
    elif law == "geometric":
        first = 1 / 6
    else:
        first = (1 - trials.gamma) / math.log(1 / trials.gamma)  # definition 1 at k = 1, η = 0
        assert (1 / trials.gamma - 1) / math.log(1 / trials.gamma) == pytest.approx(6.0)
    assert (drawn == drawn.min()).mean() == pytest.approx(first, abs=0.02)


@pytest.mark.parametrize(("law", "mean"), [("geometric", 0.5), ("poisson", 1e4), ("binomial", 3.0)])
def test_no_such_law_is_refused(law: str, mean: float) -> None:
    with pytest.raises(PrivacyError, match="trials: expected"):
        Trials(law=law, mean=mean)  # type: ignore[arg-type]


def test_sampling_under_replace_one_is_refused() -> None:
    with pytest.raises(PrivacyError, match="replace-one"):
        selection_epsilon(
            [[GaussianEvent(noise_multiplier=2.0, sampling_rate=0.5)]],
            Trials(law="geometric", mean=2.0),
            delta=1e-5,
            relation=Relation.REPLACE_ONE,
        )
