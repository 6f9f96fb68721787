"""A bag of words learns through its teacher's word vectors, and keeps nothing of the teacher."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from common.learning import distill
from common.learning.evaluate import answer
from common.learning.words import standardised, words_of
from common.models import Student, Teacher, build_student
from common.models.pretrained import PinnedEncoder
from common.models.transformer import mean_of_tokens
from common.study import Study
from tests.unit.test_text import a_study, features_of

WIDTH = 8


class Words(PinnedEncoder):
    """A pre-trained model that is nothing but its words."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.vectors = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)) + 3.0

    @property
    def word_vectors(self) -> Tensor:
        return self.vectors

    def recall(self, tokens: Tensor) -> Tensor:
        return mean_of_tokens(self.vectors[tokens], tokens)


def a_teacher() -> Teacher:
    teacher = Teacher(Words(), width=WIDTH, skip=0, outputs=3)
    nn.init.normal_(teacher.head.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # what all words share tells no classes apart
        teacher.head.bias.copy_(-3.0 * teacher.head.weight.sum(dim=1))
    return teacher


def texts_of(first: int, last: int, seed: int) -> Tensor:
    """64 texts of 12 words from ``first`` to ``last``; some are shorter."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(first, last + 1, (64, 12), generator=generator)
    texts[::3, 6:] = 0
    return texts


def agreement(study: Study, student: Student) -> float:
    """With the teacher, on texts whose every word was in no text that the student learned by."""
    teacher, unseen = a_teacher(), texts_of(40, 63, 5)
    distill.distill_publicly(study, teacher, student, texts_of(1, 39, 4))
    same = answer(student, unseen).argmax(1) == answer(teacher, unseen).argmax(1)
    return float(same.double().mean())


def test_what_is_learned_of_some_words_holds_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    adam = {"kind": "adam", "learning_rate": 0.05}
    study = a_study(distill={"temperature": 1.0, "steps": 200, "batch": 32, "optimiser": adam})
    student = build_student(study, features_of(study))
    names = {name: tensor.shape for name, tensor in student.state_dict().items()}
    assert agreement(study, student) > 0.9
    assert {name: tensor.shape for name, tensor in student.state_dict().items()} == names
    monkeypatch.setattr(distill, "words_of", lambda *_, **__: nullcontext())
    assert agreement(study, build_student(study, features_of(study))) < 0.7


def test_a_teacher_reads_each_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the steps, and no more than are drawn (but for 256 by which the loss is watched)."""
    read = []

    def counted(self: Words, tokens: Tensor) -> Tensor:
        read.append(len(tokens))
        return mean_of_tokens(self.vectors[tokens], tokens)

    monkeypatch.setattr(Words, "recall", counted)
    adam = {"kind": "adam", "learning_rate": 0.05}
    for steps, texts in ((2, 2 * 32), (6, 3 * 64), (50, 3 * 64)):
        study = a_study(distill={"steps": steps, "batch": 32, "excerpts": 2, "optimiser": adam})
        read.clear()
        student = build_student(study, features_of(study))
        distill.distill_publicly(study, a_teacher(), student, texts_of(1, 63, 8))
        assert sum(read) == 256 + texts


def test_means_of_words_are_standardised_over_the_public_texts() -> None:
    texts = texts_of(1, 63, 6)
    words = standardised(Words().vectors, texts)
    assert words.shape == (65, WIDTH)
    assert not words[0].any() and not words[64].any()
    means = mean_of_tokens(words[texts], texts)
    torch.testing.assert_close(means.mean(dim=0), torch.zeros(WIDTH), atol=1e-5, rtol=0)
    spread = means.std(dim=0, correction=0)
    torch.testing.assert_close(spread, torch.full((WIDTH,), WIDTH**-0.5))


def test_a_transformer_keeps_its_own_words() -> None:
    study = a_study(student__layers=1)
    student = build_student(study, features_of(study))
    before = [one.shape for one in student.parameters()]
    with words_of(a_teacher(), student, texts_of(1, 63, 7), seed=0):
        assert [one.shape for one in student.parameters()] == before


def test_excerpts_are_stretches_of_their_text() -> None:
    rows = [list(range(1, 1 + size)) + [0] * (40 - size) for size in (40, 20, 3, 2, 1, 0)]
    texts = torch.tensor(rows)
    found = distill.excerpts(texts, 50, torch.Generator().manual_seed(0)).reshape(50, 6, 40)
    for drawn in found:
        for row, whole in zip(drawn.tolist(), rows, strict=True):
            kept, text = [one for one in row if one], [one for one in whole if one]
            assert row == kept + [0] * (40 - len(kept))  # padding is behind
            if len(text) < 3:
                assert kept == text
                continue
            assert (kept[0], kept[-1]) == (text[0], text[-1])
            inner = kept[1:-1]
            assert inner == list(range(inner[0], inner[0] + len(inner)))
            assert 0.3 * (len(text) - 2) <= len(inner) <= 0.8 * (len(text) - 2) + 1
    starts = {int(one[0, 1]) for one in found}
    assert min(starts) < 6
    assert max(starts) > 14
    assert len({int(one[0].count_nonzero()) for one in found}) > 10  # of many lengths
    again = distill.excerpts(texts, 50, torch.Generator().manual_seed(0)).reshape(50, 6, 40)
    assert torch.equal(found, again)
