"""Made-up patients, hospitals and requests, to audit and to price; the code they meet is real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.guard import MemoryGuard
from client.hospital import Hospital
from client.rounds import train
from common.dictionary import Column
from common.features import FeatureMap, scaling_from_tensor
from common.models import build_student, build_teacher
from common.molecules import LONGEST
from common.randomness import NoiseSource
from common.study import Study, parse_study
from common.tables import Table, TableReport
from common.wire import TrainTask

PATIENTS = 60
# Aspirin, caffeine, ibuprofen and paracetamol.
_COMPOUNDS = [
    b"CC(=O)Oc1ccccc1C(=O)O",
    b"Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    b"CC(C)Cc1ccc(C(C)C(=O)O)cc1",
    b"CC(=O)Nc1ccc(O)cc1",
]


def made_up_study(
    *, sampling_rate: float = 1.0, local_steps: int = 1, distill: bool = False
) -> Study:
    """A small study under local trust at ε = 3; SGD at rate 1, so that updates show the sums."""
    sgd = {"kind": "sgd", "learning_rate": 1.0}
    return parse_study(
        {
            "name": "audit",
            "task": "diagnosis",
            "dictionary": {
                "patient_id": "patient",
                "label": {"name": "ill", "classes": [[0], [1]]},
                "columns": [
                    {"name": f"c{one}", "kind": "numeric", "range": [-4.0, 4.0]} for one in range(8)
                ],
            },
            "public": {"kind": "dictionary", "records": 16},
            "teacher": {"kind": "mlp", "hidden": [48, 32], "skip": True},
            "student": {"kind": "mlp", "hidden": [8]},
            "pretrain": {"steps": 0, "optimiser": sgd},
            "finetune": {
                "rounds": 4,
                "local_steps": local_steps,
                "sampling_rate": sampling_rate,
                "trainable": "all",
                "optimiser": sgd,
            },
            "distill": {
                "on": "patients" if distill else "public",
                "rounds": 2,
                "local_steps": 2,
                "sampling_rate": 0.5,
                "optimiser": sgd,
            },
            "privacy": {"trust": "local", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 0.05},
        },
        origin="audit",
    )


def made_up_table(study: Study, patients: int) -> Table:
    """``patients`` patients with one random record each; the same every time."""
    generator = np.random.default_rng(0)
    dictionary = study.dictionary
    columns = {one.name: _cells(one, patients, generator) for one in dictionary.columns}
    if dictionary.label.kind == "text":
        labels = columns[dictionary.columns[0].name]
    else:
        labels = _labels(dictionary.label, patients, generator)
    return rows_of(study, columns, labels, [f"p{one}" for one in range(patients)])


def _cells(column: Column, rows: int, generator: np.random.Generator) -> NDArray[Any]:
    if column.kind == "numeric":
        return generator.normal(0, 1, rows)
    if column.kind == "image":
        assert column.shape is not None  # noqa: S101  (the dictionary refuses it otherwise)
        return generator.random((rows, *column.shape), dtype=np.float32)
    if column.kind == "text":
        assert column.length is not None and column.vocabulary is not None  # noqa: S101
        return generator.integers(1, column.vocabulary, (rows, column.length)).astype(np.int32)
    if column.kind == "molecule":
        return generator.choice(_COMPOUNDS, rows).astype(f"S{LONGEST}")
    return generator.integers(0, column.buckets or len(column.categories), rows)


def _labels(label: Any, rows: int, generator: np.random.Generator) -> NDArray[Any]:
    if label.kind == "classes":
        return generator.integers(0, len(label.classes), rows)
    if label.kind == "several":
        return generator.integers(0, 2, (rows, len(label.names))).astype(np.float32)
    low, high = label.range
    number: NDArray[np.float64] = generator.uniform(low, high, rows)
    if label.kind == "number":
        return number[:, None].astype(np.float32)
    either = generator.integers(0, 2, rows)
    if label.kind == "survival":
        return np.stack([number, either], axis=1).astype(np.float32)
    unknown = np.full(rows, np.nan)
    return np.stack([either, number, unknown, unknown], axis=1).astype(np.float32)


def rows_of(study: Study, values: Any, labels: Any, names: list[str]) -> Table:
    """A table of these columns, labels and patients' names."""
    return Table(
        dictionary=study.dictionary,
        values=values,
        labels=np.asarray(labels),
        patients=np.array(names, dtype=object),
        report=TableReport(rows=len(names), patients=len(set(names)), unlabelled=0, columns=()),
    )


def joined(table: Table, extra: Table) -> Table:
    """The rows of both tables."""
    values = {
        name: np.concatenate([column, extra.values[name]]) for name, column in table.values.items()
    }
    return replace(
        table,
        values=values,
        labels=np.concatenate([table.labels, extra.labels]),
        patients=np.concatenate([table.patients, extra.patients]),
    )


def made_up_hospital(
    study: Study, name: str, noise: NoiseSource, train: Table | None = None
) -> Hospital:
    """A hospital in memory; it declares ``PATIENTS`` whatever its table holds."""
    table = made_up_table(study, PATIENTS)
    rows = table if train is None else train
    return Hospital(name, study, rows, table, PATIENTS, MemoryGuard(noise))


def real_update(
    hospital: Hospital,
    *,
    attempt: int,
    stage: str = "finetune",
    round: int = 0,  # noqa: A002
) -> Tensor:
    """One real answer of the hospital to a training request, at a gate with nothing spent."""
    study = hospital.study
    numeric = sum(one.kind == "numeric" for one in study.dictionary.columns)
    scaling = torch.tensor([[0.0, 1.0]] * numeric)
    features = FeatureMap(study.dictionary, scaling_from_tensor(study.dictionary, scaling))
    teacher, student = build_teacher(study, features), build_student(study, features)
    task = TrainTask(
        study_digest=study.digest(),
        stage=stage,
        round=round,
        attempt=attempt,
        teacher=dict(teacher.state_dict()),
        student=dict(student.state_dict()),
        scaling=scaling,
    )
    fresh = replace(hospital, guard=MemoryGuard(hospital.guard.noise))
    return train(fresh, task).update
