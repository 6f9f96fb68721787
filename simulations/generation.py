"""What a finished run's model writes: sampled token by token, from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.dictionary import PADDING
from common.errors import StudyError
from common.learning.evaluate import answer
from common.text import Tokeniser, tokeniser_of
from server.store import RunFolder
from simulations.evaluation import finished_models

NOTICE = "Made up by a model: no patient, and not for care."


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn: ``tokens`` at most, from logits / ``temperature`` (0: the likeliest
    each time), repeatably by ``seed``."""

    tokens: int = 100
    temperature: float = 1.0
    seed: int = 0


def generate(path: Path, prompt: str, draw: Draw, *, teacher: bool = False) -> str:
    """How the student (or ``teacher``) of the finished run at ``path`` continues ``prompt``.

    Raises RunError where there is no finished run; StudyError where its model does not write, its
    tokens cannot be read again, or the prompt fills all that the model reads.
    """
    run, study = RunFolder.open(path)
    column = study.dictionary.text
    if column is None or study.dictionary.asks != "language":
        raise StudyError(
            f"{path}: expected the run of a study whose model writes (task = 'language'), found "
            f"task = {study.task!r}"
        )
    assert column.length is not None  # noqa: S101  (a text has one)
    tokeniser = tokeniser_of(column)
    tokeniser.decode([])  # refuses before anything is loaded
    start = _prompt_ids(tokeniser, prompt, column.length)
    taught, student, _ = finished_models(run, study)
    ids = continuation(
        taught if teacher else student, start, draw, length=column.length, end=tokeniser.end
    )
    return tokeniser.decode(ids)


def continuation(
    model: nn.Module, start: list[int], draw: Draw, *, length: int, end: int | None
) -> list[int]:
    """The ids that ``model`` writes behind ``start``, up to ``end``; ``length`` in all at most."""
    generator = torch.Generator().manual_seed(draw.seed)
    ids = list(start)
    for _ in range(min(draw.tokens, length - len(start))):
        # Any token holds the place that is asked for: a causal model does not look at it.
        logits = answer(model, torch.tensor([[*ids, PADDING + 1]]))[0, -1]
        logits[PADDING] = -torch.inf
        if draw.temperature > 0:
            law = torch.softmax(logits / draw.temperature, dim=0)
            found = int(torch.multinomial(law, 1, generator=generator))
        else:
            found = int(logits.argmax())
        if found == end:
            break
        ids.append(found)
    return ids[len(start) :]


def _prompt_ids(tokeniser: Tokeniser, prompt: str, length: int) -> list[int]:
    (row,) = tokeniser.encode([prompt], length + 1)
    ids: list[int] = row[: np.count_nonzero(row)].tolist()
    if ids and ids[-1] == tokeniser.end:
        ids.pop()
    if len(ids) >= length:
        raise StudyError(
            f"--prompt: expected fewer than {length} tokens, as many as the model reads, found "
            f"more; shorten it"
        )
    return ids
