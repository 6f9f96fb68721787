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
    return Scaling({
        column.name: column.typical or _from_range(column)
        for column in dictionary.columns
        if column.kind == "numeric"
    })


def corpus_scaling(table: Table) -> Scaling:
    """Scaling from public records; a column they leave empty falls back to its range."""
    moments = dict(range_scaling(table.dictionary).moments)
    for name in moments:
        seen = table.values[name][~np.isnan(table.values[name])]
        if len(seen) > 1 and seen.std() > 0:
            moments[name] = (float(seen.mean()), float(seen.std()))
    return Scaling(moments)


def _from_range(column: Column) -> tuple[float, float]:
    low, high = column.range or (0.0, 1.0)
    return (low + high) / 2, (high - low) / _RANGE_IN_STDS


@dataclass(frozen=True)
class FeatureMap:
    """How a table becomes an input tensor.

    A numeric column gives its scaled value (0 where missing); a binary one ±0.5 (0 where missing);
    a categorical one its one-hot code (zeros where missing). Each optional column adds an
    indicator that is 1 where the value is missing. An image gives [1, height, width] in [-1, 1].
    """

    dictionary: Dictionary
    scaling: Scaling

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width for images, None for tables."""
        return self.dictionary.image_shape

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
        return self.groups()[-1].stop

    def encode(self, table: Table) -> Tensor:
        """Inputs of all records: [rows, width], or [rows, 1, height, width] for images."""
        if self.image_shape is not None:
            pixels = torch.from_numpy(table.values[self.dictionary.columns[0].name])
            return (pixels * 2.0 - 1.0)[:, None]
        blocks = [self._encode_column(column, table) for column in self.dictionary.columns]
        return torch.from_numpy(np.concatenate(blocks, axis=1).astype(np.float32))

    def _encode_column(self, column: Column, table: Table) -> NDArray[np.float64]:
        values = table.values[column.name]
        if column.kind == "numeric":
            mean, std = self.scaling.moments[column.name]
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
