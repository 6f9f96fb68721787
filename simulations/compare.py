"""Federated against the alternatives, on the same patients: what does working together bring?

Every arm is an ordinary run folder, so an interrupted comparison continues where it stopped::

    FOLDER/
    ├── comparison.json              the figures
    ├── compare.json                 what was asked
    ├── federated/seed-N/            the study as it stands
    ├── alone/HOSPITAL/seed-N/       one hospital, same pipeline, same ε
    ├── pooled/seed-N/               all training patients under one roof, same ε
    ├── pooled-no-privacy/seed-N/    … and without clipping or noise
    ├── federated-no-privacy/seed-N/
    └── epsilon-E/seed-N/            the study at another ε
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.hospital import Hospital
from common.errors import StudyError
from common.files import write_atomically
from common.labels import ClassLabel
from common.privacy.units import Trust
from common.study import Study
from common.tables import Table
from simulations.arms import (
    ALONE,
    FEDERATED,
    FEDERATED_NO_PRIVACY,
    POOLED,
    POOLED_NO_PRIVACY,
    ArmRun,
    Watch,
    runs_of_seed,
    train,
)
from simulations.claims import claim
from simulations.combinations import Combination, Setting, combine
from simulations.comparison import (
    Arm,
    Comparison,
    CurvePoint,
    Difference,
    HospitalFacts,
    SeedFigures,
    over_seeds,
    paired,
)
from simulations.measures import measures_of
from simulations.scoring import Ledger, curve, released, runs_of_arm, score_runs, sweep_points
from simulations.worlds import Worlds

_TITLES = {
    FEDERATED: "Federated",
    ALONE: "Each hospital alone",
    POOLED: "Pooled data",
    POOLED_NO_PRIVACY: "Pooled data, no privacy",
    FEDERATED_NO_PRIVACY: "Federated, no privacy",
}
# The study's ε with two below it and one above: 0.5, 1, 3 and 8 for a study at 3.
_SWEEP_FACTORS = (1 / 6, 1 / 3, 1.0, 8 / 3)


def compare(
    study: Study,
    folder: Path,
    data_folder: Path,
    *,
    seeds: int,
    watch: Watch,
    epsilons: Sequence[float] | None = None,
    noise_seed: int | None = None,
    replace_existing: bool = False,
    debug: bool = False,
) -> Comparison:
    """Train every arm on the same splits for ``seeds`` seeds from the study's own, and score them.

    Arms that ``folder`` already holds are reused, interrupted ones continued. ``epsilons`` are the
    further points of the ε sweep (a few around the study's by default; none without privacy).
    ``noise_seed`` replaces secret noise by repeatable test noise: no privacy.

    Raises RunError when ``folder`` holds another comparison, StudyError on impossible settings.
    """
    if seeds < 1:
        raise StudyError(f"seeds: expected at least 1, found {seeds}")
    sweep = _epsilon_sweep(study, epsilons)
    claim(
        folder,
        "compare.json",
        "comparison",
        {"study": study.model_dump(mode="json"), "noise_seed": noise_seed},
        data_folder=data_folder,
        replace_existing=replace_existing,
    )
    numbers = [study.seed + index for index in range(seeds)]
    studies, worlds = [study.revised(seed=seed) for seed in numbers], Worlds(data_folder)
    runs = [run for one in studies for run in runs_of_seed(one, worlds.of(one), sweep)]
    train(runs, folder, worlds, noise_seed=noise_seed, watch=watch, debug=debug)

    ledger = score_runs(runs, folder, worlds)
    comparison = Comparison(
        study=study,
        folder=folder,
        seeds=tuple(numbers),
        hospitals=_hospital_facts(studies, worlds),
        arms={arm: _arm(arm, study, folder, numbers, ledger) for arm in _arms(study)},
        differences=tuple(_differences(ledger["student"])),
        sweep=sweep_points(sweep, folder, numbers, ledger),
        curves=_curves(studies, folder, worlds),
    )
    write_atomically(
        folder / "comparison.json",
        (json.dumps(comparison.to_json(), indent=2, allow_nan=False) + "\n").encode(),
    )
    return comparison


def default_epsilons(study: Study) -> tuple[float, ...]:
    """The sweep around the study's own ε, which is among them; empty without privacy.

    Round figures, so that folders and axes read well.
    """
    own = study.privacy.epsilon
    if own is None:
        return ()
    return tuple(
        own if factor == 1.0 else float(f"{own * factor:.1g}") for factor in _SWEEP_FACTORS
    )


def _epsilon_sweep(study: Study, asked: Sequence[float] | None) -> tuple[Combination, ...]:
    """The study at each ε, in ascending order; at its own it is the federated arm itself."""
    own = study.privacy.epsilon
    if own is None:
        if asked:
            raise StudyError(
                f"{study.name}: an ε sweep needs privacy, found trust = 'none'; leave out "
                f"--epsilons or set trust = 'local'"
            )
        return ()
    if asked is None:
        asked = default_epsilons(study)
    for one in asked:
        if not (math.isfinite(one) and one > 0):
            raise StudyError(f"--epsilons: expected numbers above 0, found {one}")
    epsilons = Setting("privacy.epsilon", tuple(sorted({*asked, own})))
    return tuple(
        replace(one, arm=FEDERATED) if one.settings[epsilons.key] == own else one
        for one in combine(study, [epsilons])
    )


def _arms(study: Study) -> tuple[str, ...]:
    if study.privacy.trust is Trust.NONE:
        return (FEDERATED, ALONE, POOLED)
    return (FEDERATED, ALONE, POOLED, POOLED_NO_PRIVACY, FEDERATED_NO_PRIVACY)


def _arm(arm: str, study: Study, folder: Path, seeds: Sequence[int], ledger: Ledger) -> Arm:
    private = "no-privacy" not in arm
    return Arm(
        title=_TITLES[arm],
        epsilon=study.privacy.epsilon if private else None,
        student=over_seeds(ledger["student"][arm], measures_of(study)),
        teacher=over_seeds(ledger["teacher"][arm], measures_of(study)),
        # Histograms of different models make no common ranking: none for hospitals alone.
        released=None if arm == ALONE else released(runs_of_arm(folder, arm, seeds), study),
    )


def _differences(students: Mapping[str, Sequence[SeedFigures]]) -> Iterable[Difference]:
    for other in (ALONE, POOLED, POOLED_NO_PRIVACY, FEDERATED_NO_PRIVACY):
        if other in students:
            yield paired(FEDERATED, other, students)


def _curves(
    studies: Sequence[Study], folder: Path, worlds: Worlds
) -> dict[str, tuple[CurvePoint, ...]]:
    """The federated teacher round by round, and the student where it learns on patients."""
    runs = [ArmRun(FEDERATED, one) for one in studies]
    stages = ["finetune", *(["distill"] if studies[0].distill.on == "patients" else [])]
    return {stage: curve(runs, folder, worlds, stage) for stage in stages}


def _hospital_facts(studies: Sequence[Study], worlds: Worlds) -> dict[str, HospitalFacts]:
    found: dict[str, list[Hospital]] = {}
    for study in studies:
        for one in worlds.judges(study):
            found.setdefault(one.name, []).append(one)
    return {name: _facts(seen) for name, seen in found.items()}


def _facts(seen: Sequence[Hospital]) -> HospitalFacts:
    """One hospital under every seed."""
    rarest = [_rarest(one.test) for one in seen]
    known = [one for one in rarest if one is not None]
    return HospitalFacts(
        declared_patients=_extent(one.declared_patients for one in seen),
        test_patients=_extent(len(set(one.test.patients)) for one in seen),
        rarest=_extent(known) if known else None,
    )


def _rarest(table: Table) -> int | None:
    """Records of the rarest class; None where the outcome has no classes."""
    label = table.dictionary.label
    if not isinstance(label, ClassLabel):
        return None
    return int(np.bincount(table.labels, minlength=len(label.classes)).min())


def _extent(values: Iterable[int]) -> tuple[int, int]:
    known = list(values)
    return min(known), max(known)
