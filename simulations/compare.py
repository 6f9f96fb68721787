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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.hospital import Hospital
from common.errors import RunError, StudyError
from common.learning.metrics import (
    accuracy_from_histogram,
    auc_from_histogram,
    mean_interval,
)
from common.privacy.units import Trust
from common.study import Study
from common.tensors import write_atomically
from server.conduct import Progress
from server.store import RunFolder
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
from simulations.hospitals import World, build_world, open_world, pooled, seeded_noise
from simulations.simulate import _noise, run_in_process

FEDERATED, ALONE, POOLED = "federated", "alone", "pooled"
POOLED_NO_PRIVACY, FEDERATED_NO_PRIVACY = "pooled-no-privacy", "federated-no-privacy"

_TITLES = {
    FEDERATED: "Federated",
    ALONE: "Each hospital alone",
    POOLED: "Pooled data",
    POOLED_NO_PRIVACY: "Pooled data, no privacy",
    FEDERATED_NO_PRIVACY: "Federated, no privacy",
}
# The study's ε with two below it and one above: 0.5, 1, 3 and 8 for a study at 3.
_SWEEP_FACTORS = (1 / 6, 1 / 3, 1.0, 8 / 3)


@dataclass(frozen=True, kw_only=True)
class CompareProgress:
    """Where a comparison stands: run ``number`` (from 1) of ``runs``.

    ``progress`` is the run's own, None when it begins or is ``reused``. ``eta_s``: seconds left
    for the whole comparison, None before the first run has finished.
    """

    number: int
    runs: int
    arm: str
    hospital: str | None
    seed: int
    reused: bool
    progress: Progress | None
    elapsed_s: float
    eta_s: float | None


Watch = Callable[[CompareProgress], None]


@dataclass(frozen=True)
class _Run:
    """One run of an arm: ``hospital`` is set where one hospital trains alone."""

    arm: str
    study: Study
    hospital: str | None = None

    @property
    def place(self) -> Path:
        parts = [self.arm, *([self.hospital] if self.hospital else [])]
        return Path(*parts, f"seed-{self.study.seed}")


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
    runs = [run for seed in numbers for run in _runs(study.revised(seed=seed), worlds[seed], sweep)]
    _train(runs, folder, worlds, data_folder, noise_seed, watch, debug)

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


def _runs(study: Study, world: World, sweep: Iterable[float]) -> list[_Run]:
    """All runs of one seed. One roof is one hospital, whatever minimum the federation sets."""
    lone = study.revised(federation__minimum_hospitals=1)
    runs = [_Run(FEDERATED, study)]
    runs += [_Run(ALONE, lone, site.name) for site in world.sites]
    runs += [_Run(POOLED, lone)]
    if study.privacy.trust is not Trust.NONE:
        runs += [
            _Run(POOLED_NO_PRIVACY, _without_privacy(lone)),
            _Run(FEDERATED_NO_PRIVACY, _without_privacy(study)),
        ]
    runs += [
        _Run(_epsilon_arm(one), study.revised(privacy__epsilon=one))
        for one in sweep
        if one != study.privacy.epsilon
    ]
    return runs


def _without_privacy(study: Study) -> Study:
    # The evaluation's noised release would carry no noise either: it is left out.
    return study.revised(
        privacy__trust="none", privacy__epsilon=None, privacy__delta=None, evaluation__epsilon=None
    )


def _epsilon_arm(epsilon: float) -> str:
    return f"epsilon-{epsilon:g}"


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


def _train(
    runs: list[_Run],
    folder: Path,
    worlds: Mapping[int, World],
    data_folder: Path,
    noise_seed: int | None,
    watch: Watch,
    debug: bool,
) -> None:
    started, trained = time.monotonic(), 0
    for number, run in enumerate(runs, start=1):
        finished = (folder / run.place / "result.json").is_file()

        def tell(
            progress: Progress | None,
            *,
            number: int = number,
            run: _Run = run,
            reused: bool = finished,
            trained: int = trained,
        ) -> None:
            elapsed = time.monotonic() - started
            watch(
                CompareProgress(
                    number=number,
                    runs=len(runs),
                    arm=run.arm,
                    hospital=run.hospital,
                    seed=run.study.seed,
                    reused=reused,
                    progress=progress,
                    elapsed_s=elapsed,
                    eta_s=elapsed / trained * (len(runs) - number + 1) if trained else None,
                )
            )

        tell(None)
        if not finished:
            place = _open(folder / run.place, run, data_folder, noise_seed)
            world = worlds[run.study.seed]
            noise = _noise(place, [site.name for site in world.sites], noise_seed)
            hospitals = _cast(run, open_world(replace(world, study=run.study), noise))
            run_in_process(run.study, place, hospitals, world.corpus, tell, debug=debug)
            trained += 1


def _open(path: Path, run: _Run, data_folder: Path, noise_seed: int | None) -> RunFolder:
    """The run's folder, new or as an interruption left it."""
    if (path / "study.toml").is_file():
        folder, found = RunFolder.open(path)
        if found.model_dump(mode="json") != run.study.model_dump(mode="json"):
            raise RunError(f"{path} holds a run of another study; start over with --replace")
    else:
        folder = RunFolder.create(path, run.study)
    if run.arm not in (ALONE, POOLED, POOLED_NO_PRIVACY):
        # Only where all hospitals take part: `consilium resume` gives a run all of them.
        folder.write_json(
            "simulation.json",
            {
                "data_folder": str(data_folder.resolve()),
                "noise_seed": noise_seed,
            },
        )
    return folder


def _cast(run: _Run, hospitals: list[Hospital]) -> list[Hospital]:
    """The hospitals that take part in ``run``."""
    if run.hospital is not None:
        return [one for one in hospitals if one.name == run.hospital]
    return [pooled(hospitals)] if run.arm in (POOLED, POOLED_NO_PRIVACY) else hospitals


_Ledger = dict[str, dict[str, list[SeedFigures]]]
"""Role (student, teacher) → arm → figures, seed by seed."""


def _score(runs: list[_Run], folder: Path, worlds: Mapping[int, World]) -> _Ledger:
    """Every arm's models at every hospital's test patients."""
    ledger: _Ledger = {"student": {}, "teacher": {}}
    for seed, world in worlds.items():
        hospitals = _judges(world)
        scores: dict[tuple[str, str], list[list[Scores]]] = {}
        owners: dict[str, list[str]] = {}
        for run in (one for one in runs if one.study.seed == seed):
            teacher, student, features = finished_models(RunFolder(folder / run.place), run.study)
            for role, model in (("teacher", teacher), ("student", student)):
                scored = score(model, run.study, features, hospitals)
                scores.setdefault((role, run.arm), []).append(scored)
            owners.setdefault(run.arm, []).append(run.hospital or "")
        for (role, arm), models in scores.items():
            everywhere = [together(one) for one in models]
            at_home = models[0]
            if arm == ALONE:
                at_home = [
                    next(one for one in scored if one.hospital == owner)
                    for owner, scored in zip(owners[arm], models, strict=True)
                ]
            ledger[role].setdefault(arm, []).append(seed_figures(everywhere, at_home))
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
    """AUC (two classes) and accuracy from the sum of the hospitals' released histograms."""
    aucs, accuracies = [], []
    for run in runs:
        histograms = run.read_json("result.json")["evaluation"]
        if not histograms:
            return None
        total = np.sum([np.array(one) for one in histograms.values()], axis=0)
        aucs.append(auc_from_histogram(total) if len(total) == 2 else math.nan)
        accuracies.append(accuracy_from_histogram(total))
    return Quality(mean_interval(aucs), mean_interval(accuracies))


def _differences(students: Mapping[str, Sequence[SeedFigures]]) -> Iterable[Difference]:
    for other in (ALONE, POOLED, POOLED_NO_PRIVACY, FEDERATED_NO_PRIVACY):
        if other in students:
            yield paired(FEDERATED, other, students)


def _sweep(study: Study, epsilons: Sequence[float], ledger: _Ledger) -> Iterable[SweepPoint]:
    for one in epsilons:
        arm = FEDERATED if one == study.privacy.epsilon else _epsilon_arm(one)
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
