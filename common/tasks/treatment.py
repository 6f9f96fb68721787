"""What a treatment changes for a patient, from patients of whom some received it.

Only one outcome of each patient is seen. A model of both says what the other would have been, if
nothing unmeasured decided who was treated: no data can show that it did not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.dictionary import Dictionary
from common.labels import EffectLabel
from common.learning.effect_metrics import TRIM, factual_rmse, sqrt_pehe
from common.tasks.task import Floats, Measure, Unreleased

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["arms", "effect", "targeted"]

# What a patient's propensity, and the squared error of the perturbed outcome, weigh beside the
# squared error of the scaled outcome (Shi et al. 2019 take 1 for both).
_ALPHA = 1.0
_BETA = 1.0
# How loud the shared number is that ε is made of: with an even chance of treatment, where h = ±2,
# a step moves the perturbed outcome as far as a bias would. ε itself is free to be anything.
_LOUDNESS = 0.5

_PEHE = Measure("sqrt_pehe", "√PEHE", higher_is_better=False, bounds=(0.0, None))
_ATE = Measure("ate_error", "ATE error", higher_is_better=False, bounds=(0.0, None))
_FACTUAL = Measure("factual_rmse", "factual RMSE", higher_is_better=False, bounds=(0.0, None))
_PROPENSITY = Measure(
    "propensity_loss", "propensity loss", higher_is_better=False, bounds=(0, None)
)


@dataclass(frozen=True)
class Treatment(Unreleased):
    """Answers [rows, 3]: the scaled outcome without treatment, then with it (``arms``) or the
    difference it makes (``effect``), and the logit of being treated.

    ``arms``: two outcomes and a propensity on one representation (TARNet, Shalit et al. 2017;
    DragonNet, Shi et al. 2019), each learned from its own arm. ``effect``: the effect is itself an
    output, so that weight decay and an early stop draw it towards one effect for all, and the
    student learns it from the teacher's imputed effects, as the X-learner's second stage does
    (Künzel et al. 2019). ``targeted``: as ``arms``, with targeted regularisation (Shi et al. 2019,
    section 3): the teacher's answers are [rows, 4], the last an ε that all patients share. It
    perturbs the outcomes to Q̃(t, x) = Q(t, x) + ε h, h = t/g − (1 − t)/(1 − g) with the propensity
    g; the squared error of Q̃ is learned beside that of Q, and Q̃ is what the teacher says.
    """

    name: str
    label: EffectLabel
    form: Form = "arms"

    outputs = 3

    @property
    def shared(self) -> int:
        """ε, where there is one."""
        return 1 if self.form == "targeted" else 0

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Errors of the effect where the truth is known, which is in made-up patients only."""
        seen = (_FACTUAL, _PROPENSITY)
        return (_PEHE, _ATE, *seen) if self.label.truth else seen

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """[rows, 2]: treated or not, and the scaled outcome. Never the truth."""
        import torch

        middle, spread = self.label.scale
        outcome = (labels[:, 1] - middle) / spread
        return torch.from_numpy(np.stack([labels[:, 0], outcome], axis=1).astype(np.float32))

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Squared error of the outcome that was seen, and the propensity's cross-entropy [rows];
        with ε the squared error of the perturbed outcome as well."""
        import torch
        from torch.nn import functional

        treated, outcome = targets[:, 0], targets[:, 1]

        def error(mu0: Tensor, mu1: Tensor) -> Tensor:
            # Only the arm that the patient was in has a gradient.
            return (torch.where(treated > 0, mu1, mu0) - outcome).square()

        chance = functional.binary_cross_entropy_with_logits(
            answers[:, 2], treated.to(answers.dtype), reduction="none"
        )
        found = error(*self._outcomes(answers[:, :3])) + _ALPHA * chance
        return found + _BETA * error(*self._outcomes(answers)) if self.shared else found

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Squared error of the outcomes (or outcome and effect) and the softened propensity's
        cross-entropy × T² [rows]."""
        import torch
        from torch.nn import functional

        wanted = torch.sigmoid(taught[:, 2] / temperature)
        chance = functional.binary_cross_entropy_with_logits(
            answers[:, 2] / temperature, wanted, reduction="none"
        )
        apart = (answers[:, :2] - _perturbed(taught)).square().sum(dim=1)
        return apart + _ALPHA * chance * temperature**2

    def predictions(self, answers: Tensor, inputs: Tensor) -> Tensor:  # noqa: ARG002
        """[rows, 3]: outcome without and with treatment in the label's unit, and propensity."""
        import torch

        middle, spread = self.label.scale
        outcomes = [one * spread + middle for one in self._outcomes(answers)]
        return torch.stack([*outcomes, torch.sigmoid(answers[:, 2])], dim=1)

    def figures(self, labels: NDArray[Any], predictions: Floats) -> dict[str, float]:
        """Root errors of the effect and of its mean (NaN without the truth), of the outcome that
        was seen, and the mean cross-entropy of the propensity."""
        known = labels.astype(np.float64)
        treated, outcome, truth = known[:, 0], known[:, 1], known[:, 3] - known[:, 2]
        mu0, mu1, propensity = predictions.T
        chance = np.clip(np.where(treated > 0, propensity, 1 - propensity), 1e-12, 1.0)
        found = {
            "factual_rmse": factual_rmse(treated, outcome, mu0, mu1),
            "propensity_loss": float(-np.log(chance).mean()),
        }
        if self.label.truth:
            found["sqrt_pehe"] = sqrt_pehe(mu1 - mu0, truth)
            found["ate_error"] = float(abs((mu1 - mu0).mean() - truth.mean()))
        return found

    def _outcomes(self, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled outcomes without and with treatment [rows] each; perturbed where ε is there."""
        mu0, second = _perturbed(answers).unbind(dim=1)
        return mu0, mu0 + second if self.form == "effect" else second


def _perturbed(answers: Tensor) -> Tensor:
    """The first two numbers of ``answers`` [rows, 3 or 4]: as they are, or perturbed by ε, the
    last. The propensity is held within [0.01, 0.99], so that h is bounded."""
    import torch

    pair = answers[:, :2]
    if answers.shape[1] == 3:  # a student says them as they are
        return pair
    treated = torch.sigmoid(answers[:, 2]).clamp(TRIM, 1 - TRIM)
    untreated = torch.sigmoid(-answers[:, 2]).clamp(TRIM, 1 - TRIM)
    clever = torch.stack([-1 / untreated, 1 / treated], dim=1)
    return pair + _LOUDNESS * answers[:, 3:] * clever


def treatment(name: str, dictionary: Dictionary) -> Treatment:
    """An outcome of each arm."""
    assert isinstance(dictionary.label, EffectLabel)  # noqa: S101  (what it needs)
    return Treatment(name, dictionary.label)


def treatment_effect(name: str, dictionary: Dictionary) -> Treatment:
    """The effect itself."""
    assert isinstance(dictionary.label, EffectLabel)  # noqa: S101
    return Treatment(name, dictionary.label, "effect")


def treatment_targeted(name: str, dictionary: Dictionary) -> Treatment:
    """An outcome of each arm, under targeted regularisation."""
    assert isinstance(dictionary.label, EffectLabel)  # noqa: S101
    return Treatment(name, dictionary.label, "targeted")
