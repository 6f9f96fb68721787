"""From one study file to hospitals with data: read, set the public part aside, cut, split."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from client.aggregation import Aggregator
from client.approvals import study_folder
from client.guard import MemoryGuard
from client.hospital import Hospital, split_patients
from client.sources.reading import read_public
from common.dictionary import Column
from common.errors import StudyError
from common.identity import Identity
from common.privacy.units import Trust
from common.randomness import NoiseSource, SecretNoise, SeededNoise, Stream
from common.study import Study
from common.tables import Table, concatenate, read_table
from simulations import draws
from simulations.partitions import by_site, partition
from simulations.poison import poisoned, without_columns

_ROUNDING = 10  # hospitals declare their size to the nearest ten patients


@dataclass(frozen=True)
class Site:
    """One hospital's records before they are split, under its name."""

    name: str
    table: Table


@dataclass(frozen=True)
class World:
    """All that a simulation needs: its sites and the coordinator's public records."""

    study: Study
    sites: tuple[Site, ...]
    corpus: Table | None


def build_world(study: Study, data_folder: Path) -> World:
    """Read the study's data and make its hospitals; the same study gives the same world."""
    spec = study.simulation
    if spec is None:
        raise StudyError(
            f"{study.name}: a simulation needs a [simulation] section; see deploy/examples/"
        )
    generator = draws.generator(study.seed, "world")
    if spec.hospital:
        tables = [read_public(one.source, study.dictionary, data_folder) for one in spec.hospital]
        # Two hospitals may use the same identifier for different patients.
        names = [one.name for one in spec.hospital]
        tables = [_prefixed(table, name) for table, name in zip(tables, names, strict=True)]
        corpus, tables = _set_apart(study, tables, generator)
        sites = tuple(Site(name, table) for name, table in zip(names, tables, strict=True))
    else:
        assert spec.source is not None and spec.hospitals is not None  # noqa: S101
        whole = read_public(spec.source, study.dictionary, data_folder)
        corpus, (rest,) = _set_apart(study, [whole], generator)
        if spec.sites is not None:
            parts = by_site(rest, spec.sites, spec.hospitals, data_folder)
        else:
            parts = partition(rest, spec, spec.hospitals, generator, study.evaluation.folds)
        sites = tuple(
            Site(name, rest.take(rows)) for name, rows in zip(spec.names, parts, strict=True)
        )
    sites = tuple(replace(one, table=without_columns(study, one.name, one.table)) for one in sites)
    if study.public.kind == "file":
        assert study.public.source is not None  # noqa: S101
        corpus = read_table(study.public.source, study.dictionary, data_folder, labelled=False)
        if study.dictionary.modality == "molecule":
            corpus = _elsewhere(corpus, [site.table for site in sites])
    return World(study, sites, corpus)


def open_world(world: World, noise_of: Mapping[str, NoiseSource]) -> list[Hospital]:
    """The world's hospitals in memory, each with its own noise, enrolled with one another."""
    study = world.study
    identities = {}
    if study.privacy.trust is Trust.DISTRIBUTED:
        if study.federation.hospitals != len(world.sites):
            raise StudyError(
                f"federation.hospitals: expected {len(world.sites)}, as many as the simulation "
                f"makes, found {study.federation.hospitals}"
            )
        identities = {site.name: Identity.generate() for site in world.sites}
    pinned = {name: identity.public for name, identity in identities.items()}
    hospitals = []
    for site in world.sites:
        train, test = split_patients(site.table, study.evaluation, seed=study.seed, name=site.name)
        hospitals.append(
            Hospital(
                name=site.name,
                study=study,
                train=poisoned(study, site.name, train),
                test=test,
                declared_patients=declared(train),
                guard=MemoryGuard(noise_of[site.name]),
                aggregator=Aggregator(identities[site.name], pinned) if identities else None,
            )
        )
    return hospitals


def pooled(hospitals: list[Hospital]) -> Hospital:
    """All hospitals' training patients under one roof, for comparison."""
    train = concatenate([hospital.train for hospital in hospitals])
    return Hospital(
        name="pooled",
        study=hospitals[0].study,
        train=train,
        test=concatenate([hospital.test for hospital in hospitals]),
        declared_patients=declared(train),
        guard=MemoryGuard(hospitals[0].guard.noise),
    )


def declared(train: Table) -> int:
    """What the hospital says of its size: its training patients to the nearest ten."""
    patients = len(set(train.patients))
    return max(_ROUNDING, _ROUNDING * round(patients / _ROUNDING))


def secret_noise(key: bytes, names: list[str]) -> dict[str, NoiseSource]:
    """Each hospital's secret noise, under a key of its own derived from the simulation's."""
    master = SecretNoise(key)
    return {name: SecretNoise(_key(master.stream("hospital", name))) for name in names}


def seeded_noise(seed: int, names: list[str]) -> dict[str, NoiseSource]:
    """Each hospital's test noise; repeatable, and no protection."""
    return {name: SeededNoise(seed, name) for name in names}


def write_world(world: World, folder: Path, *, noise_seed: int | None = None) -> None:
    """Lay the world out as real hospitals' folders, for ``flwr run`` and deployments.

    ``folder/study.toml``, ``folder/public/`` for the coordinator, and for each hospital
    ``folder/hospitals/NAME/`` with ``hospital.toml``, its data and the study.
    ``noise_seed``: every hospital draws repeatable test noise, which protects nobody.
    """
    study, path = world.study, folder / "study.toml"
    are_compounds = study.dictionary.modality == "molecule"  # known again by their structures
    if not (study.dictionary.patient_id or are_compounds) and any(
        len(set(site.table.patients)) < len(site.table) for site in world.sites
    ):
        raise StudyError(
            "dictionary.patient_id: expected a name, since patients here have several records, and "
            "would be taken for several people"
        )
    if folder.exists() and any(folder.iterdir()):
        if not (path.is_file() and (folder / "hospitals").is_dir()):
            raise StudyError(f"{folder}: not empty and not a split study; choose another folder")
        # Only what this function makes: the folder may hold a user's own files too.
        path.unlink()
        for made in ("hospitals", "public"):
            shutil.rmtree(folder / made, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    binding = study.revised(simulation=None)
    if world.corpus is not None:
        source = _write_table(world.corpus, folder / "public")
        binding = binding.revised(public={"kind": "file", "source": source})
    path.write_text(binding.to_toml(), encoding="utf-8")
    for site in world.sites:
        home = folder / "hospitals" / site.name
        source = _write_table(site.table, home)
        train, _ = split_patients(site.table, study.evaluation, seed=study.seed, name=site.name)
        settings: dict[str, Any] = {
            "name": site.name,
            "declared_patients": declared(train),
            "source": source,
        }
        if noise_seed is not None:
            settings["test_noise_seed"] = noise_seed
        (home / "hospital.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
        place = study_folder(home, binding.digest())
        place.path.mkdir(parents=True)
        place.study.write_text(binding.to_toml(), encoding="utf-8")


def _set_apart(
    study: Study, tables: list[Table], generator: np.random.Generator
) -> tuple[Table | None, list[Table]]:
    """The public records (without labels) and what remains at the hospitals; whole patients."""
    if study.public.kind != "held_apart":
        return None, tables
    chosen, remaining = [], []
    for table in tables:
        names = np.array(sorted(set(table.patients)), dtype=object)
        count = max(1, round(study.public.fraction * len(names)))
        apart = set(generator.permutation(names)[:count])
        mask = np.array([patient in apart for patient in table.patients])
        chosen.append(table.take(np.flatnonzero(mask)))
        remaining.append(table.take(np.flatnonzero(~mask)))
    corpus = concatenate(chosen)
    unlabelled = Table(
        corpus.dictionary,
        corpus.values,
        corpus.dictionary.label.unknown(len(corpus)),
        corpus.patients,
        corpus.report,
    )
    return unlabelled, remaining


def _elsewhere(corpus: Table, tables: list[Table]) -> Table:
    """The public compounds that no hospital has: a test compound must be new to every stage."""
    name = corpus.dictionary.columns[0].name
    kept = np.concatenate([table.values[name] for table in tables])
    return corpus.take(np.flatnonzero(~np.isin(corpus.values[name], kept)))


def _prefixed(table: Table, name: str) -> Table:
    patients = np.array([f"{name}/{patient}" for patient in table.patients], dtype=object)
    return Table(table.dictionary, table.values, table.labels, patients, table.report)


def _write_table(table: Table, folder: Path) -> dict[str, Any]:
    """Write records in the dictionary's own terms; the source that reads them back."""
    folder.mkdir(parents=True, exist_ok=True)
    dictionary = table.dictionary
    if dictionary.modality != "table":
        column = dictionary.columns[0].name
        outcomes = zip(*(dictionary.label.cells(one) for one in table.labels), strict=True)
        arrays: dict[str, Any] = {column: table.values[column]}
        for name, values in zip(dictionary.label.columns, outcomes, strict=True):
            arrays[name] = np.array([str(one) for one in values])
        if dictionary.patient_id:
            arrays[dictionary.patient_id] = table.patients.astype(str)
        np.savez_compressed(folder / "records.npz", **arrays)
        return {"kind": "npz", "path": "records.npz"}
    names = [column.name for column in dictionary.columns]
    with (folder / "records.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        # Without an identifier every row is another patient, there as here.
        identifier = [dictionary.patient_id] if dictionary.patient_id else []
        writer.writerow([*names, *dictionary.label.columns, *identifier])
        for row in range(len(table)):
            cells = [_cell(column, table.values[column.name][row]) for column in dictionary.columns]
            outcome = dictionary.label.cells(table.labels[row])
            writer.writerow([*cells, *outcome, *([table.patients[row]] if identifier else [])])
    return {"kind": "csv", "path": "records.csv"}


def _cell(column: Column, value: Any) -> Any:
    if column.kind == "numeric":
        return "" if np.isnan(value) else repr(float(value))
    if value < 0:
        return ""
    return f"#{value}" if column.kind == "code" else column.categories[value]


def _key(stream: Stream) -> bytes:
    return hashlib.sha256(stream.uniform(8).tobytes()).digest()
