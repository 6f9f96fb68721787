"""From the dictionary's values to the numbers a network sees.

Every step here is fixed by public facts (dictionary, public corpus, or a charged estimate): the
same record becomes the same input at every hospital. Scaling each hospital by its own rows would
leak them and destroy what distinguishes the hospitals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.dictionary import Column, Dictionary
from common.errors import MessageError
from common.molecules import Layout
from common.smiles import VOCABULARY
from common.tables import Table

# Inputs are held within this many standard deviations, so that one implausible value cannot
# dominate a record's clipped gradient.
_REACH = 4.0
# An image flatter than a tenth of the grey scale is not stretched further: it would be noise.
_FLATTEST = 0.1 / 4
# A range of plausible values is read as ± 2 standard deviations around its middle.
_RANGE_IN_STDS = 4.0


@dataclass(frozen=True)
class Scaling:
    """What inputs are made by, public or charged: ``moments``, mean and standard deviation of each
    numeric column by name; ``kept``, the buckets that are seen of each code column that keeps some.
    """

    moments: Mapping[str, tuple[float, float]]
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "moments": {name: list(pair) for name, pair in self.moments.items()},
            "kept": {name: list(buckets) for name, buckets in self.kept.items()},
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Scaling:
        """The same again."""
        return cls(
            {name: (mean, std) for name, (mean, std) in found["moments"].items()},
            {name: tuple(buckets) for name, buckets in found["kept"].items()},
        )


def range_scaling(dictionary: Dictionary) -> Scaling:
    """Scaling from the dictionary's ``typical`` values, else from its plausible ranges.

    Of codes nothing is known: the first buckets stand for the kept ones.
    """
    return Scaling(
        {column.name: column.typical or _from_range(column) for column in _numeric(dictionary)},
        {column.name: tuple(range(keep)) for column, keep in _keeping(dictionary)},
    )


def corpus_scaling(table: Table) -> Scaling:
    """Scaling from public records; a column they leave empty falls back to its range."""
    kept = {}
    for column, keep in _keeping(table.dictionary):
        codes = table.values[column.name]
        counts = np.bincount(codes[codes >= 0], minlength=column.buckets or 0)
        kept[column.name] = most_frequent(counts, keep)
    moments = dict(range_scaling(table.dictionary).moments)
    for name in moments:
        values = table.values[name].astype(np.float64)
        seen = values[~np.isnan(values)]
        if len(seen) > 1 and seen.std() > 0:
            moments[name] = (float(seen.mean()), float(seen.std()))
    return Scaling(moments, kept)


def most_frequent(counts: NDArray[Any], keep: int) -> tuple[int, ...]:
    """The ``keep`` buckets with the highest counts, in ascending order; of equals the first."""
    order = np.argsort(-np.asarray(counts, np.float64), kind="stable")[:keep]
    return tuple(sorted(int(one) for one in order))


def scaling_tensor(dictionary: Dictionary, scaling: Scaling) -> Tensor:
    """Scaling as numbers [rows, 2], in the dictionary's order: mean and standard deviation of each
    numeric column, then each kept bucket beside a 1."""
    rows = [scaling.moments[column.name] for column in _numeric(dictionary)]
    for column, _ in _keeping(dictionary):
        rows += [(float(bucket), 1.0) for bucket in scaling.kept[column.name]]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 2).float()


def scaling_from_tensor(dictionary: Dictionary, moments: Tensor) -> Scaling:
    """The inverse of :func:`scaling_tensor`; raises MessageError where it cannot be one."""
    columns, keeping = _numeric(dictionary), _keeping(dictionary)
    expected = len(columns) + sum(keep for _, keep in keeping)
    if moments.shape != (expected, 2) or bool((moments[:, 1] <= 0).any()):
        raise MessageError(
            f"scaling: expected {len(columns)} means and positive standard deviations and "
            f"{expected - len(columns)} buckets, found shape {tuple(moments.shape)}"
        )
    pairs = moments.double().tolist()
    kept, first = {}, len(columns)
    for column, keep in keeping:
        buckets = tuple(int(bucket) for bucket, _ in pairs[first : first + keep])
        first += keep
        if sorted(set(buckets)) != list(buckets) or buckets[-1] >= (column.buckets or 0):
            raise MessageError(
                f"scaling: expected ascending buckets of {column.name} below {column.buckets}, "
                f"found others"
            )
        kept[column.name] = buckets
    return Scaling(
        {
            column.name: (mean, std)
            for column, (mean, std) in zip(columns, pairs[: len(columns)], strict=True)
        },
        kept,
    )


def moment_contributions(table: Table) -> Tensor:
    """What each record adds to a private estimate of the scaling: [rows, ``moment_count``].

    Value, square and presence of each numeric column, with values scaled to [-1, 1] by the
    dictionary's range, so that every entry is bounded by 1; then a 1 in the bucket of each code
    column that keeps some. Missing values add zeros. L2 norm at most ``moment_norm``.
    """
    blocks = [np.zeros((len(table), 0))]
    for column in _numeric(table.dictionary):
        low, high = column.range or (0.0, 1.0)
        values = table.values[column.name].astype(np.float64)
        scaled = (values - (low + high) / 2) / ((high - low) / 2)
        seen = ~np.isnan(scaled)
        scaled = np.where(seen, np.clip(scaled, -1, 1), 0.0)
        blocks.append(np.stack([scaled, scaled**2, seen.astype(np.float64)], axis=1))
    for column, _ in _keeping(table.dictionary):
        blocks.append(_one_hot(table.values[column.name], range(column.buckets or 0)))
    return torch.from_numpy(np.concatenate(blocks, axis=1)).float()


def moment_count(dictionary: Dictionary) -> int:
    """Entries of one record in :func:`moment_contributions`."""
    return 3 * len(_numeric(dictionary)) + sum(
        column.buckets or 0 for column, _ in _keeping(dictionary)
    )


def moment_norm(dictionary: Dictionary) -> float:
    """The largest L2 norm of one record in :func:`moment_contributions`; 0 with nothing to count.

    Three numbers of at most 1 for each numeric column, a single 1 for each code column.
    """
    return math.sqrt(3 * len(_numeric(dictionary)) + len(_keeping(dictionary)))


def private_scaling(dictionary: Dictionary, sums: Tensor, noise_std: float) -> Scaling:
    """Scaling from noised sums [``moment_count``]; post-processing, so free.

    A column seen less often than the noise could explain keeps its range's scaling.
    """
    moments = dict(range_scaling(dictionary).moments)
    numeric = 3 * len(moments)
    kept, rest = {}, sums[numeric:].double().numpy()
    for column, keep in _keeping(dictionary):
        kept[column.name] = most_frequent(rest[: column.buckets], keep)
        rest = rest[column.buckets :]
    for column, (value, square, presence) in zip(
        _numeric(dictionary), sums[:numeric].reshape(-1, 3).double().tolist(), strict=True
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
    return Scaling(moments, kept)


def _numeric(dictionary: Dictionary) -> list[Column]:
    return [column for column in dictionary.columns if column.kind == "numeric"]


def _keeping(dictionary: Dictionary) -> list[tuple[Column, int]]:
    return [(column, column.keep) for column in dictionary.columns if column.keep is not None]


def _one_hot(codes: NDArray[Any], buckets: Sequence[int]) -> NDArray[np.float64]:
    """[rows, buckets]: 1 where the row's code is that bucket."""
    hot: NDArray[np.bool_] = codes[:, None] == np.asarray(buckets)[None]
    return hot.astype(np.float64)


def _from_range(column: Column) -> tuple[float, float]:
    low, high = column.range or (0.0, 1.0)
    return (low + high) / 2, (high - low) / _RANGE_IN_STDS


@dataclass(frozen=True)
class FeatureMap:
    """How a table becomes an input tensor.

    A numeric column gives its scaled value; a binary one ±0.5 and a categorical one its one-hot
    code, both about the column's ``shares`` where published; a code the one-hot code of its bucket
    (zeros for buckets that are not kept). Where a value is missing these are 0, and each optional
    column adds an indicator that is 1 there. An image gives [1, height, width] in [-1, 1], a text
    its token ids, a molecule what its ``Layout`` says.
    """

    dictionary: Dictionary
    scaling: Scaling

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width for images, None for others."""
        return self.dictionary.image_shape

    @property
    def molecule(self) -> Layout | None:
        """Where a molecule's inputs lie; None for other records."""
        column = self.dictionary.columns[0]
        if column.kind != "molecule":
            return None
        return Layout(column.bits, column.atoms, column.tokens)

    @property
    def text_shape(self) -> tuple[int, int] | None:
        """Length and vocabulary in tokens of texts and SMILES; None where none are read."""
        if self.molecule is not None:
            return (self.molecule.tokens, VOCABULARY) if self.molecule.tokens else None
        text = self.dictionary.text
        if text is None:
            return None
        assert text.length is not None and text.vocabulary is not None  # noqa: S101
        return text.length, text.vocabulary

    def groups(self) -> list[slice]:
        """The input positions of each column, in order; masking hides whole columns. Of a molecule
        each number before graph and tokens stands for itself."""
        if self.molecule is not None:
            return [slice(one, one + 1) for one in range(self.molecule.numbers)]
        slices, start = [], 0
        for column in self.dictionary.columns:
            width = _width(column)
            slices.append(slice(start, start + width))
            start += width
        return slices

    @property
    def numbers(self) -> int:
        """How many of a record's inputs, the first, mean something by themselves: all of a
        table's, a molecule's without graph and tokens."""
        return self.width if self.molecule is None else self.molecule.numbers

    @property
    def width(self) -> int:
        """Number of inputs of a record (tables and molecules)."""
        if self.molecule is not None:
            return self.molecule.width
        return sum(_width(column) for column in self.dictionary.columns)

    def encode(self, table: Table) -> Tensor:
        """Inputs of all records: [rows, width]; for images [rows, 1, height, width]; for texts
        int64 [rows, length], 0 behind a text's end."""
        if (text := self.dictionary.text) is not None:
            return torch.from_numpy(table.values[text.name].astype(np.int64))
        if self.image_shape is not None:
            column = self.dictionary.columns[0]
            pixels = torch.from_numpy(table.values[column.name])[:, None]
            return _standardised(pixels) if column.standardise else pixels * 2.0 - 1.0
        if self.molecule is not None:
            compounds = [one.decode() for one in table.values[self.dictionary.columns[0].name]]
            return torch.from_numpy(self.molecule.encode(compounds))
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
            if column.kind == "code":
                everything = range(column.buckets or 0)
                kept = everything if column.keep is None else self.scaling.kept[column.name]
                block = _one_hot(values, kept)
            else:
                block = centred_categories(column)[values] * ~absent[:, None]
        if column.optional:
            block = np.concatenate([block, absent[:, None].astype(np.float64)], axis=1)
        return block


def centred_categories(column: Column) -> NDArray[np.float64]:
    """Each category's inputs [categories, 1] of a binary column, [categories, categories] of a
    categorical one: its code less the mean code, by ``shares`` where published.

    What most patients have is then near 0: it takes little of the norm to which a patient's
    gradient is clipped, and the bias need not make up for it.
    """
    if column.kind == "binary":
        expected = 0.5 if column.shares is None else column.shares[1]
        return np.array([[0.0], [1.0]]) - expected
    return np.eye(len(column.categories)) - (0.0 if column.shares is None else column.shares)


def _standardised(pixels: Tensor) -> Tensor:
    """Each image about its own mean, in units of two of its own standard deviations."""
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    spread = pixels.std(dim=(1, 2, 3), keepdim=True, correction=0)
    return (pixels - mean) / (2 * spread.clamp(min=_FLATTEST))


def _width(column: Column) -> int:
    if column.kind == "code":
        base = column.keep or column.buckets or 0
    else:
        base = len(column.categories) if column.kind == "categorical" else 1
    return base + int(column.optional)
