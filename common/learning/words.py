"""A bag of words that learns through the word vectors of a pre-trained teacher.

A few hundred public texts hold few of a vocabulary's words, and a bag that learns each word's
vector by itself knows nothing of the others. Here it learns one linear map of the teacher's word
vectors, which says something of every word (Mikolov et al. 2013 map between languages so); at the
end the mapped vectors are its own, and nothing of the teacher remains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common.dictionary import PADDING
from common.models import Student, Teacher
from common.models.pretrained import PinnedEncoder
from common.models.transformer import TokenEncoder, mean_of_tokens

_TEXTS_AT_ONCE = 64  # of 256 tokens with vectors of 384 numbers: 25 MB
_LEAST_SPREAD = 1e-6


@contextmanager
def words_of(teacher: Teacher, student: Student, corpus: Tensor, *, seed: int) -> Iterator[None]:
    """Within, a bag of words learns a map of the word vectors of its pinned teacher, in place of
    its own words. Other students, and those of other teachers, are left as they are.

    ``corpus`` [texts, T]: public texts, over which the vectors' means are standardised.
    """
    bags = [one for one in student.modules() if isinstance(one, TokenEncoder) and not one.blocks]
    if not (isinstance(teacher.encoder, PinnedEncoder) and bags):
        yield
        return
    vectors = standardised(teacher.encoder.word_vectors.cpu(), corpus)
    generator = torch.Generator().manual_seed(seed)
    for bag in bags:
        parametrize.register_parametrization(bag.words, "weight", _Mapped(vectors, generator))
    try:
        yield
    finally:
        for bag in bags:
            parametrize.remove_parametrizations(bag.words, "weight")


def standardised(vectors: Tensor, corpus: Tensor) -> Tensor:
    """Vectors [vocabulary, d] as [vocabulary + 1, d], so that the mean over a text's tokens has,
    over the texts of ``corpus``, mean 0 and standard deviation 1/√d in every direction.

    Padding, and the hidden token behind the others, are 0. Without this a few directions, which all
    words share, would drown the others.
    """
    means = torch.cat(
        [
            mean_of_tokens(nn.functional.embedding(texts, vectors), texts)
            for texts in torch.split(corpus, _TEXTS_AT_ONCE)
        ]
    )
    spread = means.std(dim=0, correction=0).clamp(min=_LEAST_SPREAD)
    found = (vectors - means.mean(dim=0)) / (spread * math.sqrt(vectors.shape[1]))
    found[PADDING] = 0.0
    return torch.cat([found, found.new_zeros(1, found.shape[1])])


class _Mapped(nn.Module):
    """A map [d, width] → words [vocabulary + 1, width]."""

    vectors: Tensor

    def __init__(self, vectors: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self._generator = generator

    def forward(self, chart: Tensor) -> Tensor:
        return self.vectors @ chart

    def right_inverse(self, words: Tensor) -> Tensor:
        """The map to start from; the words themselves are no map of others."""
        bound = 1 / math.sqrt(self.vectors.shape[1])
        chart = torch.empty(self.vectors.shape[1], words.shape[1])
        return chart.uniform_(-bound, bound, generator=self._generator)
