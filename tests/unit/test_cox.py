"""The pooled reference of prognosis: Cox's partial likelihood by its definition, and its use."""

from __future__ import annotations

import math

import numpy as np
import torch

from simulations.bench.cox import cox_risks, partial_likelihood


def test_the_partial_likelihood_is_its_definition() -> None:
    times, seen = [9.0, 7.0, 7.0, 4.0, 2.0], [True, True, False, True, True]
    risks = [0.3, -0.2, 1.1, 0.4, -0.7]
    wanted = sum(
        risk - math.log(sum(math.exp(r) for r, t in zip(risks, times, strict=True) if t >= time))
        for risk, time, event in zip(risks, times, seen, strict=True)
        if event
    )
    found = partial_likelihood(torch.tensor(risks), torch.tensor(times), torch.tensor(seen))
    assert math.isclose(float(found), wanted / 5, rel_tol=1e-6)


def test_effects_of_simulated_patients_are_found() -> None:
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(4000, 3)) * [1.0, 2.0, 5.0]
    effects = np.array([0.8, -0.3, 0.0])
    times = draw.exponential(np.exp(-inputs @ effects))
    until = draw.exponential(2.0, size=len(times))
    found = cox_risks(inputs, np.minimum(times, until), times <= until, np.eye(3), ridge=0.0)
    np.testing.assert_allclose(
        found
        - cox_risks(inputs, np.minimum(times, until), times <= until, np.zeros((1, 3)), ridge=0.0),
        effects,
        atol=0.08,
    )
