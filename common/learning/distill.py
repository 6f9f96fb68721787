"""Distillation on public data: the student imitates the teacher where no patient is involved.

A function of the (already private) teacher and of public records only: free post-processing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.dictionary import PADDING, Column, Dictionary
from common.features import FeatureMap, centred_categories
from common.learning.augment import DRAWS, augmented
from common.learning.evaluate import answer
from common.learning.gradients import batch_gradient
from common.learning.loop import run
from common.learning.words import words_of
from common.models import Student, Teacher
from common.place import at_work, beside, here, wide
from common.study import Study
from common.tasks import task_of
from common.tensors import get_vector, set_vector

_WATCHED = 256
_JITTER = 0.1  # standard deviation added to mixed records, in scaled units
_SHORTEST, _LONGEST = 0.3, 0.8  # of a text, in an excerpt


def distill_publicly(study: Study, teacher: Teacher, student: Student, corpus: Tensor) -> float:
    """Train ``student`` in place to answer as ``teacher`` does; the final loss on mixed records.

    A bag of words learns through the words of a pinned teacher (see ``words_of``).
    """
    if study.distill.excerpts:
        generator = torch.Generator().manual_seed(study.seed + 7)
        corpus = torch.cat([corpus, excerpts(corpus, study.distill.excerpts, generator)])
    with words_of(teacher, student, corpus, seed=study.seed + 6), at_work(teacher, student):
        return _distill(study, teacher, student, corpus)


def _distill(study: Study, teacher: Teacher, student: Student, corpus: Tensor) -> float:
    spec, task = study.distill, task_of(study)
    # Half of one molecule and half of another are none.
    draw = plain if study.dictionary.modality == "molecule" else mixtures
    generator = torch.Generator().manual_seed(study.seed + 3)
    watched = draw(corpus, _WATCHED, torch.Generator().manual_seed(study.seed + 4))
    (watched,) = beside(teacher, watched)
    with torch.no_grad():
        watched_answers = teacher(watched)

    # Texts are drawn as they are: a teacher, which may be large, reads each once, unless few of
    # many are drawn. What it says of every token of every text would be too much to keep.
    texts = not corpus.is_floating_point() and study.dictionary.asks != "language"
    read_once = texts and len(corpus) <= spec.steps * spec.batch
    known = answer(teacher, corpus) if read_once else None

    def lesson() -> tuple[Tensor, Tensor]:
        if known is not None:
            chosen = torch.randint(len(corpus), (spec.batch,), generator=generator)
            batch, taught = beside(teacher, corpus[chosen], known[chosen])
            return batch, taught
        batch = draw(corpus, spec.batch, generator)
        if spec.augment is not None:
            draws = torch.rand(len(batch), DRAWS, generator=generator)
            batch = augmented(batch, draws, spec.augment)
        (batch,) = beside(teacher, batch)
        with torch.no_grad():
            return batch, teacher(batch)

    def objective() -> Tensor:
        batch, taught = lesson()
        with here().passing():
            answers = student(batch)
        return task.distill_loss(wide(answers), taught, spec.temperature).mean()

    def watch(weights: Tensor) -> float:
        set_vector(student, weights)
        with torch.no_grad():
            each = task.distill_loss(student(watched), watched_answers, spec.temperature)
            return float(each.mean())

    start = get_vector(student)
    weights = run(
        start, batch_gradient(student, objective), spec.optimiser, steps=spec.steps, watch=watch
    )
    return watch(weights)


def excerpts(texts: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """``each`` random stretches of every text: token ids [texts, T] → [texts · each, T].

    A stretch is three to eight tenths of what lies between the text's first and last token. These
    two stay, since models' tokenisers mark there where a text begins and ends.
    """
    texts = texts.repeat(each, 1)
    present = (texts != PADDING).sum(dim=1)
    inner = (present - 2).clamp(min=0)
    share, place = torch.rand(2, len(texts), generator=generator)
    taken = (inner * (_SHORTEST + (_LONGEST - _SHORTEST) * share)).ceil().long()
    start = ((inner - taken + 1) * place).long()
    position = torch.arange(texts.shape[1])
    source = torch.where(position == 0, 0, start[:, None] + position)
    last = present.clamp(max=2) + taken - 1
    source = torch.where(position == last[:, None], present[:, None] - 1, source)
    found = texts.gather(1, source.clamp(0, texts.shape[1] - 1))
    return found.masked_fill(position > last[:, None], PADDING)


def plain(corpus: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """``rows`` public records as they are."""
    return corpus[torch.randint(len(corpus), (rows,), generator=generator)]


def mixtures(corpus: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """``rows`` new records between pairs of public ones, with a little noise.

    Mixing (Zhang et al. 2018) covers the space between records, where the student must also agree
    with its teacher. Between two texts there is none: they stay as they are.
    """
    first = corpus[torch.randint(len(corpus), (rows,), generator=generator)]
    if not corpus.is_floating_point():
        return first
    second = corpus[torch.randint(len(corpus), (rows,), generator=generator)]
    weight = torch.rand(rows, *([1] * (corpus.dim() - 1)), generator=generator)
    # Half of the records stay as they are.
    weight = torch.where(weight < 0.5, torch.zeros_like(weight), weight)
    mixed = first * (1 - weight) + second * weight
    return mixed + _JITTER * torch.randn(mixed.shape, generator=generator)


def records_from_dictionary(
    dictionary: Dictionary, features: FeatureMap, rows: int, generator: torch.Generator
) -> Tensor:
    """Public records drawn from the dictionary alone: scaled values from N(0, 1) held within the
    plausible range, categories by their published shares, else uniformly, optional columns absent
    half of the time."""
    columns: list[Tensor] = []
    for column in dictionary.columns:
        absent = (
            torch.rand(rows, 1, generator=generator) < 0.5
            if column.optional
            else torch.zeros(rows, 1, dtype=torch.bool)
        )
        if column.kind == "numeric":
            block = torch.randn(rows, 1, generator=generator).clamp(-2, 2)
        elif column.kind == "code":
            width = column.keep or column.buckets or 0
            # One place more than there are: a code that is not kept is all zeros.
            choice = torch.randint(width + 1, (rows,), generator=generator)
            block = torch.eye(width + 1)[choice][:, :width]
        else:
            choice = _categories(column, rows, generator)
            block = torch.from_numpy(centred_categories(column)).float()[choice]
        block = block.masked_fill(absent, 0.0)
        columns.append(torch.cat([block, absent.float()], dim=1) if column.optional else block)
    drawn = torch.cat(columns, dim=1)
    if drawn.shape[1] != features.width:
        raise ValueError(f"drew {drawn.shape[1]} inputs for a map of {features.width}")
    return drawn


def _categories(column: Column, rows: int, generator: torch.Generator) -> Tensor:
    """``rows`` of the column's categories, as indices [rows]."""
    if column.shares is None:
        return torch.randint(len(column.categories), (rows,), generator=generator)
    return torch.multinomial(
        torch.tensor(column.shares), rows, replacement=True, generator=generator
    )
