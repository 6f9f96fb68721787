"""The best of a random number of trials, and nothing of the others: a choice that is charged.

::

    FOLDER/
    ├── selection.json    what was asked
    ├── chosen.json       the outcome
    └── winner/           the run of the best trial; no other is kept

How many trials there are, and of which combinations, is drawn once, secretly and independently of
any patient; every trial has fresh noise and is scored by the noised histogram it releases. Then the
theorems of Papernot & Steinke 2022 give the price (``common.privacy.selection``). They speak of
whoever is shown the outcome: not of one who watches the machine, or the clock.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import StudyError
from common.files import write_atomically
from common.privacy.budget import evaluation_budget_of
from common.privacy.selection import Trials
from common.privacy.units import Trust
from common.randomness import NoiseSource, SecretNoise, SeededNoise
from common.study import Study
from server.store import RunFolder
from simulations.arms import ArmRun, train
from simulations.claims import claim
from simulations.combinations import Combination, Setting, in_words
from simulations.comparison import without_nan
from simulations.measures import gain, measures_of, number
from simulations.price import Cost, selection_cost
from simulations.scoring import released_figures
from simulations.sweep import checked_combinations
from simulations.worlds import Worlds

WINNER = "winner"
_TRIALS, _DRAWN, _CHOSEN = "trials", "trials.json", "chosen.json"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The outcome. ``settings``: of the best trial; None where none was drawn (Poisson only).

    ``released``: its figures from its noised histogram, which is all the choice rests on.
    ``guaranteed``: whether all noise was secret; else ``cost`` promises nothing.
    """

    study: Study
    folder: Path
    combinations: int
    trials: Trials
    settings: Mapping[str, Any] | None
    released: Mapping[str, float] | None
    cost: Cost
    guaranteed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tree: dict[str, Any] = {
            "study": self.study.name,
            "study_digest": self.study.digest(),
            "combinations": self.combinations,
            "trials": asdict(self.trials),
            "chosen": None if self.settings is None else dict(self.settings),
            "released": self.released,
            "cost": asdict(self.cost) | {"delta": self.study.privacy.delta},
            "guaranteed": self.guaranteed,
        }
        return {key: without_nan(value) for key, value in tree.items()}


def select(
    study: Study,
    settings: Sequence[Setting],
    folder: Path,
    data_folder: Path,
    *,
    trials: Trials,
    noise_seed: int | None = None,
    replace_existing: bool = False,
    debug: bool = False,
) -> Selection:
    """Keep the best of a random number of ``trials`` of the combinations of ``settings``.

    Interrupted, the same call goes on with the same draw. Raises StudyError where a combination
    promises nothing or releases no histogram to be judged by, RunError on another's folder.
    """
    worlds = Worlds(data_folder)
    combinations = checked_combinations(study, settings, [study.seed], worlds)
    cost = _checked_cost(study, combinations, trials)
    claim(
        folder,
        "selection.json",
        "selection",
        {
            "study": study.model_dump(mode="json"),
            "noise_seed": noise_seed,
            "settings": {one.key: list(one.values) for one in settings},
            "trials": asdict(trials),
        },
        data_folder=data_folder,
        replace_existing=replace_existing,
    )
    if not (folder / _CHOSEN).is_file():
        drawn = _drawn(folder, len(combinations), trials, noise_seed)
        best: tuple[tuple[int, float], int, int] | None = None
        for number, index in enumerate(drawn):
            run = ArmRun(f"{_TRIALS}/{number}", combinations[index].study)
            # Test noise differs from trial to trial, as secret noise does by itself.
            seed = None if noise_seed is None else noise_seed + number
            train([run], folder, worlds, noise_seed=seed, watch=lambda _: None, debug=debug)
            scored = _score(RunFolder(folder / run.place), run.study)
            if best is None or scored > best[0]:
                best = (scored, number, index)
        _write_chosen(folder, combinations, best)
    return _finished(study, folder, len(combinations), trials, cost, noise_seed)


def _checked_cost(study: Study, combinations: Sequence[Combination], trials: Trials) -> Cost:
    for one in combinations:
        if one.study.privacy.trust is Trust.NONE:
            raise StudyError(
                f"{in_words(one.settings)}: trust = 'none' promises nothing, so that a choice has "
                f"no price; leave out --select"
            )
        if evaluation_budget_of(one.study) is None:
            raise StudyError(
                f"{in_words(one.settings)}: a choice is made by released scores; grant them a "
                f"budget (evaluation.epsilon), or leave out --select"
            )
    assert study.privacy.delta is not None  # noqa: S101  (trust is not 'none')
    cost = selection_cost([one.study for one in combinations], trials, delta=study.privacy.delta)
    if cost.training is None or cost.testing is None:
        raise StudyError(
            "--select: no finite ε bounds this choice; combinations must share unit and relation, "
            "and replace_one needs sampling_rate = 1"
        )
    return cost


def _drawn(folder: Path, combinations: int, trials: Trials, noise_seed: int | None) -> list[int]:
    """Which combination each trial runs; drawn once, and secret until it is deleted."""
    path = folder / _DRAWN
    if not path.is_file():
        source: NoiseSource = (
            SecretNoise.generate() if noise_seed is None else SeededNoise(noise_seed, "selection")
        )
        stream = source.stream("selection", "trials")
        count = trials.draw(stream)
        drawn = [int(one * combinations) for one in stream.uniform(count)]
        write_atomically(path, json.dumps(drawn).encode())
    found: list[int] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _score(run: RunFolder, study: Study) -> tuple[int, float]:
    """What trials are ordered by, the better the higher: the first measure the histogram shows.

    A trial with a figure of an earlier measure is better than one without: figures of different
    measures are never compared.
    """
    figures = released_figures(run, study)
    assert figures is not None  # noqa: S101  (see _checked_cost)
    for place, measure in enumerate(measures_of(study)):
        value = figures[measure.key]
        if not math.isnan(value):
            return -place, gain(measure, value)
    return -len(figures), -math.inf


def _write_chosen(
    folder: Path,
    combinations: Sequence[Combination],
    best: tuple[tuple[int, float], int, int] | None,
) -> None:
    chosen: dict[str, Any] = {"settings": None, "trial": None}
    if best is not None:
        _, number, index = best
        chosen = {"settings": dict(combinations[index].settings), "trial": number}
    write_atomically(folder / _CHOSEN, json.dumps(chosen).encode())


def _finished(
    study: Study,
    folder: Path,
    combinations: int,
    trials: Trials,
    cost: Cost,
    noise_seed: int | None,
) -> Selection:
    """Keep the winner, delete all else, say what it cost; may be repeated after an interruption."""
    chosen = json.loads((folder / _CHOSEN).read_text(encoding="utf-8"))
    winner = folder / WINNER
    if chosen["trial"] is not None and not winner.exists():
        (folder / _TRIALS / str(chosen["trial"]) / f"seed-{study.seed}").rename(winner)
    shutil.rmtree(folder / _TRIALS, ignore_errors=True)
    (folder / _DRAWN).unlink(missing_ok=True)
    # Its number, counted from 0, tells that there were at least so many.
    write_atomically(
        folder / _CHOSEN, json.dumps({"settings": chosen["settings"], "trial": None}).encode()
    )
    settings = chosen["settings"]
    found = Selection(
        study=study,
        folder=folder,
        combinations=combinations,
        trials=trials,
        settings=settings,
        released=None if settings is None else released_figures(*RunFolder.open(winner)),
        cost=cost,
        guaranteed=noise_seed is None,
    )
    if winner.exists():
        _state_price(winner, found)
    return found


def _state_price(winner: Path, found: Selection) -> None:
    """The statement of one trial alone would promise too much: the choice is charged as well."""
    alone = winner / "privacy.json"
    if alone.exists():
        alone.replace(winner / "privacy-of-one-trial.json")
    write_atomically(winner / "PRIVACY.md", price_words(found).encode())


def price_words(found: Selection) -> str:
    """The price of the choice in words, as Markdown."""
    unit = found.study.privacy.unit.value
    if not found.guaranteed:
        return "**No privacy guarantee.** The noise came from a seed, which anybody can repeat.\n"
    return (
        f"This model is the best of a random number of trials ({found.trials.law}, mean "
        f"{found.trials.mean:g}) over {found.combinations} combinations of settings, judged by "
        f"noised histograms. It and the choice together are "
        f"(ε = {found.cost.training:.3g}, δ = {found.study.privacy.delta:g})-differentially "
        f"private for each training {unit}, and (ε = {found.cost.testing:.3g}, "
        f"δ = {found.study.privacy.delta:g}) for each test {unit} (Papernot & Steinke 2022, "
        f"arXiv 2110.03620), for whoever sees this outcome alone: how many trials there were must "
        f"stay unknown.\n"
    )


def selection_lines(found: Selection) -> list[str]:
    """The outcome for a terminal."""
    if found.settings is None:
        return [
            "No trial was drawn, as a Poisson law may; the study's own settings stand.",
            f"Privacy: {price_words(found).strip()}",
        ]
    assert found.released is not None  # noqa: S101  (a trial was run)
    known = [
        f"{one.title} {number(found.released[one.key])}"
        for one in measures_of(found.study)
        if not math.isnan(found.released[one.key])
    ]
    return [
        f"Chosen: {in_words(found.settings)}",
        f"Released of it: {', '.join(known) or 'no figure'}, from noised histograms.",
        f"Privacy: {price_words(found).strip()}",
        f"Its run: {found.folder / WINNER}/; the other trials are deleted.",
    ]
