"""A comparison that nobody trained, for tests of what is drawn and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.learning.metrics import mean_interval
from common.study import Study, load_study
from common.tasks import Entry, Measure
from common.tasks.classification import Classification
from simulations.comparison import (
    Arm,
    Comparison,
    CurvePoint,
    HospitalFacts,
    ModelFigures,
    SeedFigures,
    SweepPoint,
    over_seeds,
    paired,
    quality,
)
from simulations.measures import measures_of

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
ERROR = Measure("error", "dose error", higher_is_better=False, bounds=(None, None))
NASTY = '<b>ward</b> & "co"'


@dataclass(frozen=True)
class Dose(Classification):
    """A task that no study has: its only figure is better the lower, and has no end."""

    measures = (ERROR,)

    def figures(self, labels: Any, predictions: Any) -> dict[str, float]:
        """Mean absolute error, in thousandths; none at the hospital of a single record."""
        error = 1000 * np.abs(labels - predictions[:, 1]).mean()
        return {"error": float(error) if len(labels) > 1 else float("nan")}

    def released_figures(self, counts: Any) -> dict[str, float]:
        """Whatever the counts' sum is."""
        return {"error": float(counts.sum()) or float("nan")}


DOSE = Entry(lambda name, _: Dose(name, 2), ("table",), ("classes",))


def a_point(settings: dict[str, Any], model: ModelFigures, kilobytes: float = 100) -> SweepPoint:
    """One combination of a sweep."""
    return SweepPoint(
        arm=",".join(f"{key}={value}" for key, value in settings.items()),
        settings=settings,
        epsilon=settings.get("privacy.epsilon", 3.0),
        rounds=10,
        student=model.together,
        teacher=model.together,
        worst=model.worst,
        released=None,
        bytes_per_hospital=mean_interval([1e3 * kilobytes]),
    )


def a_comparison(folder: Path, *, seeds: int = 3, study: Study | None = None) -> Comparison:
    """Three hospitals, one without a leading figure; federated beats alone.

    ``study``: another one than Wisconsin's. Where lower is better, figures are what lacks to 1.
    """
    study = study or load_study(EXAMPLES / "wisconsin.toml")
    measures = measures_of(study)
    generator = np.random.default_rng(0)

    def named(first: float, other: float) -> dict[str, float]:
        values = [first, *[other] * (len(measures) - 1)]
        return {
            one.key: value if one.higher_is_better else 1 - value
            for one, value in zip(measures, values, strict=True)
        }

    def figures(level: float) -> list[SeedFigures]:
        made = []
        for _ in range(seeds):
            drawn = np.clip(level + generator.normal(0, 0.02, 4), 0, 1).tolist()
            made.append(
                SeedFigures(
                    together=named(drawn[0], drawn[1]),
                    hospitals={
                        "large": named(drawn[2], 0.9),
                        NASTY: named(drawn[3], 0.8),
                        "tiny": named(float("nan"), 1.0),
                    },
                )
            )
        return made

    levels = {
        "federated": 0.9,
        "alone": 0.8,
        "pooled": 0.92,
        "pooled-no-privacy": 0.95,
        "federated-no-privacy": 0.94,
    }
    drawn = {name: figures(level) for name, level in levels.items()}
    noised = quality([named(0.85, 0.8)] * seeds)
    curve = {number: quality([named(0.6 + number / 20, 0.5)] * seeds) for number in (1, 2, 3)}
    return Comparison(
        study=study,
        folder=folder,
        seeds=tuple(range(seeds)),
        hospitals={
            name: HospitalFacts(
                declared_patients=(size, size),
                test_patients=(size // 3,) * 2,
                rarest=(0 if name == "tiny" else 3,) * 2,
            )
            for name, size in (("large", 200), (NASTY, 60), ("tiny", 10))
        },
        arms={
            name: Arm(
                title=name.replace("-", " ").capitalize(),
                epsilon=None if "no-privacy" in name else 3.0,
                student=over_seeds(one, measures),
                teacher=over_seeds(one, measures),
                released=noised if name == "federated" else None,
            )
            for name, one in drawn.items()
        },
        differences=tuple(
            paired("federated", name, drawn) for name in levels if name != "federated"
        ),
        sweep=tuple(
            a_point({"privacy.epsilon": epsilon}, over_seeds(figures(0.8 + epsilon / 50), measures))
            for epsilon in (0.5, 3.0)
        ),
        curves={
            "finetune": tuple(
                CurvePoint(number, found[measures[0].key]) for number, found in curve.items()
            )
        },
    )
