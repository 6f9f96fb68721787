"""From the dictionary's values to the numbers a network sees.

Every step here is fixed by public facts (dictionary, public corpus, or a charged estimate): the
same record becomes the same input at every hospital. Scaling each hospital by its own rows would
leak them and destroy what distinguishes the hospitals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.dictionary import Column, Dictionary
from common.errors import MessageError
from common.tables import Table

# Inputs are held within this many standard deviations, so that one implausible value cannot
# dominate a record's clipped gradient.
_REACH = 4.0
# A range of plausible values is read as ± 2 standard deviations around its middle.
_RANGE_IN_STDS = 4.0


@dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation of each numeric column, by name; public or charged."""

    moments: Mapping[str, tuple[float, float]]


def range_scaling(dictionary: Dictionary) -> Scaling:
    """Scaling from the dictionary's ``typical`` values, else from its plausible ranges."""
    return Scaling(
        {column.name: column.typical or _from_range(column) for column in _numeric(dictionary)}
    )


def corpus_scaling(table: Table) -> Scaling:
    """Scaling from public records; a column they leave empty falls back to its range."""
    moments = dict(range_scaling(table.dictionary).moments)
    for name in moments:
        values = table.values[name].astype(np.float64)
        seen = values[~np.isnan(values)]
        if len(seen) > 1 and seen.std() > 0:
            moments[name] = (float(seen.mean()), float(seen.std()))
    return Scaling(moments)


def scaling_tensor(dictionary: Dictionary, scaling: Scaling) -> Tensor:
    """Means and standard deviations [numeric columns, 2], in the dictionary's order."""
    rows = [scaling.moments[column.name] for column in _numeric(dictionary)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2).float()


def scaling_from_tensor(dictionary: Dictionary, moments: Tensor) -> Scaling:
    """The inverse of :func:`scaling_tensor`; raises MessageError on a wrong shape or spread."""
    columns = _numeric(dictionary)
    if moments.shape != (len(columns), 2) or bool((moments[:, 1] <= 0).any()):
        raise MessageError(
            f"scaling: expected {len(columns)} means and positive standard deviations, "
            f"found shape {tuple(moments.shape)}"
        )
    pairs = moments.double().tolist()
    return Scaling(
        {column.name: (mean, std) for column, (mean, std) in zip(columns, pairs, strict=True)}
    )


def moment_contributions(table: Table) -> Tensor:
    """What each record adds to a private estimate of the scaling: [rows, numeric columns · 3].

    Value, square and presence of each column, with values scaled to [-1, 1] by the dictionary's
    range, so that every entry is bounded by 1. Missing values add zeros.
    """
    blocks = []
    for column in _numeric(table.dictionary):
        low, high = column.range or (0.0, 1.0)
        values = table.values[column.name].astype(np.float64)
        scaled = (values - (low + high) / 2) / ((high - low) / 2)
        seen = ~np.isnan(scaled)
        scaled = np.where(seen, np.clip(scaled, -1, 1), 0.0)
        blocks.append(np.stack([scaled, scaled**2, seen.astype(np.float64)], axis=1))
    return torch.from_numpy(np.concatenate(blocks, axis=1)).float()


def moment_count(dictionary: Dictionary) -> int:
    """Entries of one record in :func:`moment_contributions`."""
    return 3 * len(_numeric(dictionary))


def private_scaling(dictionary: Dictionary, sums: Tensor, noise_std: float) -> Scaling:
    """Scaling from noised sums [numeric columns, 3]; post-processing, so free.

    A column seen less often than the noise could explain keeps its range's scaling.
    """
    moments = dict(range_scaling(dictionary).moments)
    for column, (value, square, presence) in zip(
        _numeric(dictionary), sums.double().tolist(), strict=True
    ):
        if presence <= 4 * noise_std:
            continue
        low, high = column.range or (0.0, 1.0)
        mean = min(1.0, max(-1.0, value / presence))
        variance = square / presence - mean**2
        # Between 1/50 and the whole of the half-range: noise must not blow a column up.
        std = min(1.0, max(0.02, variance)) ** 0.5 if variance > 0 else 1 / _RANGE_IN_STDS
        half = (high - low) / 2
        moments[column.name] = ((low + high) / 2 + mean * half, max(std, 0.02) * half)
    return Scaling(moments)


def _numeric(dictionary: Dictionary) -> list[Column]:
    return [column for column in dictionary.columns if column.kind == "numeric"]


def _from_range(column: Column) -> tuple[float, float]:
    low, high = column.range or (0.0, 1.0)
    return (low + high) / 2, (high - low) / _RANGE_IN_STDS


@dataclass(frozen=True)
class FeatureMap:
    """How a table becomes an input tensor.

    A numeric column gives its scaled value (0 where missing); a binary one ±0.5 (0 where missing);
    a categorical one its one-hot code (zeros where missing). Each optional column adds an
    indicator that is 1 where the value is missing. An image gives [1, height, width] in [-1, 1]; a
    text its token ids.
    """

    dictionary: Dictionary
    scaling: Scaling

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width for images, None for others."""
        return self.dictionary.image_shape

    @property
    def text_shape(self) -> tuple[int, int] | None:
        """Length and vocabulary of texts in tokens, None for others."""
        text = self.dictionary.text
        if text is None:
            return None
        assert text.length is not None and text.vocabulary is not None  # noqa: S101
        return text.length, text.vocabulary

    def groups(self) -> list[slice]:
        """The input positions of each column, in order; masking hides whole columns."""
        slices, start = [], 0
        for column in self.dictionary.columns:
            width = _width(column)
            slices.append(slice(start, start + width))
            start += width
        return slices

    @property
    def width(self) -> int:
        """Number of inputs of a record (tables)."""
        return sum(_width(column) for column in self.dictionary.columns)

    def encode(self, table: Table) -> Tensor:
        """Inputs of all records: [rows, width]; for images [rows, 1, height, width]; for texts
        int64 [rows, length], 0 behind a text's end."""
        if (text := self.dictionary.text) is not None:
            return torch.from_numpy(table.values[text.name].astype(np.int64))
        if self.image_shape is not None:
            pixels = torch.from_numpy(table.values[self.dictionary.columns[0].name])
            return (pixels * 2.0 - 1.0)[:, None]
        blocks = [self._encode_column(column, table) for column in self.dictionary.columns]
        return torch.from_numpy(np.concatenate(blocks, axis=1).astype(np.float32))

    def _encode_column(self, column: Column, table: Table) -> NDArray[np.float64]:
        values = table.values[column.name]
        if column.kind == "numeric":
            mean, std = self.scaling.moments[column.name]
            values = values.astype(np.float64)
            absent = np.isnan(values)
            scaled = np.clip((values - mean) / std, -_REACH, _REACH)
            block = np.where(absent, 0.0, scaled)[:, None]
        else:
            absent = values < 0
            if column.kind == "binary":
                block = np.where(absent, 0.0, values - 0.5)[:, None]
            else:
                block = np.eye(len(column.categories))[values] * ~absent[:, None]
        if column.optional:
            block = np.concatenate([block, absent[:, None].astype(np.float64)], axis=1)
        return block


def _width(column: Column) -> int:
    base = len(column.categories) if column.kind == "categorical" else 1
    return base + int(column.optional)
