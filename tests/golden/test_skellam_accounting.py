"""The price of Skellam noise, against the law itself and against an independent library."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy import stats
from scipy.special import ive, logsumexp

from common.errors import PrivacyError
from common.privacy import accounting
from common.privacy.accounting import GaussianEvent
from common.privacy.skellam_accounting import ORDERS, SkellamEvent, calibrate, epsilon, rdp
from common.privacy.skellam_gaussian import _bound, delta_slack, gaussian_equivalent
from common.privacy.units import Relation

BOTH = Relation.ADD_REMOVE


def log_law(variance: float) -> tuple[np.ndarray, np.ndarray]:
    """Values and log P of Sk(variance), where P does not underflow."""
    value = np.arange(-int(30 * math.sqrt(variance)) - 100, int(30 * math.sqrt(variance)) + 101)
    with np.errstate(divide="ignore"):
        return value, np.log(ive(np.abs(value), variance))


def divergence(log_p: np.ndarray, log_q: np.ndarray, order: int) -> float:
    """Rényi divergence of p from q where both are representable."""
    sound = np.isfinite(log_p) & np.isfinite(log_q)
    return float(logsumexp(order * log_p[sound] + (1 - order) * log_q[sound]) / (order - 1))


@pytest.mark.parametrize("variance", [1.0, 4.0, 25.0, 400.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_the_bound_covers_the_law(variance: float, shift: int) -> None:
    """Theorem 3.5 of Agarwal, Kairouz & Liu 2021 against the divergence computed from Bessel."""
    _, law = log_law(variance)
    event = SkellamEvent(l2_sensitivity=shift, l1_sensitivity=shift, variance=variance)
    for order in (2, 3, 8, 20):
        exact = divergence(law[shift:], law[:-shift], order)
        assert 0 < exact <= rdp(event, [order], BOTH)[0]


def test_the_formula_in_the_paper() -> None:
    """By hand, α = 3, Δ₂ = 2, Δ₁ = 3, μ = 10 and μ = 0.1 (where the other branch is smaller)."""
    found = [
        rdp(SkellamEvent(l2_sensitivity=2, l1_sensitivity=3, variance=mu), [3], BOTH)[0]
        for mu in (10.0, 0.1)
    ]
    assert found == pytest.approx([0.6 + 38 / 400, 60 + 4.5 / 0.1])
    doubled = SkellamEvent(l2_sensitivity=4, l1_sensitivity=6, variance=10.0)
    single = SkellamEvent(l2_sensitivity=2, l1_sensitivity=3, variance=10.0)
    np.testing.assert_allclose(
        rdp(single, ORDERS, Relation.REPLACE_ONE), rdp(doubled, ORDERS, BOTH)
    )


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.7])
@pytest.mark.parametrize("variance", [3.0, 50.0])
def test_sampling_covers_both_directions(rate: float, variance: float) -> None:
    """The mixture's divergence from the law, and the law's from the mixture, computed exactly."""
    _, law = log_law(variance)
    event = SkellamEvent(l2_sensitivity=2, l1_sensitivity=2, variance=variance, sampling_rate=rate)
    without, with_it = law[2:], law[:-2]
    mixture = np.logaddexp(math.log1p(-rate) + without, math.log(rate) + with_it)
    for order in (2, 3, 8, 20):
        bound = rdp(event, [order], BOTH)[0]
        first, second = divergence(mixture, without, order), divergence(without, mixture, order)
        assert second <= first * (1 + 1e-9) <= bound * (1 + 1e-9)


def test_gaussian_limit_agrees_with_dp_accounting() -> None:
    """With a fine scale, Skellam costs what dp-accounting says of the sampled Gaussian."""
    for rate, steps in ((1.0, 10), (0.1, 100)):
        accountant = RdpAccountant(list(ORDERS))
        accountant.compose(
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(5.0)),
                steps,
            )
        )
        ours = SkellamEvent(
            l2_sensitivity=2.0**20, l1_sensitivity=2.0**26, variance=25 * 2.0**40,
            sampling_rate=rate, steps=steps,
        )  # fmt: skip
        assert epsilon([ours], delta=1e-5, relation=BOTH) == pytest.approx(
            accountant.get_epsilon(1e-5), rel=1e-4
        )
        gaussian = GaussianEvent(noise_multiplier=5.0, sampling_rate=rate, steps=steps)
        assert epsilon([gaussian], delta=1e-5, relation=BOTH) == pytest.approx(
            accountant.get_epsilon(1e-5), rel=1e-6
        )


def test_calibration_stays_on_the_private_side() -> None:
    def events(noise: float) -> list[SkellamEvent]:
        return [
            SkellamEvent(
                l2_sensitivity=1000.0, l1_sensitivity=8000.0, variance=(1000.0 * noise) ** 2,
                sampling_rate=0.2, steps=40,
            )
        ]  # fmt: skip

    noise = calibrate(events, epsilon=1.0, delta=1e-5, relation=BOTH)
    assert epsilon(events(noise), delta=1e-5, relation=BOTH) <= 1.0
    assert epsilon(events(noise * 0.998), delta=1e-5, relation=BOTH) > 1.0
    # RDP is never below what PLD says of the Gaussian, and not far above.
    tight = accounting.calibrate(
        lambda z: [GaussianEvent(noise_multiplier=z, sampling_rate=0.2, steps=40)],
        epsilon=1.0, delta=1e-5, relation=BOTH,
    )  # fmt: skip
    assert tight < noise < 1.13 * tight


def test_what_is_not_proven_is_refused() -> None:
    event = SkellamEvent(l2_sensitivity=1, l1_sensitivity=1, variance=9.0, sampling_rate=0.5)
    with pytest.raises(PrivacyError, match="replace-one"):
        rdp(event, [2], Relation.REPLACE_ONE)
    for changes in (
        {"variance": 0.0}, {"l2_sensitivity": 0.0}, {"l1_sensitivity": 0.5},
        {"sampling_rate": 0.0}, {"steps": 0},
    ):  # fmt: skip
        with pytest.raises(PrivacyError):
            SkellamEvent(
                **({"l2_sensitivity": 1.0, "l1_sensitivity": 1.0, "variance": 9.0} | changes)
            )
    with pytest.raises(ValueError, match="above 1"):
        rdp(event, [1], BOTH)
    with pytest.raises(PrivacyError, match="cannot be reached"):
        calibrate(
            lambda _: [SkellamEvent(l2_sensitivity=1, l1_sensitivity=1, variance=1.0)],
            epsilon=1e-3, delta=1e-5, relation=BOTH,
        )  # fmt: skip
    assert epsilon([], delta=1e-5, relation=BOTH) == 0.0


@pytest.mark.parametrize(
    ("variance", "step"), [(4096.0, 2), (4096.0, 3), (2.0**14, 4), (2.0**16, 8)]
)
def test_the_distance_to_a_processed_gaussian(variance: float, step: int) -> None:
    """The construction of ``skellam_gaussian``, its law summed term by term, stays in the bound."""
    inner = (variance + 1 / 120) / step**4
    found = _bound(variance, step)
    assert found is not None
    std, eta = found
    assert std**2 == pytest.approx(variance - step**2 * inner - 1 / 12)
    value = np.arange(-int(16 * math.sqrt(variance)), int(16 * math.sqrt(variance)) + 1)
    reach = int(14 * math.sqrt(inner) + 30)
    processed = np.zeros(len(value))
    for jump in range(-reach, reach + 1):
        centre = value - step * jump
        processed += ive(abs(jump), inner) * (
            stats.norm.cdf((centre + 0.5) / std) - stats.norm.cdf((centre - 0.5) / std)
        )
    assert processed.sum() == pytest.approx(1, abs=1e-12)
    distance = 0.5 * np.abs(processed - ive(np.abs(value), variance)).sum()
    assert eta / 20 < distance < eta
    # Another width of Gaussian is told apart: the cumulants must match.
    narrower = 0.5 * np.abs(
        stats.norm.cdf((value + 0.5) / std) - stats.norm.cdf((value - 0.5) / std)
        - ive(np.abs(value), variance)
    ).sum()  # fmt: skip
    assert narrower > 1000 * eta


def test_equivalents_widen_with_the_noise() -> None:
    for variance, length, least in ((2.0**28, 513, 0.999), (2.0**34, 10**7, 0.998)):
        found = gaussian_equivalent(variance, length=length)
        assert least < found.std / math.sqrt(variance) < 1
        assert found.distance <= 2.0**-40
    assert delta_slack(epsilon=1.0, distance=2.0**-40, releases=1000) < 1e-8
    for coarse in (0.0, 1.0, 5000.0):
        with pytest.raises(PrivacyError, match="too coarse"):
            gaussian_equivalent(coarse, length=513)


def test_the_equivalent_gaussian_is_cheaper_than_rdp_and_never_cheaper_than_the_law() -> None:
    """One coordinate, one release: the exact (ε, δ) of the law itself is below."""
    variance, shift = 2.0**20, 256
    _, law = log_law(variance)
    plain = np.exp(law)
    delta = 1e-5
    found = gaussian_equivalent(variance, length=1)
    charged = accounting.epsilon(
        [GaussianEvent(noise_multiplier=found.std / shift)], delta=delta, relation=BOTH
    )
    exact = np.maximum(0, plain[shift:] - math.exp(charged) * plain[:-shift]).sum()
    assert exact <= delta + delta_slack(epsilon=charged, distance=found.distance, releases=1)
    by_rdp = epsilon(
        [SkellamEvent(l2_sensitivity=shift, l1_sensitivity=shift, variance=variance)],
        delta=delta, relation=BOTH,
    )  # fmt: skip
    assert charged < by_rdp
