"""Whole patients, always; the same study gives the same hospitals, in memory and on disk."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.hospital import Hospital, open_hospital, split_patients, units_of
from client.hospitalfile import load_hospital_file
from client.sources.reading import read_public
from common.errors import DataError, StudyError
from common.features import FeatureMap, range_scaling
from common.privacy.units import PrivacyUnit
from common.study import EvaluationSpec, Study, load_study, parse_study
from common.tables import Table
from server.app import read_corpus
from simulations.hospitals import build_world, declared, open_world, seeded_noise, write_world

MakeTable = Callable[..., Table]
MakeHospital = Callable[..., Hospital]


def test_folds_hold_whole_patients_and_cover_all(small: Study, make_table: MakeTable) -> None:
    table = make_table(small, patients=57, records_each=3)
    tested: list[str] = []
    for fold in range(5):
        evaluation = EvaluationSpec(folds=5, fold=fold)
        train, test = split_patients(table, evaluation, seed=3, name="north")
        assert not set(train.patients) & set(test.patients)
        assert set(train.patients) | set(test.patients) == set(table.patients)
        assert len(train) + len(test) == len(table)
        assert set(Counter(test.patients).values()) == {3}
        tested += sorted(set(test.patients))
        labels = dict(zip(table.patients, table.labels, strict=True))
        share = np.mean(list(labels.values()))
        found = np.mean([labels[one] for one in set(test.patients)])
        assert abs(found - share) <= 1 / len(set(test.patients))  # stratified
    assert sorted(tested) == sorted(set(table.patients))


def test_a_split_depends_on_seed_and_name_alone(small: Study, make_table: MakeTable) -> None:
    table = make_table(small, patients=40)

    def tested(seed: int, name: str) -> list[str]:
        return split_patients(table, small.evaluation, seed=seed, name=name)[1].patients.tolist()

    assert tested(1, "north") == tested(1, "north")
    assert len({tuple(tested(*one)) for one in ((1, "north"), (2, "north"), (1, "south"))}) == 3


def test_too_few_patients_for_the_folds_is_refused(small: Study, make_table: MakeTable) -> None:
    with pytest.raises(DataError, match="at least 4 patients for as many folds, found 3"):
        split_patients(make_table(small, patients=3), small.evaluation, seed=0, name="n")


def test_records_as_units_need_one_record_per_patient(small: Study, make_table: MakeTable) -> None:
    once, twice = make_table(small, patients=5), make_table(small, patients=5, records_each=2)
    assert units_of(once, PrivacyUnit.RECORD)[1] == 5
    owners, units = units_of(twice, PrivacyUnit.PATIENT)
    assert (owners.tolist(), units) == ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], 5)
    with pytest.raises(DataError, match="10 records of 5 patients"):
        units_of(twice, PrivacyUnit.RECORD)


def test_the_rows_digest_sees_every_row(small: Study, make_hospital: MakeHospital) -> None:
    """A release over changed rows must not reuse its noise."""
    one, same = make_hospital(small).train, make_hospital(small).train
    assert one.digest == same.digest
    changed = one.values["a"].copy()
    changed[0] += 1e-9
    other = replace(one, values=dict(one.values) | {"a": changed})
    assert other.digest != one.digest
    assert one.take(np.arange(len(one) - 1)).digest != one.digest


# Worlds


def partition_of(study: Study, **changes: Any) -> list[Counter[str]]:
    world = build_world(
        study.revised(**{f"simulation__{key}": value for key, value in changes.items()}), Path()
    )
    everyone = [Counter(site.table.patients) for site in world.sites]
    assert world.corpus is not None
    return [*everyone, Counter(world.corpus.patients)]


@pytest.mark.parametrize(
    "changes",
    [
        {"partition": "equal"},
        {"partition": "power_law", "exponent": 1.5},
        {"partition": "label_skew", "concentration": 0.05},
    ],
    ids=lambda one: str(one["partition"]),
)
@pytest.mark.parametrize("hospitals", [1, 4, 60])
def test_partitions_cover_all_patients_once(
    wisconsin: Study, changes: dict[str, Any], hospitals: int
) -> None:
    parts = partition_of(wisconsin, hospitals=hospitals, **changes)
    total: Counter[str] = sum(parts, Counter())
    assert len(parts) == hospitals + 1
    assert len(total) == 569
    assert set(total.values()) == {1}
    sizes = [len(part) for part in parts[:-1]]
    assert min(sizes) >= wisconsin.evaluation.folds
    if changes["partition"] == "equal":
        assert max(sizes) - min(sizes) <= 1
    if changes["partition"] == "power_law":
        # Decreasing, but for rounding to whole patients.
        assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(sizes))
        assert hospitals == 1 or sizes[0] > 1.5 * sizes[-1]


def test_label_skew_skews(wisconsin: Study) -> None:
    def spread(concentration: float) -> float:
        study = wisconsin.revised(
            simulation__partition="label_skew",
            simulation__concentration=concentration,
            simulation__hospitals=6,
        )
        return float(np.std([one.table.labels.mean() for one in build_world(study, Path()).sites]))

    assert spread(0.1) > 3 * spread(1000.0)


def test_more_hospitals_than_patients_is_refused(wisconsin: Study) -> None:
    with pytest.raises(StudyError, match="expected at most 121 hospitals of 4 patients"):
        build_world(wisconsin.revised(simulation__hospitals=200), Path())


def test_the_world_follows_from_the_seed(wisconsin: Study) -> None:
    assert partition_of(wisconsin) == partition_of(wisconsin)
    other = wisconsin.revised(seed=5)
    assert partition_of(other) != partition_of(wisconsin)


def test_public_records_have_no_label_and_a_tiny_share_is_someone(wisconsin: Study) -> None:
    world = build_world(wisconsin.revised(public__fraction=1e-6), Path())
    assert world.corpus is not None
    assert len(world.corpus) == 1
    assert set(world.corpus.labels) == {-1}


def test_equal_identifiers_at_two_hospitals_are_two_patients(tree: Any, tmp_path: Path) -> None:
    for name in ("n", "s"):
        rows = "\n".join(f"{one},0.5,0.5,{one % 2}" for one in range(8))
        (tmp_path / f"{name}.csv").write_text("who,a,b,ill\n" + rows + "\n")
    tree["simulation"] = {
        "hospital": [
            {"name": name, "source": {"kind": "csv", "path": f"{name}.csv"}} for name in ("n", "s")
        ]
    }
    world = build_world(parse_study(tree, origin="test"), tmp_path)
    first, second = (set(site.table.patients) for site in world.sites)
    assert not first & second


def test_declared_sizes_are_rounded(small: Study, make_table: MakeTable) -> None:
    sizes = {4: 10, 14: 10, 16: 20, 104: 100}
    for patients, said in sizes.items():
        assert declared(make_table(small, patients=patients, records_each=2)) == said


# On disk and back


def _image_study(tree: dict[str, Any], folder: Path) -> Study:
    generator = np.random.default_rng(0)
    np.savez(
        folder / "images.npz",
        x=generator.integers(0, 256, (80, 5, 7), dtype=np.uint8),
        ill=generator.integers(0, 2, 80),
        who=np.array([f"patient {row // 2}" for row in range(80)]),
    )
    tree["task"] = "imaging"
    tree["dictionary"]["columns"] = [{"name": "x", "kind": "image", "shape": [5, 7]}]
    tree["teacher"] = {"kind": "cnn", "hidden": [4, 6, 8]}
    tree["student"] = {"kind": "cnn", "hidden": [2]}
    tree["public"] = {"kind": "held_apart", "fraction": 0.2}
    tree["simulation"] = {
        "source": {"kind": "npz", "path": "images.npz"},
        "hospitals": 3,
        "partition": "power_law",
    }
    return parse_study(tree, origin="images")


def _table_study(tree: dict[str, Any], folder: Path) -> Study:
    generator = np.random.default_rng(0)
    rows = []
    for row in range(120):
        a = generator.normal() * 5  # often out of range
        b = "" if generator.random() < 0.3 else repr(generator.normal())
        kind = generator.choice(["x", "y", "?", "odd"])
        rows.append(f"p{row // 3},{a!r},{b},{kind},{generator.integers(0, 3)}")
    (folder / "t.csv").write_text("who,a,b,kind,ill\n" + "\n".join(rows) + "\n")
    tree["dictionary"]["columns"].append(
        {"name": "kind", "kind": "categorical", "categories": ["x", "y", "z"]}
    )
    tree["simulation"] = {"source": {"kind": "csv", "path": "t.csv"}, "hospitals": 3}
    tree["public"] = {"kind": "held_apart", "fraction": 0.2}
    return parse_study(tree, origin="table")


@pytest.mark.parametrize("make", [_image_study, _table_study])
def test_hospitals_on_disk_are_those_in_memory(
    tree: dict[str, Any], tmp_path: Path, make: Callable[[dict[str, Any], Path], Study]
) -> None:
    study = make(tree, tmp_path)
    world = build_world(study, tmp_path)
    names = [site.name for site in world.sites]
    home = tmp_path / "split"
    write_world(world, home, noise_seed=1)
    write_world(world, home, noise_seed=1)  # again over itself
    binding = load_study(home / "study.toml")
    for inside in open_world(world, seeded_noise(1, names)):
        with open_hospital(home / "hospitals" / inside.name, binding.digest()) as outside:
            assert outside.guard.noise == inside.guard.noise
        assert outside.train.digest == inside.train.digest
        assert outside.test.digest == inside.test.digest
        assert outside.declared_patients == inside.declared_patients
        features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
        for part in ("train", "test"):
            ours, theirs = getattr(inside, part), getattr(outside, part)
            assert theirs.patients.tolist() == ours.patients.tolist()
            assert theirs.labels.tolist() == ours.labels.tolist()
            torch.testing.assert_close(
                features.encode(theirs), features.encode(ours), rtol=0, atol=0
            )
    corpus = read_corpus(binding, home / "public")
    assert corpus is not None
    assert world.corpus is not None
    for name, column in world.corpus.values.items():
        np.testing.assert_array_equal(corpus.values[name], column)
    assert binding.simulation is None


def test_a_folder_of_other_things_is_left_alone(wisconsin: Study, tmp_path: Path) -> None:
    world = build_world(wisconsin, Path())
    precious = tmp_path / "study.toml"
    precious.write_text("mine")
    with pytest.raises(StudyError, match="choose another folder"):
        write_world(world, tmp_path)
    assert precious.read_text() == "mine"


def test_a_hospital_makes_its_secret_key_once(wisconsin: Study, tmp_path: Path) -> None:
    write_world(build_world(wisconsin, Path()), tmp_path / "w")
    folder = tmp_path / "w" / "hospitals" / "hospital-1"
    digest = load_study(tmp_path / "w" / "study.toml").digest()
    with open_hospital(folder, digest) as hospital:
        assert hospital.guard.noise.is_secret
        # Nothing remembers what such a hospital spent: its statement guarantees nothing.
        assert not hospital.guard.is_lasting
    key = folder / "noise.key"
    assert len(key.read_bytes()) == 32
    assert key.stat().st_mode & 0o077 == 0
    with (
        open_hospital(folder, digest) as again,
        open_hospital(folder.parent / "hospital-2", digest) as other,
    ):
        assert again.guard.noise == hospital.guard.noise
        assert other.guard.noise != hospital.guard.noise


def test_patients_with_several_records_are_not_laid_out_without_a_name(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """A bundle says whose a record is, a table without identifiers would not."""
    people = [
        {
            "resource": {"resourceType": "Patient", "id": f"p{one}", "birthDate": "1950-01-01"},
        }
        for one in range(12)
    ]
    visits = [
        {
            "resource": {
                "resourceType": "Encounter",
                "class": {"code": "AMB"},
                "subject": {"reference": f"Patient/p{one % 12}"},
                "period": {"start": f"2020-01-{1 + one // 12:02d}"},
            }
        }
        for one in range(24)
    ]
    (tmp_path / "bundles").mkdir()
    bundle = {"resourceType": "Bundle", "type": "collection", "entry": people + visits}
    (tmp_path / "bundles" / "a.json").write_text(json.dumps(bundle))
    tree["dictionary"] = {
        "label": {"name": "deceased", "classes": [[0], [1]]},
        "columns": [{"name": "a", "kind": "numeric", "range": [0.0, 120.0]}],
    }
    source = {
        "kind": "fhir",
        "path": "bundles",
        "derive": {"a": {"start": "birth_date", "end": "start", "unit": "years"}},
    }
    tree["simulation"] = {"source": source, "hospitals": 2}
    study = parse_study(tree, origin="test")
    world = build_world(study, tmp_path)
    assert sum(len(set(site.table.patients)) for site in world.sites) == 12
    with pytest.raises(StudyError, match="dictionary.patient_id: expected a name"):
        write_world(world, tmp_path / "out")
    named = study.revised(dictionary__patient_id="who")
    write_world(build_world(named, tmp_path), tmp_path / "out")
    for site in build_world(named, tmp_path).sites:
        settings = load_hospital_file(tmp_path / "out" / "hospitals" / site.name)
        again = read_public(
            settings.source, named.dictionary, tmp_path / "out" / "hospitals" / site.name
        )
        assert again.patients.tolist() == site.table.patients.tolist()
        np.testing.assert_array_equal(again.values["a"], site.table.values["a"])
