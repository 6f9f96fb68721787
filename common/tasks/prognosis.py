"""When an event comes: a survival curve, from records some of which end before the event.

A discrete-time model: the hazard of each of the label's intervals. Its likelihood is a sum over
patients, each clipped by itself. Cox's partial likelihood is not: every patient stands in the
denominators of all who had the event before, so that no gradient belongs to one patient alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.dictionary import Dictionary
from common.labels import SurvivalLabel
from common.learning.survival_metrics import (
    calibration,
    concordance,
    concordance_from_histogram,
    integrated_brier,
    lost_share,
    outcome_groups,
    risk_histogram,
)
from common.tasks.task import Floats, Measure

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["hazard", "mass"]

# How loud the intervals' departures are beside the shared risk. Few events, and noise, leave
# little to learn of each interval by itself: what all have in common is learned 25 times faster.
_DEPARTURE = 0.2


@dataclass(frozen=True)
class Prognosis:
    """Answers [rows, 1 + intervals]: a patient's risk, and how each interval departs from it.

    Their sums say how likely the event is in each interval. ``form``: as ``hazard`` a sum is the
    logit of the hazard, given that the patient came so far (logistic hazard; Gensheimer &
    Narasimhan 2019, PeerJ 7:e6257); as ``mass`` the sums and a 0 for "later" are the logits of when
    the event comes (PMF; Kvamme & Borgan 2021, Lifetime Data Anal. 27). Both have the same
    likelihood; they differ in what is linear. ``label.typical``: where answers of 0 start.
    """

    name: str
    label: SurvivalLabel
    form: Form = "hazard"

    measures = (
        Measure("cindex", "C-index", chance=0.5, needs="an event and a patient known to be later"),
        Measure("uno", "Uno's C", chance=0.5, needs="an event and a patient known to be later"),
        Measure(
            "ibs",
            "Brier score",
            higher_is_better=False,
            needs="patients observed beyond the second cut",
        ),
        Measure(
            "calibration",
            "calibration error",
            higher_is_better=False,
            needs="a patient observed beyond the last cut",
        ),
    )

    @property
    def outputs(self) -> int:
        """One, and one for each interval."""
        return 1 + len(self.label.cuts)

    @cached_property
    def cuts(self) -> Floats:
        """The ends of the intervals [cuts]."""
        return np.array(self.label.cuts)

    @cached_property
    def start(self) -> Tensor:
        """What sums of 0 mean, as logits [intervals]: ``label.typical``, else an even chance
        in every interval (``hazard``) or for every one (``mass``)."""
        import torch

        if self.label.typical is None:
            return torch.zeros(len(self.cuts))
        curve = torch.tensor([1.0, *self.label.typical], dtype=torch.float64)
        lost = curve[:-1] - curve[1:]
        rest = curve[1:] if self.form == "hazard" else curve[-1]
        return torch.log(lost / rest).float()

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """[rows, 2, intervals]: whether the patient is known to have passed an interval or to have
        had the event in it; and whether that was so. A patient censored in an interval counts as
        having passed it from its middle on (Gensheimer & Narasimhan 2019)."""
        import torch

        times, seen = labels[:, :1].astype(np.float64), labels[:, 1:] > 0
        starts = np.concatenate([[0.0], self.cuts[:-1]])
        event = seen & (times > starts) & (times <= self.cuts)
        event[:, 0] |= (seen & (times <= 0))[:, 0]
        passed = np.where(seen, times > self.cuts, times >= (starts + self.cuts) / 2)
        return torch.from_numpy(np.stack([passed | event, event], axis=1).astype(np.float32))

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each record [rows]: of the event in its interval, and of
        none in those before."""
        from torch.nn import functional

        known, event = targets[:, 0], targets[:, 1]
        each = functional.binary_cross_entropy_with_logits(
            self.logits(answers), event.to(answers.dtype), reduction="none"
        )
        return (each * known).sum(dim=1)

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Softened cross-entropy of the hazards, summed over the intervals, × T²."""
        import torch
        from torch.nn import functional

        wanted = torch.sigmoid(self.logits(taught) / temperature)
        each = functional.binary_cross_entropy_with_logits(
            self.logits(answers) / temperature, wanted, reduction="none"
        )
        return each.sum(dim=1) * temperature**2

    def predictions(self, answers: Tensor, inputs: Tensor) -> Tensor:  # noqa: ARG002
        """Survival at each of the cuts [rows, cuts]."""
        import torch
        from torch.nn import functional

        return torch.exp(torch.cumsum(functional.logsigmoid(-self.logits(answers)), dim=1))

    def figures(self, labels: NDArray[Any], predictions: Floats) -> dict[str, float]:
        """Concordance (Harrell's and Uno's) up to the last cut, integrated Brier score over the
        cuts, calibration error at the last."""
        times, seen = labels[:, 0].astype(np.float64), labels[:, 1] > 0
        risk, last = lost_share(predictions, self.cuts), float(self.cuts[-1])
        return {
            "cindex": concordance(times, seen, risk),
            "uno": concordance(times, seen, risk, until=last, weighted=True),
            "ibs": integrated_brier(times, seen, predictions, self.cuts),
            "calibration": calibration(times, seen, predictions[:, -1], last),
        }

    def contributions(
        self, labels: NDArray[Any], predictions: Floats, owners: NDArray[np.int64], bins: int
    ) -> Floats:
        """A histogram of risk by outcome; see ``risk_histogram``."""
        return risk_histogram(labels.astype(np.float64), predictions, owners, self.cuts, bins)

    def release_shape(self, bins: int) -> tuple[int, int]:
        """Outcomes × bins of the risk."""
        return outcome_groups(len(self.cuts)), bins

    def released_figures(self, counts: Floats) -> dict[str, float]:
        """Harrell's C, not held within [0, 1]; the others need the patients' own curves."""
        return {one.key: np.nan for one in self.measures} | {
            "cindex": concordance_from_histogram(counts)
        }

    def logits(self, answers: Tensor) -> Tensor:
        """Logits of the hazards [rows, intervals]."""
        import torch

        sums = answers[:, :1] + _DEPARTURE * answers[:, 1:] + self.start.to(answers)
        if self.form == "hazard":
            return sums
        # P(j) / P(after j): the logit of a hazard is the sum less the weight of all later ones.
        count = sums.shape[1]
        later = torch.ones(count, count, dtype=torch.bool, device=sums.device).triu(diagonal=1)
        after = sums[:, None, :].masked_fill(~later, -torch.inf)
        beyond = torch.zeros_like(after[:, :, :1])
        return sums - torch.logsumexp(torch.cat([after, beyond], dim=2), dim=2)


def prognosis(name: str, dictionary: Dictionary) -> Prognosis:
    """A model of hazards."""
    assert isinstance(dictionary.label, SurvivalLabel)  # noqa: S101  (what it needs)
    return Prognosis(name, dictionary.label)


def prognosis_by_mass(name: str, dictionary: Dictionary) -> Prognosis:
    """A model of when the event comes."""
    assert isinstance(dictionary.label, SurvivalLabel)  # noqa: S101
    return Prognosis(name, dictionary.label, "mass")
