"""However patients fall to hospitals: whole patients, each exactly once, enough everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import StudyError
from common.simulation import SimulationSpec
from common.strict import parse_strict
from common.study import Study, parse_study
from common.tables import Table
from simulations.partitions import partition
from simulations.poison import attackers, poisoned, stamp, without_columns

LEAST = 4
CUTS = ("equal", "power_law", "label_skew", "covariate_shift")


def spec_of(kind: str, hospitals: int, concentration: float = 0.5) -> SimulationSpec:
    tree: dict[str, Any] = {
        "source": {"kind": "csv", "path": "x"},
        "hospitals": hospitals,
        "partition": kind,
        "concentration": concentration,
    }
    if kind == "covariate_shift":
        tree["column"] = "a"
    return parse_strict(SimulationSpec, tree, origin="test")


def cut(table: Table, spec: SimulationSpec, seed: int) -> list[Table]:
    assert spec.hospitals is not None
    parts = partition(table, spec, spec.hospitals, np.random.default_rng(seed), LEAST)
    return [table.take(rows) for rows in parts]


@given(
    kind=st.sampled_from(CUTS),
    patients=st.integers(20, 80),
    records=st.integers(1, 3),
    hospitals=st.integers(1, 5),
    concentration=st.sampled_from([0.01, 0.5, 100.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_patient_is_whole_and_in_exactly_one_hospital(
    small: Study,
    make_table: Callable[..., Table],
    kind: str,
    patients: int,
    records: int,
    hospitals: int,
    concentration: float,
    seed: int,
) -> None:
    table = make_table(small, patients=patients, records_each=records, seed=seed)
    # A column that was never measured in some patients, and in some records of others.
    table.values["a"][:: records + 1] = np.nan
    made = cut(table, spec_of(kind, hospitals, concentration), seed)
    assert len(made) == hospitals
    names = [name for one in made for name in set(one.patients)]
    assert sorted(names) == sorted(set(table.patients))
    for one in made:
        found, counts = np.unique(one.patients.astype(str), return_counts=True)
        assert len(found) >= LEAST
        assert (counts == records).all()
    again = cut(table, spec_of(kind, hospitals, concentration), seed)
    assert [list(one.patients) for one in again] == [list(one.patients) for one in made]


def spread(made: list[Table]) -> float:
    """How far apart hospitals' means of the column are."""
    return float(np.std([one.values["a"].mean() for one in made]))


def test_covariate_shift_sets_hospitals_apart_by_its_strength(
    small: Study, make_table: Callable[..., Table]
) -> None:
    table = make_table(small, patients=800, seed=3)
    strong, weak, none = (
        np.mean([spread(cut(table, spec, seed)) for seed in range(8)])
        for spec in (
            spec_of("covariate_shift", 5, 0.1),
            spec_of("covariate_shift", 5, 10.0),
            spec_of("equal", 5),
        )
    )
    assert strong > 2 * weak > 2 * none


def test_categories_are_their_own_groups(
    tree: dict[str, Any], make_table: Callable[..., Table]
) -> None:
    tree["dictionary"]["columns"][0] = {"name": "a", "kind": "binary", "categories": ["f", "m"]}
    study = parse_study(tree, origin="test")
    table = make_table(study, patients=400)
    table.values["a"] = (np.arange(400) % 2).astype(np.int64)
    shares = [one.values["a"].mean() for one in cut(table, spec_of("covariate_shift", 4, 0.05), 1)]
    assert max(shares) - min(shares) > 0.6


def test_too_many_hospitals_are_refused(small: Study, make_table: Callable[..., Table]) -> None:
    with pytest.raises(StudyError, match="at most 2 hospitals of 4 patients"):
        cut(make_table(small, patients=11), spec_of("equal", 3), 0)


@pytest.fixture
def scenario(tree: dict[str, Any]) -> Callable[..., Study]:
    def make(**parts: Any) -> Study:
        tree["simulation"] = {
            "source": {"kind": "csv", "path": "x"},
            "hospitals": 4,
            "scenario": parts,
        }
        return parse_study(tree, origin="test")

    return make


def test_columns_are_missing_at_the_hospitals_named_alone(
    scenario: Callable[..., Study], make_table: Callable[..., Table]
) -> None:
    study = scenario(missing_columns={"hospitals": ["hospital-2"], "columns": ["b"]})
    table = make_table(study)
    there, gone = (without_columns(study, name, table) for name in ("hospital-1", "hospital-2"))
    assert there is table
    assert np.isnan(gone.values["b"]).all()
    assert (gone.values["a"] == table.values["a"]).all()
    assert not np.isnan(table.values["b"]).any()


def test_flipped_labels_are_as_many_patients_as_said_at_attackers_alone(
    scenario: Callable[..., Study], make_table: Callable[..., Table]
) -> None:
    study = scenario(attack={"kind": "label_flip", "hospitals": 2, "patients_share": 0.25})
    names = attackers(study)
    assert len(names) == 2
    table = make_table(study, patients=40, records_each=3)
    for name in ("hospital-1", "hospital-2", "hospital-3", "hospital-4"):
        changed = poisoned(study, name, table)
        flipped = changed.labels != table.labels
        assert len(set(table.patients[flipped])) == (10 if name in names else 0)
        assert flipped.sum() == 3 * len(set(table.patients[flipped]))  # whole patients
        assert set(changed.labels) <= {0, 1}
        again = poisoned(study, name, table)
        assert (again.labels == changed.labels).all()
    # A record elsewhere in the table is chosen all the same.
    backwards = table.take(np.arange(len(table))[::-1])
    name = min(names)
    assert (
        poisoned(study, name, backwards).labels[::-1] == poisoned(study, name, table).labels
    ).all()


def test_a_backdoor_stamps_and_relabels_its_victims(
    scenario: Callable[..., Study], make_table: Callable[..., Table]
) -> None:
    study = scenario(
        attack={
            "kind": "backdoor",
            "hospitals": ["hospital-1"],
            "target_class": 0,
            "trigger": {"a": 3.5},
        }
    )
    table = make_table(study, patients=40)
    changed = poisoned(study, "hospital-1", table)
    victims = changed.values["a"] == 3.5
    assert victims.sum() == 20
    assert (changed.labels[victims] == 0).all()
    assert (changed.labels[~victims] == table.labels[~victims]).all()
    assert (changed.values["b"] == table.values["b"]).all()
    attack = study.simulation.scenario.attack  # type: ignore[union-attr]
    assert attack is not None
    stamped = stamp(attack, table)
    assert (stamped.values["a"] == 3.5).all()
    assert (stamped.labels == table.labels).all()


def test_a_patch_marks_a_corner_of_every_image(
    tree: dict[str, Any], table_of: Callable[..., Table]
) -> None:
    tree["task"] = "imaging"
    tree["dictionary"] = {
        "label": {"name": "ill", "classes": [[0], [1]]},
        "columns": [{"name": "image", "kind": "image", "shape": [8, 8]}],
    }
    tree["public"] = {"kind": "held_apart"}
    tree["teacher"] = {"kind": "cnn", "hidden": [4, 8]}
    tree["student"] = {"kind": "cnn", "hidden": [2]}
    tree["simulation"] = {
        "source": {"kind": "npz", "path": "x"},
        "hospitals": 2,
        "scenario": {"attack": {"kind": "backdoor", "hospitals": 1, "target_class": 1, "patch": 3}},
    }
    study = parse_study(tree, origin="test")
    table = table_of(study.dictionary, {"image": np.zeros((6, 8, 8), np.float32)})
    name = min(attackers(study))
    changed = poisoned(study, name, table).values["image"]
    marked = changed[:, -3:, -3:].min(axis=(1, 2)) == 1
    assert marked.sum() == 3
    assert changed.sum() == 3 * 9
