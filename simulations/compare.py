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
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from client.hospital import Hospital
from common.errors import RunError, StudyError
from common.files import write_atomically
from common.learning.metrics import (
    accuracy_from_histogram,
    auc_from_histogram,
    mean_interval,
)
from common.privacy.units import Trust
from common.study import Study
from server.store import RunFolder
from simulations.arms import (
    ALONE,
    FEDERATED,
    FEDERATED_NO_PRIVACY,
    POOLED,
    POOLED_NO_PRIVACY,
    ArmRun,
    Watch,
    epsilon_arm,
    runs_of_seed,
    train,
)
from simulations.comparison import (
    Arm,
    Comparison,
    CurvePoint,
    Difference,
    HospitalFacts,
    Quality,
    SeedFigures,
    SweepPoint,
    over_seeds,
    paired,
    seed_figures,
)
from simulations.evaluation import Scores, finished_models, round_curve, score, together
from simulations.hospitals import World, build_world, open_world, seeded_noise

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
    sweep = _sweep_epsilons(study, epsilons)
    _claim(folder, study, data_folder, noise_seed, replace_existing)
    numbers = [study.seed + index for index in range(seeds)]
    worlds = {seed: build_world(study.revised(seed=seed), data_folder) for seed in numbers}
    runs = [
        run
        for seed in numbers
        for run in runs_of_seed(study.revised(seed=seed), worlds[seed], sweep)
    ]
    train(
        runs,
        folder,
        worlds,
        data_folder=data_folder,
        noise_seed=noise_seed,
        watch=watch,
        debug=debug,
    )

    ledger = _score(runs, folder, worlds)
    comparison = Comparison(
        study=study,
        folder=folder,
        seeds=tuple(numbers),
        hospitals=_hospital_facts(list(worlds.values())),
        arms={arm: _arm(arm, study, folder, numbers, ledger) for arm in _arms(study)},
        differences=tuple(_differences(ledger["student"])),
        sweep=tuple(_sweep(study, sweep, ledger)),
        curves=_curves(study, folder, worlds),
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


def _sweep_epsilons(study: Study, asked: Sequence[float] | None) -> tuple[float, ...]:
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
    return tuple(sorted({*asked, own}))


def _arms(study: Study) -> tuple[str, ...]:
    if study.privacy.trust is Trust.NONE:
        return (FEDERATED, ALONE, POOLED)
    return (FEDERATED, ALONE, POOLED, POOLED_NO_PRIVACY, FEDERATED_NO_PRIVACY)


def _claim(
    folder: Path, study: Study, data_folder: Path, noise_seed: int | None, replace_existing: bool
) -> None:
    """Make ``folder`` this comparison's own; arms of another study must never mix with it."""
    path = folder / "compare.json"
    if replace_existing and path.is_file():
        shutil.rmtree(folder)
    asked: dict[str, Any] = {"study": study.model_dump(mode="json"), "noise_seed": noise_seed}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in asked} != asked:
            raise RunError(
                f"{folder} holds a comparison of another study or other noise; choose another "
                f"folder, or start over with --replace"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder}: not empty and not a comparison; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    settings = asked | {"data_folder": str(data_folder.resolve())}
    write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())


_Ledger = dict[str, dict[str, list[SeedFigures]]]
"""Role (student, teacher) → arm → figures, seed by seed."""


def _score(runs: list[ArmRun], folder: Path, worlds: Mapping[int, World]) -> _Ledger:
    """Every arm's models at every hospital's test patients."""
    ledger: _Ledger = {"student": {}, "teacher": {}}
    for seed, world in worlds.items():
        hospitals = _judges(world)
        everywhere: dict[tuple[str, str], list[Scores]] = {}
        at_home: dict[tuple[str, str], list[Scores]] = {}
        for run in (one for one in runs if one.study.seed == seed):
            teacher, student, features = finished_models(RunFolder(folder / run.place), run.study)
            for role, model in (("teacher", teacher), ("student", student)):
                scored = score(model, run.study, features, hospitals)
                own = [one for one in scored if run.hospital in (None, one.hospital)]
                everywhere.setdefault((role, run.arm), []).append(together(scored))
                at_home.setdefault((role, run.arm), []).extend(own)
        for (role, arm), scores in everywhere.items():
            figures = seed_figures(scores, at_home[role, arm])
            ledger[role].setdefault(arm, []).append(figures)
    return ledger


def _judges(world: World) -> list[Hospital]:
    """The hospitals as keepers of test patients; they release nothing, so their noise is idle."""
    return open_world(world, seeded_noise(0, [site.name for site in world.sites]))


def _arm(arm: str, study: Study, folder: Path, seeds: Sequence[int], ledger: _Ledger) -> Arm:
    private = "no-privacy" not in arm
    return Arm(
        title=_TITLES[arm],
        epsilon=study.privacy.epsilon if private else None,
        student=over_seeds(ledger["student"][arm]),
        teacher=over_seeds(ledger["teacher"][arm]),
        # Histograms of different models make no common ranking: none for hospitals alone.
        released=None
        if arm == ALONE
        else _released([RunFolder(folder / arm / f"seed-{seed}") for seed in seeds]),
    )


def _released(runs: Sequence[RunFolder]) -> Quality | None:
    """AUC (two classes) and accuracy from the sum of the released histograms."""
    aucs, accuracies = [], []
    for run in runs:
        histograms = run.read_json("result.json")["evaluation"]
        if not histograms:
            return None
        total = np.sum([np.array(one["counts"]) for one in histograms], axis=0)
        aucs.append(_held(auc_from_histogram(total)) if len(total) == 2 else math.nan)
        accuracies.append(_held(accuracy_from_histogram(total)))
    return Quality(mean_interval(aucs), mean_interval(accuracies))


def _differences(students: Mapping[str, Sequence[SeedFigures]]) -> Iterable[Difference]:
    for other in (ALONE, POOLED, POOLED_NO_PRIVACY, FEDERATED_NO_PRIVACY):
        if other in students:
            yield paired(FEDERATED, other, students)


def _sweep(study: Study, epsilons: Sequence[float], ledger: _Ledger) -> Iterable[SweepPoint]:
    for one in epsilons:
        arm = FEDERATED if one == study.privacy.epsilon else epsilon_arm(one)
        yield SweepPoint(
            one,
            over_seeds(ledger["student"][arm]).together,
            over_seeds(ledger["teacher"][arm]).together,
        )


def _curves(
    study: Study, folder: Path, worlds: Mapping[int, World]
) -> dict[str, tuple[CurvePoint, ...]]:
    """The federated arm's AUC round by round: the teacher's, and the student's on patients."""
    stages = ["finetune", *(["distill"] if study.distill.on == "patients" else [])]
    curves = {}
    for stage in stages:
        by_round: dict[int, list[float]] = {}
        for seed, world in worlds.items():
            run = RunFolder(folder / FEDERATED / f"seed-{seed}")
            for number, value in round_curve(run, world.study, _judges(world), stage):
                by_round.setdefault(number, []).append(value)
        curves[stage] = tuple(
            CurvePoint(number, mean_interval(values)) for number, values in sorted(by_round.items())
        )
    return curves


def _hospital_facts(worlds: Sequence[World]) -> dict[str, HospitalFacts]:
    found: dict[str, list[tuple[int, int, int]]] = {}
    for world in worlds:
        classes = len(world.study.dictionary.label.classes)
        for one in _judges(world):
            rarest = int(np.bincount(one.test.labels, minlength=classes).min())
            found.setdefault(one.name, []).append(
                (one.declared_patients, len(set(one.test.patients)), rarest)
            )
    return {
        name: HospitalFacts(
            declared_patients=_extent(one[0] for one in seen),
            test_patients=_extent(one[1] for one in seen),
            rarest_class=_extent(one[2] for one in seen),
        )
        for name, seen in found.items()
    }


def _extent(values: Iterable[int]) -> tuple[int, int]:
    known = list(values)
    return min(known), max(known)


def _held(share: float) -> float:
    """A figure from noised counts, held within [0, 1]; NaN stays."""
    return share if math.isnan(share) else min(1.0, max(0.0, share))
