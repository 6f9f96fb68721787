"""The runs of a comparison or a sweep: which it takes, and training those not yet finished."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from client.hospital import Hospital
from common.errors import RunError, StudyError
from common.plugins import OWN_CODE
from common.privacy.units import Trust
from common.study import Study
from server.conduct import Progress
from server.store import RunFolder
from simulations.combinations import Combination
from simulations.hospitals import World, open_world, pooled
from simulations.simulate import run_in_process, run_noise
from simulations.worlds import Worlds

FEDERATED, ALONE, POOLED = "federated", "alone", "pooled"
POOLED_NO_PRIVACY, FEDERATED_NO_PRIVACY = "pooled-no-privacy", "federated-no-privacy"


@dataclass(frozen=True, kw_only=True)
class CompareProgress:
    """Where a comparison or a sweep stands: run ``number`` (from 1) of ``runs``.

    ``progress`` is the run's own, None when it begins or is ``reused``. ``eta_s``: seconds left
    for all of them, None before the first run has finished.
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
class ArmRun:
    """One run of an arm: ``hospital`` is set where one hospital trains alone.

    ``whole``: the study whose hospitals' patients these are, where it is not ``study`` itself.
    """

    arm: str
    study: Study
    hospital: str | None = None
    whole: Study | None = None

    @property
    def drawn_by(self) -> Study:
        """The study that says who the patients are: all arms of a comparison share them."""
        return self.whole or self.study

    @property
    def place(self) -> Path:
        """Its folder below that of all runs."""
        parts = [self.arm, *([self.hospital] if self.hospital else [])]
        return Path(*parts, f"seed-{self.study.seed}")


def runs_of_seed(study: Study, world: World, sweep: Iterable[Combination]) -> list[ArmRun]:
    """All runs of one seed; of ``sweep`` those that are not the study itself.

    One roof is one hospital, whatever minimum the federation sets.

    Raises StudyError when a hospital's name cannot be a folder's.
    """
    for site in world.sites:
        if site.name in (".", "..") or Path(site.name).name != site.name:
            raise StudyError(
                f"hospital {site.name!r}: expected a name that can be a folder's; leave out slashes"
            )
    lone = under_one_roof(study)
    runs = [ArmRun(FEDERATED, study)]
    runs += [ArmRun(ALONE, lone, site.name, whole=study) for site in world.sites]
    runs += [ArmRun(POOLED, lone, whole=study)]
    if study.privacy.trust is not Trust.NONE:
        runs += [
            ArmRun(POOLED_NO_PRIVACY, _without_privacy(lone), whole=study),
            ArmRun(FEDERATED_NO_PRIVACY, _without_privacy(study)),
        ]
    return runs + [one for one in sweep_runs(sweep, study.seed) if one.arm != FEDERATED]


def sweep_runs(sweep: Iterable[Combination], seed: int) -> list[ArmRun]:
    """The runs of each combination under one seed."""
    return [ArmRun(one.arm, one.study.revised(seed=seed)) for one in sweep]


def under_one_roof(study: Study) -> Study:
    """The study for a single hospital, which has nobody to sum with: its own noise suffices.

    Nothing goes wrong between one hospital and itself, and it does not attack itself.
    """
    trust = study.privacy.trust
    return study.revised(
        federation__minimum_hospitals=1,
        federation__hospitals=None,
        privacy__trust="local" if trust is Trust.DISTRIBUTED else trust.value,
        privacy__spare_attempts=None,
        **({"simulation__scenario": None} if study.simulation else {}),
    )


def _without_privacy(study: Study) -> Study:
    # The evaluation's noised release would carry no noise either: it is left out.
    return study.revised(
        privacy__trust="none", privacy__epsilon=None, privacy__delta=None, evaluation__epsilon=None
    )


def train(
    runs: list[ArmRun],
    folder: Path,
    worlds: Worlds,
    *,
    noise_seed: int | None,
    watch: Watch,
    debug: bool,
) -> None:
    """Train what is not finished yet, below ``folder``; ``worlds``: their patients."""
    started, trained = time.monotonic(), 0
    for number, run in enumerate(runs, start=1):
        finished = (folder / run.place / "result.json").is_file()
        elapsed = time.monotonic() - started
        here = CompareProgress(
            number=number,
            runs=len(runs),
            arm=run.arm,
            hospital=run.hospital,
            seed=run.study.seed,
            reused=finished,
            progress=None,
            elapsed_s=elapsed,
            eta_s=elapsed / trained * (len(runs) - number + 1) if trained else None,
        )
        watch(here)
        if finished:
            continue
        place = _open(folder / run.place, run, worlds.data_folder, noise_seed)
        world = replace(worlds.of(run.drawn_by), study=run.study)
        noise = run_noise(place, [site.name for site in world.sites], noise_seed)
        hospitals = _cast(run, open_world(world, noise))
        run_in_process(
            run.study, place, hospitals, world.corpus, _watching(here, watch), debug=debug
        )
        trained += 1


def _watching(here: CompareProgress, watch: Watch) -> Callable[[Progress], None]:
    return lambda progress: watch(replace(here, progress=progress))


def _open(path: Path, run: ArmRun, data_folder: Path, noise_seed: int | None) -> RunFolder:
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
                "engine": "stacked",
                "code_folder": os.environ.get(OWN_CODE, ""),
            },
        )
    return folder


def _cast(run: ArmRun, hospitals: list[Hospital]) -> list[Hospital]:
    """The hospitals that take part in ``run``."""
    if run.hospital is not None:
        return [one for one in hospitals if one.name == run.hospital]
    return [pooled(hospitals)] if run.arm in (POOLED, POOLED_NO_PRIVACY) else hospitals
