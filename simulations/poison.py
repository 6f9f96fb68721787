"""What a scenario does to hospitals' records: columns never measured, labels and triggers planted.

Attackers poison training patients only, so that every test patient stays honest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.labels import ClassLabel
from common.scenario import DATA_ATTACKS, AttackSpec, ScenarioSpec
from common.study import Study
from common.tables import Table
from simulations.draws import chosen, first


def scenario_of(study: Study) -> ScenarioSpec:
    """The study's scenario; the one in which nothing goes wrong when it has none."""
    spec = study.simulation.scenario if study.simulation else None
    return spec or ScenarioSpec()


def attackers(study: Study) -> frozenset[str]:
    """The names of the hospitals that attack."""
    attack = scenario_of(study).attack
    if attack is None or study.simulation is None:
        return frozenset()
    return chosen(study.seed, attack.hospitals, study.simulation.names, "attackers")


def without_columns(study: Study, hospital: str, table: Table) -> Table:
    """``table`` without the columns that this hospital never measures."""
    spec = scenario_of(study).missing_columns
    if spec is None or study.simulation is None:
        return table
    some = chosen(study.seed, spec.hospitals, study.simulation.names, "missing columns")
    if hospital not in some:
        return table
    return _with_values(table, {name: _absent(table.values[name]) for name in spec.columns})


def poisoned(study: Study, hospital: str, train: Table) -> Table:
    """The training records that an attacker's software really learns from."""
    attack = scenario_of(study).attack
    if attack is None or attack.kind not in DATA_ATTACKS or hospital not in attackers(study):
        return train
    patients = list(dict.fromkeys(train.patients))
    count = round(attack.poisoned_share * len(patients))
    victims = set(first(study.seed, patients, count, "poisoned", hospital))
    rows = np.array([patient in victims for patient in train.patients], dtype=bool)
    if attack.kind == "label_flip":
        label = study.dictionary.label
        assert isinstance(label, ClassLabel)  # noqa: S101  (the study file refuses it otherwise)
        classes = len(label.classes)
        labels = np.where(rows, (train.labels + 1) % classes, train.labels)
        return replace(train, labels=labels.astype(train.labels.dtype))
    assert attack.target_class is not None  # noqa: S101  (the study file refuses it otherwise)
    stamped = stamp(attack, train)
    values = {
        name: np.where(rows.reshape(-1, *[1] * (column.ndim - 1)), stamped.values[name], column)
        for name, column in train.values.items()
    }
    labels = np.where(rows, attack.target_class, train.labels).astype(train.labels.dtype)
    return replace(train, values=values, labels=labels)


def stamp(attack: AttackSpec, table: Table) -> Table:
    """Every record with the backdoor's trigger in it; labels as they were."""
    if attack.patch is not None:
        name = table.dictionary.columns[0].name
        images = table.values[name].copy()
        images[:, -attack.patch :, -attack.patch :] = 1.0
        return _with_values(table, {name: images})
    planted: dict[str, NDArray[Any]] = {}
    for column in table.dictionary.columns:
        if column.name in attack.trigger:
            value, old = attack.trigger[column.name], table.values[column.name]
            code = value if column.kind == "numeric" else column.categories.index(value)
            planted[column.name] = np.full_like(old, code)
    return _with_values(table, planted)


def _with_values(table: Table, changed: Mapping[str, NDArray[Any]]) -> Table:
    return replace(table, values={**table.values, **changed})


def _absent(values: NDArray[Any]) -> NDArray[Any]:
    return np.full_like(values, -1 if values.dtype.kind in "iu" else np.nan)
