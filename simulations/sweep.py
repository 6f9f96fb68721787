"""Every combination of some settings, over several seeds: what does each setting bring?

Every run is an ordinary run folder, so an interrupted sweep continues where it stopped::

    FOLDER/
    ├── results.json, results.csv        the figures
    ├── sweep.json                       what was asked
    └── KEY=VALUE,KEY=VALUE/seed-N/      the study with these settings

A sweep shows all combinations and chooses none; what choosing would cost stands beside them
(see ``price``).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import StudyError
from common.files import write_atomically
from common.learning.metrics import Interval
from common.privacy.budget import budget_of, evaluation_budget_of
from common.secagg.plan import check_sums
from common.study import Study
from common.tasks import Measure
from simulations.arms import ArmRun, Watch, sweep_runs, train
from simulations.claims import claim
from simulations.combinations import Combination, Setting, combine, in_words
from simulations.comparison import CurvePoint, SweepPoint, curves_json, without_nan
from simulations.measures import leading, measures_of
from simulations.price import Price, price_of
from simulations.scoring import curve, score_runs, sweep_points
from simulations.worlds import Worlds


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep found. ``curves``: the teacher after each round, by combination."""

    study: Study
    folder: Path
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    hospitals: Mapping[str, int]
    points: tuple[SweepPoint, ...]
    curves: Mapping[str, tuple[CurvePoint, ...]]
    price: Price | None

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What the study's task measures, the leading one first."""
        return measures_of(self.study)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``results.json``; figures that do not exist become None."""
        tree: dict[str, Any] = {
            "study": self.study.name,
            "study_digest": self.study.digest(),
            "interval": "95 %, Student's t over the seeds",
            "seeds": list(self.seeds),
            "measures": [asdict(one) for one in self.measures],
            "settings": {one.key: list(one.values) for one in self.settings},
            "combinations": [asdict(one) for one in self.points],
            "curves": curves_json(self.curves, leading(self.study)),
            "chosen": None,
            "price_of_choosing": None if self.price is None else asdict(self.price),
        }
        return {key: without_nan(value) for key, value in tree.items()}


def sweep(
    study: Study,
    settings: Sequence[Setting],
    folder: Path,
    data_folder: Path,
    *,
    seeds: int,
    watch: Watch,
    noise_seed: int | None = None,
    replace_existing: bool = False,
    debug: bool = False,
) -> Sweep:
    """Run every combination of ``settings`` for ``seeds`` seeds from the study's own; score them.

    Runs that ``folder`` already holds are reused, interrupted ones continued, so that more values
    or seeds cost only themselves. ``noise_seed``: repeatable test noise, no privacy.

    Raises RunError when ``folder`` holds another study's, StudyError on impossible settings; both
    before anything runs.
    """
    if seeds < 1:
        raise StudyError(f"seeds: expected at least 1, found {seeds}")
    numbers, worlds = [study.seed + index for index in range(seeds)], Worlds(data_folder)
    combinations = checked_combinations(study, settings, numbers, worlds)
    claim(
        folder,
        "sweep.json",
        "sweep",
        {"study": study.model_dump(mode="json"), "noise_seed": noise_seed},
        data_folder=data_folder,
        replace_existing=replace_existing,
    )
    runs = [run for seed in numbers for run in sweep_runs(combinations, seed)]
    train(runs, folder, worlds, noise_seed=noise_seed, watch=watch, debug=debug)
    found = Sweep(
        study=study,
        folder=folder,
        settings=tuple(settings),
        seeds=tuple(numbers),
        hospitals={one.name: one.declared_patients for one in worlds.judges(study)},
        points=sweep_points(combinations, folder, numbers, score_runs(runs, folder, worlds)),
        curves={
            in_words(one.settings): curve(_runs_of(one, runs), folder, worlds, "finetune")
            for one in combinations
        },
        price=price_of(study, combinations, seeds),
    )
    text = json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "results.json", text.encode())
    write_atomically(folder / "results.csv", results_csv(found).encode())
    return found


def checked_combinations(
    study: Study, settings: Sequence[Setting], seeds: Sequence[int], worlds: Worlds
) -> tuple[Combination, ...]:
    """Every combination of ``settings``, each known to have data, hospitals and a budget.

    Raises StudyError, PrivacyError or DataError naming the first one that has not.
    """
    if not settings:
        raise StudyError("--set: expected at least one setting; try --set privacy.epsilon=0.5,1,3")
    combinations = combine(study, settings)
    for one in combinations:
        budget_of(one.study)
        evaluation_budget_of(one.study)
        check_sums(one.study)
        for seed in seeds:
            worlds.judges(one.study.revised(seed=seed))
    return combinations


def results_csv(found: Sweep) -> str:
    """One line for each combination; empty cells where a figure does not exist."""
    keys = [one.key for one in found.settings]
    measures, first = [one.key for one in found.measures], leading(found.study).key
    figures = (*measures, f"teacher_{first}", f"released_{first}", "bytes_per_hospital")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *keys,
            "epsilon",
            "charged_rounds",
            *(f"{name}{part}" for name in figures for part in ("", "_low", "_high")),
            "worst_hospital",
            f"worst_{first}",
            "seeds",
        ]
    )
    for one in found.points:
        values = (
            *(one.student[key] for key in measures),
            one.teacher[first],
            None if one.released is None else one.released[first],
            one.bytes_per_hospital,
        )
        worst = one.worst[first]
        writer.writerow(
            [
                *(_cell(one.settings[key]) for key in keys),
                _cell(one.epsilon),
                one.rounds,
                *(cell for value in values for cell in _interval_cells(value)),
                worst.hospital or "",
                _cell(without_nan(worst.value.mean)),
                len(found.seeds),
            ]
        )
    return text.getvalue()


def _interval_cells(value: Interval | None) -> list[Any]:
    if value is None:
        return ["", "", ""]
    return [_cell(without_nan(part)) for part in (value.mean, value.low, value.high)]


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _runs_of(one: Combination, runs: Sequence[ArmRun]) -> list[ArmRun]:
    return [run for run in runs if run.arm == one.arm]
