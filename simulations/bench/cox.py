"""What a prognosis is compared with: Cox's proportional hazards on pooled patients.

Its partial likelihood is no sum over patients and cannot be trained privately (docs/prognosis.md);
as a reference, without privacy and with every patient in one place, it is the field's usual model.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

_LEAST_SPREAD = 0.05  # of an indicator that nearly nobody has
_ITERATIONS = 100


def cox_risks(
    train: Floats, times: Floats, seen: NDArray[np.bool_], test: Floats, *, ridge: float
) -> Floats:
    """Log relative hazards [patients] of ``test`` [patients, d] by a model of ``train`` [n, d].

    ``times`` [n] until the event where ``seen`` [n], else until the last visit. Columns are
    standardised; ``ridge`` weighs the squared coefficients against the mean log-likelihood.
    """
    centre, spread = train.mean(axis=0), np.maximum(train.std(axis=0), _LEAST_SPREAD)
    order = np.argsort(-times, kind="stable")
    inputs = torch.from_numpy((train[order] - centre) / spread)
    when, event = torch.from_numpy(times[order]), torch.from_numpy(seen[order])
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -partial_likelihood(inputs @ weights, when, event) + ridge * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    risks: Floats = ((test - centre) / spread) @ weights.detach().numpy()
    return risks


def partial_likelihood(risks: Tensor, times: Tensor, seen: Tensor) -> Tensor:
    """Mean log partial likelihood (Cox 1972) with ties as Breslow has them.

    ``risks``, ``times``, ``seen`` [patients], from the longest time to the shortest: at risk at an
    event are all before it in this order, and those of equal time.
    """
    last = torch.searchsorted(-times, -times, right=True) - 1
    at_risk = torch.logcumsumexp(risks, dim=0)[last]
    return ((risks - at_risk) * seen).sum() / len(risks)
