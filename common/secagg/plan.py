"""From a study and a round to the encoding and the terms of its sum; alike at every party."""

from __future__ import annotations

from functools import lru_cache

from common.privacy.budget import budget_of
from common.secagg.encoding import Encoding
from common.secagg.terms import Terms
from common.study import Study
from common.tensors import digest_tensors
from common.wire import TrainTask

# Room for so many patients of one hospital in one step before a coordinate may be limited.
_UNITS = 2**14


def encoding_of(study: Study, stage: str, length: int) -> Encoding:
    """How one step's clipped gradients [length] become integers with this study's noise."""
    plan = budget_of(study).charge(stage).plan
    federation = study.federation
    if federation.hospitals is None:
        raise ValueError("encoding_of needs a study with trust = 'distributed'")
    return _encoding(
        length,
        plan.clip_norm,
        federation.hospitals,
        federation.hospitals - federation.tolerated_dropouts,
        federation.tolerated_colluders,
        plan.noise_multiplier,
    )


@lru_cache(maxsize=64)
def _encoding(
    length: int,
    clip_norm: float,
    hospitals: int,
    threshold: int,
    colluders: int,
    noise_multiplier: float,
) -> Encoding:
    return Encoding.fitting(
        length=length,
        clip_norm=clip_norm,
        units=_UNITS,
        hospitals=hospitals,
        threshold=threshold,
        colluders=colluders,
        noise_multiplier=noise_multiplier,
    )


def terms_of(study: Study, task: TrainTask, encoding: Encoding) -> Terms:
    """What this attempt is about; a different model, round or range gives different terms."""
    models = {f"teacher/{name}": one for name, one in task.teacher.items()}
    models |= {f"student/{name}": one for name, one in task.student.items()}
    models["scaling"] = task.scaling
    return Terms(
        run=study.digest(),
        stage=task.stage,
        round=task.round,
        step=0,
        attempt=task.attempt,
        model=bytes.fromhex(digest_tensors(models)),
        plan=encoding.digest,
        hospitals=encoding.hospitals,
        threshold=encoding.threshold,
        colluders=encoding.colluders,
        length=encoding.length,
        input_bound=encoding.input_bound,
    )
