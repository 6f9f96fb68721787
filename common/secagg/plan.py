"""From a study and a round to the encoding and the terms of its sum; alike at every party.

Four kinds of sums, named by their stage: ``statistics``, ``finetune``, ``distill``, ``evaluate``.
Each is a sum over patients of vectors clipped to the norm of the stage's charge.
"""

from __future__ import annotations

import math
from functools import lru_cache

from common.errors import PrivacyError, SecAggError, StudyError
from common.features import FeatureMap, moment_count, range_scaling
from common.models import build_student, build_teacher, learner
from common.privacy.budget import stage_charge
from common.privacy.units import Trust
from common.secagg.encoding import Encoding
from common.secagg.terms import Terms
from common.study import Study
from common.tasks import task_of
from common.tensors import digest_tensors, get_vector
from common.wire import AggregateTask

STAGES = ("statistics", "finetune", "distill", "evaluate")

# Room for so many patients of one hospital in one step before a coordinate may be limited.
_UNITS = 2**14


def encoding_of(study: Study, stage: str, length: int) -> Encoding:
    """How the clipped contributions [length] of one release become integers with its noise.

    Raises PrivacyError where so many hospitals and so little noise do not fit into 32 bits.
    """
    plan = stage_charge(study, stage).plan
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


def check_sums(study: Study) -> None:
    """Refuse, before anything is spent, a study of which some sum does not fit into 32 bits.

    Raises StudyError; studies without secure sums pass.
    """
    if study.privacy.trust is not Trust.DISTRIBUTED:
        return
    for stage, length in _lengths(study).items():
        try:
            encoding_of(study, stage, length)
        except (PrivacyError, SecAggError) as error:
            raise StudyError(
                f"{stage}: {study.federation.hospitals} hospitals' sums with so little noise do "
                f"not fit into 32 bits; lower ε or the number of hospitals ({error})"
            ) from None


def _lengths(study: Study) -> dict[str, int]:
    """Coordinates of every sum that ``study`` makes, by stage."""
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    learning = learner(study, build_teacher(study, features))
    shape = task_of(study).release_shape(study.evaluation.bins)
    found = {"finetune": get_vector(learning).numel()}
    if study.scaling == "private":
        found["statistics"] = moment_count(study.dictionary)
    if study.distill.on == "patients":
        found["distill"] = get_vector(build_student(study, features)).numel()
    if study.evaluation.epsilon is not None:
        found["evaluate"] = math.prod(shape)
    return found


def terms_of(study: Study, task: AggregateTask, encoding: Encoding) -> Terms:
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
