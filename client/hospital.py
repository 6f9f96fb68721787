"""A hospital as its own software sees it: its data, its secret noise, what it says in public."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from client.approvals import approved_study, laid_out_study
from client.guard import Guard, LedgerGuard, MemoryGuard
from client.hospitalfile import HospitalFile, load_hospital_file
from client.running import PAUSED
from client.safe import DATES_PURPOSE, Safe, open_safe
from client.sources.reading import read_records
from common.errors import DataError, RefusalError
from common.identity import PublicIdentity
from common.localmodels import HOME as MODELS
from common.molecules import scaffold_folds
from common.place import choose
from common.privacy.units import PrivacyUnit
from common.randomness import NoiseSource, SecretNoise, SeededNoise
from common.secagg import AggregationPolicy
from common.secretfiles import derive
from common.study import EvaluationSpec, Study
from common.tables import Table, compounds_of

if TYPE_CHECKING:
    from client.aggregation import Aggregator


@dataclass(frozen=True)
class Hospital:
    """Everything a round needs at one hospital.

    ``train`` and ``test`` hold different patients. ``declared_patients`` is public: the hospital's
    own rounded word, used to weigh and to divide, never its true count. ``guard`` lets releases
    pass; nothing else may. ``aggregator``: its part in secure sums, if it takes part in any.
    """

    name: str
    study: Study
    train: Table
    test: Table
    declared_patients: int
    guard: Guard
    aggregator: Aggregator | None = None

    def admitted(self, table: Table, round_number: int) -> Table:
        """The rows of ``table`` whose patients may be used in this round."""
        allowed = self.guard.admit(
            dict.fromkeys(table.patients), study=self.study.name, round_number=round_number
        )
        keep = np.array([patient in allowed for patient in table.patients], dtype=bool)
        return table if keep.all() else table.take(np.flatnonzero(keep))


@contextmanager
def open_hospital(folder: Path, digest: str) -> Iterator[Hospital]:
    """The hospital of ``folder/hospital.toml`` in the study of this digest, as long as it is used.

    With a safe it takes part in what its operator approved, and in nothing while it is paused.
    Raises RefusalError otherwise, before any record is read.
    """
    settings = load_hospital_file(folder)

    def with_guard(
        study: Study,
        guard: Guard,
        dates: Callable[[], bytes],
        aggregator: Aggregator | None = None,
    ) -> Hospital:
        table = own_records(settings, study, folder, dates)
        train, test = split_patients(table, study.evaluation, seed=study.seed, name=settings.name)
        return Hospital(
            name=settings.name,
            study=study,
            train=train,
            test=test,
            declared_patients=settings.declared_patients,
            guard=guard,
            aggregator=aggregator,
        )

    seed = settings.test_noise_seed
    test_noise = None if seed is None else SeededNoise(seed, settings.name)
    if not settings.safe:
        noise: NoiseSource = test_noise or SecretNoise(_key(folder / "noise.key"))
        study = laid_out_study(folder, digest)
        yield with_guard(
            study,
            MemoryGuard(noise, is_lasting=False),
            lambda: simulated_dates_key(folder),
        )
        return
    if (folder / PAUSED).exists():
        raise RefusalError(
            f"{settings.name} is paused; `consilium hospital resume` ends that",
            rule="hospital.paused",
        )
    with open_safe(folder / settings.safe) as safe:
        study, pinned = approved_study(folder, digest, safe.identity, safe.log)
        guard = LedgerGuard(safe, test_noise or safe.noise())
        yield with_guard(study, guard, safe.dates_key, _aggregator(settings.name, safe, pinned))


def simulated_dates_key(folder: Path) -> bytes:
    """The same for a hospital without a safe: beside its data, as its noise key is."""
    return derive(_key(folder / "noise.key"), DATES_PURPOSE)


def own_records(
    settings: HospitalFile, study: Study, folder: Path, dates: Callable[[], bytes]
) -> Table:
    """The hospital's records for a study. ``dates``: gives the key that dates are shifted by.

    From now on the process runs models, and finds pre-trained ones, as ``settings`` say.
    """
    choose(settings.compute)
    if settings.models:
        os.environ[MODELS] = str((folder / settings.models).resolve())
    return read_records(
        settings.source_of(study),
        study.dictionary,
        folder,
        rules=settings.deidentify,
        secret=dates,
    )


def _aggregator(name: str, safe: Safe, pinned: Mapping[str, PublicIdentity]) -> Aggregator | None:
    """This hospital's part in secure sums with those whose keys it pinned; None without any."""
    from client.aggregation import Aggregator  # noqa: PLC0415  (it builds on this module)

    if not pinned.keys() - {name}:
        return None
    return Aggregator(
        identity=safe.identity,
        pinned={**pinned, name: safe.identity.public},
        policy=AggregationPolicy(minimum_hospitals=safe.policy().release.fewest_peers + 1),
        attempts=safe.attempts(),
        sessions=safe.sessions(),
    )


def split_patients(
    table: Table, evaluation: EvaluationSpec, *, seed: int, name: str
) -> tuple[Table, Table]:
    """Training and test rows: whole patients, one fold of them for testing, stratified by label or
    by whole scaffolds.

    The split depends on the study's seed and the hospital's name alone, so every run and every arm
    of a comparison sees the same one.
    """
    patients, owners = table.by_patient
    label = np.zeros(len(patients), dtype=np.int64)
    np.maximum.at(label, owners, table.dictionary.label.strata(table.labels))
    if len(patients) < evaluation.folds:
        raise DataError(
            f"{name}: expected at least {evaluation.folds} patients for as many folds, "
            f"found {len(patients)}"
        )
    if evaluation.split == "scaffold":
        fold = scaffold_folds(compounds_of(table), evaluation.folds)
    else:
        words = hashlib.sha256(f"{seed}|{name}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(words[:8], "big"))
        order = generator.permutation(len(patients))
        order = order[np.argsort(label[order], kind="stable")]
        fold = np.empty(len(patients), dtype=np.int64)
        fold[order] = np.arange(len(patients)) % evaluation.folds
    testing = fold[owners] == evaluation.fold
    return table.take(np.flatnonzero(~testing)), table.take(np.flatnonzero(testing))


def units_of(table: Table, unit: PrivacyUnit) -> tuple[NDArray[np.int64], int]:
    """The privacy unit of each row [rows], and how many there are: patients, or records.

    Raises DataError when record-level privacy is asked for patients with several records: k
    records of one patient would then be protected k times less than promised.
    """
    patients, owners = table.by_patient
    if unit is PrivacyUnit.RECORD and len(patients) < len(table):
        raise DataError(
            f"unit = 'record' needs one record per patient, found {len(table)} records of "
            f"{len(patients)} patients; set unit = 'patient'"
        )
    return owners, len(patients)


@lru_cache(maxsize=8)
def _key(path: Path) -> bytes:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(SecretNoise.generate().key)
    key = path.read_bytes()
    if len(key) != 32:
        raise DataError(f"{path}: expected a key of 32 bytes, found {len(key)}")
    return key
