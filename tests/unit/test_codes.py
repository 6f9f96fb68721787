"""Codes of very many: the same bucket everywhere, the frequent ones found under privacy."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.columns import bucket_of
from common.dictionary import Column, Dictionary
from common.errors import MessageError, StudyError
from common.features import (
    FeatureMap,
    corpus_scaling,
    moment_contributions,
    moment_count,
    moment_norm,
    private_scaling,
    range_scaling,
    scaling_from_tensor,
    scaling_tensor,
)
from common.learning.distill import records_from_dictionary
from common.privacy.budget import budget_of
from common.sources import CsvSource
from common.study import Study, load_study, parse_study
from common.tables import Table, read_table

CODED = Dictionary.model_validate_json(
    """{
    "label": {"name": "y", "classes": [[0], [1]]},
    "columns": [
      {"name": "age", "kind": "numeric", "range": [20, 80], "optional": false},
      {"name": "diagnosis", "kind": "code", "prefix": 3, "buckets": 16, "keep": 2},
      {"name": "ward", "kind": "code", "buckets": 4, "optional": false}
    ]}"""
)
DIAGNOSIS, WARD = CODED.columns[1:]
MakeTable = Callable[..., Table]
VALUES = {
    "age": np.array([50.0, 50.0, 50.0, 50.0]),
    "diagnosis": np.array([3, 9, 3, -1]),
    "ward": np.array([0, 3, 1, 2]),
}


def test_a_cell_is_its_prefix_s_bucket_and_blank_is_missing(tmp_path: Path) -> None:
    with (tmp_path / "records.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows(
            [
                ["age", "diagnosis", "ward", "y"],
                [50, "250.83", "ICU", 0],
                [50, "250", " ICU ", 1],
                [50, "", "#3", 1],
                [50, "V58", "A", 0],
            ]
        )
    table = read_table(CsvSource(kind="csv", path="records.csv"), CODED, tmp_path)
    diagnosis, ward = table.values["diagnosis"], table.values["ward"]
    assert diagnosis.tolist() == [
        bucket_of(DIAGNOSIS, "250"),
        bucket_of(DIAGNOSIS, "250"),
        -1,
        bucket_of(DIAGNOSIS, "V58"),
    ]
    assert ward[0] == ward[1] == bucket_of(WARD, "ICU") and ward[2] == 3
    assert table.report.columns[1].missing == 1


def test_the_hash_is_fixed() -> None:
    # printf 'diagnosis|250' | sha256sum begins with 053c54f02eca47da, whose last digit is 10.
    assert bucket_of(DIAGNOSIS, "250.83") == 10
    assert bucket_of(DIAGNOSIS, "250.83") == bucket_of(DIAGNOSIS, "#10")


def test_kept_codes_are_inputs_and_the_rest_are_zeros(table_of: MakeTable) -> None:
    scaling = corpus_scaling(table_of(CODED, VALUES))
    assert scaling.kept == {"diagnosis": (3, 9)}
    features = FeatureMap(CODED, scaling)
    encoded = features.encode(table_of(CODED, VALUES)).tolist()
    assert features.width == 1 + (2 + 1) + 4
    # age, is 3, is 9, absent, the four wards
    assert [row[1:] for row in encoded] == [
        [1, 0, 0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 0],
    ]
    other = FeatureMap(CODED, range_scaling(CODED)).encode(table_of(CODED, VALUES))
    assert other[:, 1:3].sum() == 0  # buckets 0 and 1 are kept there


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ages=st.lists(st.floats(0, 200), min_size=1, max_size=5),
    code=st.integers(-1, 15),
)
def test_no_record_adds_more_than_its_norm(
    table_of: MakeTable, ages: list[float], code: int
) -> None:
    values = {
        "age": np.array(ages),
        "diagnosis": np.full(len(ages), code),
        "ward": np.zeros(len(ages), np.int64),
    }
    each = moment_contributions(table_of(CODED, values))
    assert each.shape == (len(ages), moment_count(CODED)) == (len(ages), 3 + 16)
    assert each.norm(dim=1).max() <= moment_norm(CODED) + 1e-6
    assert moment_norm(CODED) == math.sqrt(3 + 1)


def test_frequent_codes_are_found_from_noised_counts(table_of: MakeTable) -> None:
    generator = np.random.default_rng(0)
    codes = generator.choice([5, 11, 2, 7], 4000, p=[0.4, 0.3, 0.2, 0.1])
    values = {"age": np.full(4000, 50.0), "diagnosis": codes, "ward": np.zeros(4000, np.int64)}
    sums = moment_contributions(table_of(CODED, values)).sum(dim=0)
    noised = sums + 20 * torch.randn(sums.shape, generator=torch.Generator().manual_seed(0))
    assert private_scaling(CODED, noised, noise_std=20.0).kept == {"diagnosis": (5, 11)}


def test_scaling_travels_and_is_checked() -> None:
    scaling = range_scaling(CODED)
    sent = scaling_tensor(CODED, scaling)
    assert scaling_from_tensor(CODED, sent) == scaling
    for row, bucket in ((1, 16.0), (2, 0.0)):  # beyond the last bucket; not ascending
        broken = sent.clone()
        broken[row, 0] = bucket
        with pytest.raises(MessageError, match="buckets of diagnosis"):
            scaling_from_tensor(CODED, broken)
    with pytest.raises(MessageError, match="2 buckets"):
        scaling_from_tensor(CODED, sent[:-1])


def test_records_can_be_drawn_from_the_dictionary() -> None:
    features = FeatureMap(CODED, range_scaling(CODED))
    drawn = records_from_dictionary(CODED, features, 200, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, features.width)
    assert drawn[:, 1:3].sum(dim=1).unique().tolist() == [0, 1]


def coded_study(**changes: object) -> Study:
    study = load_study(Path("deploy/examples/wisconsin.toml"))
    tree = study.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    added = DIAGNOSIS.model_dump(mode="json", exclude_unset=True) | {"name": "icd"}
    tree["dictionary"]["columns"].append(added)
    return parse_study(tree | changes, origin="test")


def test_the_vocabulary_is_charged() -> None:
    numeric = 30
    plan = budget_of(coded_study(scaling="private")).charge("statistics").plan
    assert plan.clip_norm == math.sqrt(3 * numeric + 1)


def test_a_vocabulary_that_nobody_finds_is_refused() -> None:
    with pytest.raises(StudyError, match="'icd' keeps its most frequent codes"):
        coded_study(scaling="ranges")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"buckets": None}, "needs buckets"),
        ({"keep": 16}, "keep"),
        ({"kind": "numeric", "range": (0, 1)}, "belong to kind = 'code'"),
    ],
)
def test_odd_code_columns_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Column.model_validate(DIAGNOSIS.model_dump() | changes)
