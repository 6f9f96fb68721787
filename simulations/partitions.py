"""Cutting one table into hospitals: whole patients, each in exactly one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.errors import DataError, StudyError
from common.molecules import scaffold_sets
from common.simulation import SimulationSpec, SitesSpec
from common.tables import Table, compounds_of

Integers = NDArray[np.int64]


def partition(
    table: Table,
    spec: SimulationSpec,
    hospitals: int,
    generator: np.random.Generator,
    at_least: int,
) -> list[NDArray[np.int64]]:
    """Rows of each hospital; whole patients, at least ``at_least`` of them everywhere."""
    patients = np.array(list(dict.fromkeys(table.patients)), dtype=object)
    if len(patients) < hospitals * at_least:
        raise StudyError(
            f"simulation.hospitals: expected at most {len(patients) // at_least} hospitals of "
            f"{at_least} patients each, found {hospitals} for {len(patients)} patients"
        )
    index = {patient: number for number, patient in enumerate(patients)}
    owners = np.array([index[patient] for patient in table.patients])
    order = generator.permutation(len(patients))
    spare = len(patients) - hospitals * at_least
    if spec.partition == "scaffold":
        home = _by_scaffold(table, owners, hospitals)
    elif spec.partition in ("label_skew", "covariate_shift"):
        groups = _quarters(table, owners, spec.column) if spec.column else _labels(table, owners)
        home = _by_group(groups, order, spec.concentration, hospitals, generator, at_least)
    else:
        ranks = np.arange(1, hospitals + 1, dtype=float)
        shares = ranks ** -(spec.exponent if spec.partition == "power_law" else 0.0)
        bounds = np.round(np.cumsum(shares / shares.sum()) * spare).astype(int)
        sizes = at_least + np.diff(bounds, prepend=0)
        home = np.empty(len(patients), dtype=np.int64)
        home[order] = np.repeat(np.arange(hospitals), sizes)
    return [np.flatnonzero(home[owners] == number) for number in range(hospitals)]


def by_site(
    table: Table, sites: SitesSpec, hospitals: int, folder: Path
) -> list[NDArray[np.int64]]:
    """Rows of each hospital as a table of patients and sites says, in the order of its labels."""
    path = folder / sites.path
    try:
        frame = pd.read_csv(path, dtype=str)
        home = dict(zip(frame[sites.patient].str.strip(), frame[sites.site], strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: expected a table with columns {sites.patient!r} and {sites.site!r} "
            f"({type(error).__name__}: {error})"
        ) from None
    labels = np.array([home.get(str(one), "") for one in table.patients], dtype=object)
    if (labels == "").any():
        raise DataError(f"{path}: {int((labels == '').sum())} rows' patients have no site in it")
    found = sorted(set(labels), key=lambda one: (len(one), one))
    if len(found) != hospitals:
        raise StudyError(
            f"simulation.hospitals: expected {len(found)}, as many as {path.name} names, "
            f"found {hospitals}"
        )
    return [np.flatnonzero(labels == one) for one in found]


def _by_scaffold(table: Table, owners: Integers, hospitals: int) -> Integers:
    """Whole scaffolds, the largest set first, each to the hospital with the fewest so far: all
    hospitals end with an equal share of the rare ones."""
    home, sizes = np.empty(owners.max() + 1, dtype=np.int64), np.zeros(hospitals, dtype=np.int64)
    for members in scaffold_sets(compounds_of(table)):
        smallest = int(sizes.argmin())
        home[members], sizes[smallest] = smallest, sizes[smallest] + len(members)
    return home


def _labels(table: Table, owners: Integers) -> Integers:
    """The class (or stratum) of each patient: the highest of its records."""
    label = np.zeros(owners.max() + 1, dtype=np.int64)
    np.maximum.at(label, owners, table.dictionary.label.strata(table.labels))
    return label


def _quarters(table: Table, owners: Integers, name: str) -> Integers:
    """The quarter of each patient by the mean of a numeric column, or its (highest) category.

    Patients in whom it was never measured are a group of their own.
    """
    values = table.values[name]
    if values.dtype.kind in "iu":
        category = np.full(owners.max() + 1, -1, dtype=np.int64)
        np.maximum.at(category, owners, values)
        return category
    known = ~np.isnan(values)
    sums = np.bincount(owners[known], values[known], minlength=owners.max() + 1)
    counts = np.bincount(owners[known], minlength=owners.max() + 1)
    means = sums[counts > 0] / counts[counts > 0]
    group = np.full(len(counts), -1, dtype=np.int64)
    if len(means):
        bounds = np.quantile(means, [0.25, 0.5, 0.75])
        group[counts > 0] = np.searchsorted(bounds, means, side="right")
    return group


def _by_group(
    groups: Integers,
    order: NDArray[Any],
    concentration: float,
    hospitals: int,
    generator: np.random.Generator,
    at_least: int,
) -> Integers:
    """Each group is dealt out by its own Dirichlet draw (Hsu, Qi & Brown 2019)."""
    home = np.empty(len(order), dtype=np.int64)
    for value in np.unique(groups):
        members = order[groups[order] == value]
        shares = generator.dirichlet(np.full(hospitals, concentration))
        home[members] = generator.choice(hospitals, size=len(members), p=shares)
    # Too small a hospital takes patients from the largest, one at a time.
    counts = np.bincount(home, minlength=hospitals)
    while counts.min() < at_least:
        moved = order[home[order] == counts.argmax()][0]
        home[moved] = counts.argmin()
        counts = np.bincount(home, minlength=hospitals)
    return home
