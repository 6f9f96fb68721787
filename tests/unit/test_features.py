"""The same record becomes the same input everywhere, whatever else its hospital holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.dictionary import Column, Dictionary
from common.errors import MessageError
from common.features import (
    FeatureMap,
    Scaling,
    corpus_scaling,
    moment_contributions,
    private_scaling,
    range_scaling,
    scaling_from_tensor,
    scaling_tensor,
)
from common.learning.distill import records_from_dictionary
from common.tables import Table, TableReport

MIXED = Dictionary.model_validate_json(
    """{
    "label": {"name": "y", "classes": [[0], [1]]},
    "columns": [
      {"name": "age", "kind": "numeric", "range": [20, 80], "optional": false},
      {"name": "chol", "kind": "numeric", "range": [100, 500], "typical": [220, 50]},
      {"name": "sex", "kind": "binary", "categories": [0, 1]},
      {"name": "cp", "kind": "categorical", "categories": [1, 2, 3], "optional": false}
    ]}"""
)
MakeTable = Callable[..., Table]
VALUES = {
    "age": np.array([50.0, 80.0, np.nan]),
    "chol": np.array([220.0, np.nan, 500.0]),
    "sex": np.array([0, 1, -1]),
    "cp": np.array([0, 2, -1]),
}


def test_every_kind_encodes_as_documented(table_of: MakeTable) -> None:
    features = FeatureMap(MIXED, range_scaling(MIXED))
    encoded = features.encode(table_of(MIXED, VALUES))
    # age: middle 50, standard deviation 15 (a range is ± 2); chol: its typical 220 ± 50;
    # then chol's indicator, sex ± 0.5 and its indicator, and the one-hot chest pain.
    expected = [
        [0, 0, 0, -0.5, 0, 1, 0, 0],
        [2, 0, 1, 0.5, 0, 0, 0, 1],
        [0, 4, 0, 0, 1, 0, 0, 0],  # (500 − 220) / 50 = 5.6 is held at 4
    ]
    torch.testing.assert_close(encoded, torch.tensor(expected, dtype=torch.float32))
    assert features.width == 8
    assert features.groups() == [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 8)]


def test_published_shares_become_the_zero_of_a_category(table_of: MakeTable) -> None:
    sex, cp = (
        (MIXED.columns[2], {"shares": (0.75, 0.25)}),
        (MIXED.columns[3], {"shares": (0.5, 0.3, 0.2)}),
    )
    columns = tuple(one.model_validate({**one.model_dump(), **more}) for one, more in (sex, cp))
    known = MIXED.model_copy(update={"columns": columns})
    features = FeatureMap(known, range_scaling(known))
    rows = {"sex": np.array([0, 1, -1]), "cp": np.array([0, 2, -1])}
    encoded = features.encode(table_of(known, rows))
    expected = [[-0.25, 0, 0.5, -0.3, -0.2], [0.75, 0, -0.5, -0.3, 0.8], [0, 1, 0, 0, 0]]
    torch.testing.assert_close(encoded, torch.tensor(expected))
    # Patients who are as published have inputs of mean zero, and made-up records are such patients.
    drawn = records_from_dictionary(known, features, 4000, torch.Generator().manual_seed(0))
    present = drawn[drawn[:, 1] == 0]
    assert present[:, 0].mean().abs() < 0.05
    assert drawn[:, 2:].mean(dim=0).abs().max() < 0.03
    assert sorted(set(drawn[:, 2].tolist())) == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("shares", [[0.5, 0.4, 0.2], [1.0], [1.2, -0.1, -0.1]])
def test_shares_that_are_none_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        Column(name="cp", kind="categorical", categories=(1, 2, 3), shares=tuple(shares))
    with pytest.raises(ValueError, match="shares belong to binary and categorical"):
        Column(name="age", kind="numeric", range=(0, 1), shares=(0.5, 0.5))


def test_an_empty_column_is_zeros_and_its_indicator(table_of: MakeTable) -> None:
    empty = VALUES | {"chol": np.full(3, np.nan)}
    encoded = FeatureMap(MIXED, range_scaling(MIXED)).encode(table_of(MIXED, empty))
    assert encoded[:, 1].tolist() == [0, 0, 0]
    assert encoded[:, 2].tolist() == [1, 1, 1]


def test_every_hospital_encodes_the_same_record_alike(table_of: MakeTable) -> None:
    features = FeatureMap(MIXED, range_scaling(MIXED))
    generator = np.random.default_rng(0)
    company = {
        "age": generator.uniform(20, 80, 50),
        "chol": generator.uniform(400, 500, 50),  # a hospital of quite other patients
        "sex": generator.integers(-1, 2, 50),
        "cp": generator.integers(-1, 3, 50),
    }
    alone = features.encode(table_of(MIXED, VALUES))
    joined = {name: np.concatenate([company[name], VALUES[name]]) for name in VALUES}
    torch.testing.assert_close(features.encode(table_of(MIXED, joined))[50:], alone, rtol=0, atol=0)


def test_images_become_one_channel_from_minus_1_to_1(table_of: MakeTable) -> None:
    dictionary = Dictionary.model_validate_json(
        """{"label": {"name": "y", "classes": [[0], [1]]},
            "columns": [{"name": "x", "kind": "image", "shape": [2, 2]}]}"""
    )
    pixels = np.array([[[0.0, 0.5], [1.0, 0.25]]], dtype=np.float32)
    encoded = FeatureMap(dictionary, range_scaling(dictionary)).encode(
        table_of(dictionary, {"x": pixels})
    )
    assert encoded.tolist() == [[[[-1.0, 0.0], [1.0, -0.5]]]]
    assert scaling_tensor(dictionary, range_scaling(dictionary)).shape == (0, 2)


def test_public_scaling_is_the_corpus_own_and_falls_back(table_of: MakeTable) -> None:
    corpus = VALUES | {"age": np.array([40.0, 60.0, np.nan]), "chol": np.full(3, np.nan)}
    scaling = corpus_scaling(table_of(MIXED, corpus))
    assert scaling.moments["age"] == (50.0, 10.0)
    assert scaling.moments["chol"] == range_scaling(MIXED).moments["chol"]
    constant = corpus_scaling(table_of(MIXED, corpus | {"age": np.full(3, 44.0)}))
    assert constant.moments["age"] == range_scaling(MIXED).moments["age"]


def test_scaling_travels_as_a_tensor() -> None:
    scaling = Scaling({"age": (51.25, 9.5), "chol": (200.0, 40.0)})
    sent = scaling_tensor(MIXED, scaling)
    assert scaling_from_tensor(MIXED, sent) == scaling
    for wrong in (sent[:1], sent * torch.tensor([1.0, 0.0]), sent.T.reshape(4)):
        with pytest.raises(MessageError, match="expected 2 means and positive"):
            scaling_from_tensor(MIXED, wrong)


@given(
    st.lists(
        st.floats(allow_nan=True, allow_infinity=True) | st.floats(min_value=0, max_value=1000),
        min_size=1,
        max_size=8,
    )
)
def test_a_record_adds_at_most_1_to_each_moment(values: list[float]) -> None:
    rows = len(values)
    table = Table(
        MIXED,
        {
            "age": np.array(values),
            "chol": np.array(values[::-1]),
            "sex": np.zeros(rows, np.int64),
            "cp": np.zeros(rows, np.int64),
        },
        np.zeros(rows, np.int64),
        np.array(["p"] * rows, dtype=object),
        TableReport(rows=rows, patients=1, unlabelled=0, columns=()),
    )
    each = moment_contributions(table)
    assert each.shape == (rows, 6)
    assert torch.isfinite(each).all()
    assert each.abs().max() <= 1


def test_private_scaling_without_noise_finds_the_moments(table_of: MakeTable) -> None:
    generator = np.random.default_rng(1)
    rows = 4000
    values = {
        "age": np.clip(generator.normal(45, 6, rows), 20, 80),
        "chol": np.where(generator.random(rows) < 0.3, np.nan, generator.normal(300, 30, rows)),
        "sex": np.zeros(rows, np.int64),
        "cp": np.zeros(rows, np.int64),
    }
    sums = moment_contributions(table_of(MIXED, values)).sum(dim=0)
    scaling = private_scaling(MIXED, sums, noise_std=1.0)
    for name in ("age", "chol"):
        seen = values[name][~np.isnan(values[name])]
        mean, std = scaling.moments[name]
        assert mean == pytest.approx(seen.mean(), abs=0.1)
        assert std == pytest.approx(seen.std(), rel=0.02)


def test_private_scaling_of_nothing_but_noise_keeps_the_range() -> None:
    sums = torch.tensor([100.0, 3.0, 30.0, 0.5, -40.0, 39.9])
    assert private_scaling(MIXED, sums, noise_std=10.0) == range_scaling(MIXED)


@given(sums=st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=6))
def test_private_scaling_is_always_usable(sums: list[float]) -> None:
    scaling = private_scaling(MIXED, torch.tensor(sums), noise_std=1.0)
    for column in MIXED.columns[:2]:
        assert column.range is not None
        low, high = column.range
        mean, std = scaling.moments[column.name]
        assert low <= mean <= high
        assert 0.01 * (high - low) / 2 <= std <= (high - low) / 2


def test_standardised_images_forget_brightness_and_contrast(table_of: MakeTable) -> None:
    chest = Dictionary.model_validate_json(
        """{"label": {"name": "y", "classes": [[0], [1]]},
        "columns": [{"name": "image", "kind": "image", "shape": [6, 5], "standardise": true}]}"""
    )
    one = np.random.default_rng(0).uniform(0.2, 0.5, (6, 5))
    images = np.stack([one, 0.2 + 0.8 * one, np.full((6, 5), 0.3)]).astype(np.float32)
    table = table_of(chest, {"image": images})
    encoded = FeatureMap(chest, range_scaling(chest)).encode(table)
    assert encoded.shape == (3, 1, 6, 5)
    torch.testing.assert_close(encoded[0], encoded[1], rtol=1e-4, atol=1e-4)
    assert encoded[0].mean().abs() < 1e-6
    assert encoded[0].std(correction=0).item() == pytest.approx(0.5, rel=1e-5)
    assert encoded[2].abs().max() < 1e-5  # a flat image has nothing to be stretched
    with pytest.raises(ValueError, match="standardise belongs to kind = 'image'"):
        Column(name="c", kind="numeric", range=(0, 1), standardise=True)
