"""The next token of a text, for models that write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.dictionary import PADDING, Dictionary
from common.tasks.task import Floats, Measure, means_of_units

if TYPE_CHECKING:
    from torch import Tensor

# What a unit releases are three numbers within [0, 1]: their L2 norm is at most √3.
_NORM = math.sqrt(3)


@dataclass(frozen=True)
class Language:
    """Answers [rows, T, vocabulary]: the logits of each token, from those before it.

    A record's loss is the *mean* over its own tokens. Padding neither counts nor divides, so that
    the same text has the same gradient whatever ``length`` the dictionary reads, and clip norm and
    learning rate carry over. A sum over ``length`` would weigh all tokens alike, but give a patient
    with a short text a small gradient under noise that is as loud for everyone: as elsewhere, each
    patient counts alike. ``piece``: what a token is called in figures.
    """

    name: str
    outputs: int
    piece: str = "token"

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Mean cross-entropy in bits, the same as a perplexity, and how often the likeliest token
        was the next."""
        return (
            Measure("bits", f"bits per {self.piece}", higher_is_better=False, bounds=(0.0, None)),
            Measure("perplexity", "perplexity", higher_is_better=False, bounds=(1.0, None)),
            Measure("accuracy", f"next-{self.piece} accuracy"),
        )

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """Token ids [rows, T]; 0 behind a text's end."""
        import torch

        return torch.from_numpy(labels.astype(np.int64))

    def loss(self, answers: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over each record's own tokens [rows]; 0 for a text of none."""
        return _mean(-_of_tokens(answers.log_softmax(dim=2), targets), targets != PADDING)

    def distill_loss(self, answers: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Softened cross-entropy × T² (Hinton et al. 2015), the mean over each record's tokens:
        where there is none, a teacher answers 0 throughout."""
        wanted = (taught / temperature).softmax(dim=2)
        each = -(wanted * (answers / temperature).log_softmax(dim=2)).sum(dim=2)
        return _mean(each, (taught != 0).any(dim=2)) * temperature**2

    def predictions(self, answers: Tensor, inputs: Tensor) -> Tensor:
        """Of each of the text's own tokens the log-probability, and 1 where it was the likeliest;
        0 where there is none [rows, T, 2]."""
        import torch

        tokens = inputs.long()
        found = _of_tokens(answers.log_softmax(dim=2), tokens)
        likeliest = (answers.argmax(dim=2) == tokens).to(found.dtype)
        return torch.stack([found, likeliest], dim=2) * (tokens != PADDING)[..., None]

    def figures(self, labels: NDArray[Any], predictions: Floats) -> dict[str, float]:
        """All measures, over all tokens of all records."""
        return _figures(int((labels != PADDING).sum()), *predictions.sum(axis=(0, 1)).tolist())

    def contributions(
        self,
        labels: NDArray[Any],
        predictions: Floats,
        owners: NDArray[np.int64],
        bins: int,  # noqa: ARG002
    ) -> Floats:
        """Each unit's mean of (tokens, their cross-entropy, likeliest ones) / √3: [units, 3].

        Tokens and likeliest ones in units of the public ``length``; a record's mean cross-entropy
        is held at log(vocabulary), what guessing blindly costs, and divided by it. Each of the
        three is within [0, 1], so that a unit's L2 norm, and the sensitivity of the sum, is at most
        1.
        """
        length = labels.shape[1]
        tokens = (labels != PADDING).sum(axis=1)
        nats, right = -predictions[:, :, 0].sum(axis=1), predictions[:, :, 1].sum(axis=1)
        most = tokens * math.log(self.outputs)
        # A NaN of a broken model is the worst there is: it must not hide others' figures.
        held = np.clip(np.nan_to_num(nats, nan=np.inf), 0, most) / math.log(self.outputs)
        each = np.stack([tokens, held, np.nan_to_num(right)], axis=1) / length
        return means_of_units(each, owners) / _NORM

    def release_shape(self, bins: int) -> tuple[int, int]:  # noqa: ARG002
        """One line of three sums."""
        return 1, 3

    def released_figures(self, counts: Floats) -> dict[str, float]:
        """All measures from the (noised) sums. A mean that noise pushes beyond guessing blindly is
        held there."""
        tokens, nats, right = counts[0].tolist()
        if tokens <= 0:
            return {one.key: math.nan for one in self.measures}
        held = min(nats, tokens) * math.log(self.outputs)
        return _figures(tokens, -held, right)


def language(name: str, dictionary: Dictionary) -> Language:
    """A model of the texts themselves."""
    column = dictionary.text
    assert column is not None and column.vocabulary is not None  # noqa: S101  (what it needs)
    return Language(name, column.vocabulary, "byte" if column.tokenizer == "bytes" else "token")


def _of_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """``values`` [rows, T, vocabulary] at each token [rows, T]."""
    return values.gather(2, tokens[..., None])[..., 0]


def _mean(each: Tensor, present: Tensor) -> Tensor:
    """Mean of ``each`` [rows, T] over the tokens that are ``present`` [rows, T]; 0 for none."""
    return each.masked_fill(~present, 0.0).sum(dim=1) / present.sum(dim=1).clamp(min=1)


def _figures(tokens: float, log_likelihood: float, right: float) -> dict[str, float]:
    """From sums over tokens; NaN of none."""
    if tokens <= 0:
        return {"bits": math.nan, "perplexity": math.nan, "accuracy": math.nan}
    bits = -log_likelihood / tokens / math.log(2)
    return {"bits": bits, "perplexity": 2.0 ** min(bits, 1000.0), "accuracy": right / tokens}
