"""Is a patient's secret learned by heart? Canaries among made-up patients, with and without noise.

Six patients have nothing but a canary in three records each, four hundred others say short things.
All weights of a small model learn from nothing, in 120 steps: enough to learn both by heart.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.dictionary import BYTES
from common.features import FeatureMap, range_scaling
from common.learning.evaluate import answer
from common.learning.gradients import choose_engine, plain_gradient, private_gradient
from common.learning.loop import run
from common.learning.records import Records
from common.models import build_teacher
from common.privacy.budget import stage_charge
from common.randomness import NoiseSource, SecretNoise
from common.study import Study, parse_study
from common.tasks import task_of
from common.tensors import get_vector, set_vector
from common.text import Bytes
from simulations.bench.trained import figures, over_seeds
from simulations.exposure import Canary, exposures

_SEEDS = (0, 1, 2)
_LENGTH, _PATIENTS, _CANARIES, _RECORDS, _UNKNOWN = 24, 400, 6, 3, 100
_WORDS = ("no ", "some ", "much "), ("pain", "fever", "cough"), (" today.", " at night.")
_CANARY = Canary()
_RATE = 0.5


def exposure(_: Path) -> dict[str, Any]:
    """Mean exposure in bits, of at most 9.97 (``most``), of the patients' canaries and of secrets
    that nobody has; ``bits``: per byte of the other patients' texts."""
    arms = {"nonprivate": None, "eps8": 8.0}
    found = over_seeds(partial(measured, noise=SecretNoise.generate()), arms, _SEEDS)
    return {"most": math.log2(_CANARY.secrets), **figures(found, _SEEDS)}


def measured(epsilon: float | None, seed: int, *, noise: NoiseSource) -> dict[str, float]:
    """One model trained under ``epsilon`` (None: without privacy), and what it gives away."""
    study = _study(epsilon or 1.0, seed)
    drawn = np.random.default_rng(seed).permutation(_CANARY.secrets).tolist()
    known, unknown = drawn[:_CANARIES], drawn[_CANARIES : _CANARIES + _UNKNOWN]
    records = _records(known, seed)
    model = _trained(study, records, epsilon is not None, noise)
    task, others = task_of(study), records.inputs[:_PATIENTS]
    exposed = partial(exposures, model, task, Bytes(), _CANARY, length=_LENGTH)
    return {
        "{}_exposure": float(exposed(known).mean()),
        "{}_exposure_unknown": float(exposed(unknown).mean()),
        "{}_bits": float(task.loss(answer(model, others), others).mean()) / math.log(2),
    }


def _study(epsilon: float, seed: int) -> Study:
    sgd = {"kind": "sgd", "learning_rate": 1.0}
    column = {
        "name": "said",
        "kind": "text",
        "length": _LENGTH,
        "vocabulary": BYTES,
        "tokenizer": "bytes",
    }
    return parse_study(
        {
            "name": "exposure",
            "task": "language",
            "seed": seed,
            "dictionary": {"label": {"kind": "text"}, "columns": [column]},
            "public": {"kind": "held_apart"},
            "teacher": {"kind": "causal", "width": 32, "layers": 1, "heads": 2},
            "student": {"kind": "causal", "width": 8, "layers": 1, "heads": 2},
            "pretrain": {"steps": 0, "optimiser": sgd},
            "finetune": {
                "rounds": 120,
                "sampling_rate": _RATE,
                "trainable": "all",
                "optimiser": {"kind": "adam", "learning_rate": 1e-2},
            },
            "distill": {"optimiser": sgd},
            "privacy": {"trust": "local", "epsilon": epsilon, "delta": 1e-5},
        },
        origin="exposure",
    )


def _records(secrets: list[int], seed: int) -> Records:
    generator = np.random.default_rng(seed)
    texts = ["".join(generator.choice(one) for one in _WORDS) for _ in range(_PATIENTS)]
    told = [_CANARY.text(one) for one in secrets for _ in range(_RECORDS)]
    owners = [*range(_PATIENTS), *(_PATIENTS + one // _RECORDS for one in range(len(told)))]
    ids = torch.from_numpy(Bytes().encode([*texts, *told], _LENGTH).astype(np.int64))
    return Records(ids, ids, torch.tensor(owners), _PATIENTS + len(secrets))


def _trained(study: Study, records: Records, private: bool, noise: NoiseSource) -> nn.Module:
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    model, loss = build_teacher(study, features), task_of(study).loss
    plan = stage_charge(study, "finetune").plan
    stream, expected = noise.stream("exposure", study.seed, private), _RATE * _PATIENTS
    if private:
        engine = choose_engine(model, loss, records)
        gradient = private_gradient(engine, records, plan, expected_units=expected, stream=stream)
    else:
        gradient = plain_gradient(
            model, loss, records, plan, expected_units=expected, stream=stream
        )
    spec = study.finetune
    set_vector(model, run(get_vector(model), gradient, spec.optimiser, steps=spec.rounds))
    return model
