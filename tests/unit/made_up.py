"""A comparison that nobody trained, for tests of what is drawn and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.learning.metrics import mean_interval
from common.study import load_study
from simulations.comparison import (
    Arm,
    Comparison,
    CurvePoint,
    HospitalFacts,
    ModelFigures,
    Quality,
    SeedFigures,
    SweepPoint,
    over_seeds,
    paired,
)

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
NASTY = '<b>ward</b> & "co"'


def a_point(settings: dict[str, Any], model: ModelFigures, kilobytes: float = 100) -> SweepPoint:
    """One combination of a sweep."""
    return SweepPoint(
        arm=",".join(f"{key}={value}" for key, value in settings.items()),
        settings=settings,
        epsilon=settings.get("privacy.epsilon", 3.0),
        rounds=10,
        student=model.together,
        teacher=model.together,
        worst_auc=model.worst_auc,
        released=None,
        bytes_per_hospital=mean_interval([1e3 * kilobytes]),
    )


def a_comparison(folder: Path, *, seeds: int = 3) -> Comparison:
    """Three hospitals, one of them with a single class; federated beats alone."""
    study = load_study(EXAMPLES / "wisconsin.toml")
    generator = np.random.default_rng(0)

    def figures(level: float) -> list[SeedFigures]:
        made = []
        for _ in range(seeds):
            aucs = np.clip(level + generator.normal(0, 0.02, 4), 0, 1)
            made.append(
                SeedFigures(
                    auc=float(aucs[0]),
                    accuracy=float(aucs[1]),
                    hospitals={
                        "large": (float(aucs[2]), 0.9),
                        NASTY: (float(aucs[3]), 0.8),
                        "tiny": (float("nan"), 1.0),
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
    noised = Quality(mean_interval([0.85] * seeds), mean_interval([0.8] * seeds))
    return Comparison(
        study=study,
        folder=folder,
        seeds=tuple(range(seeds)),
        hospitals={
            name: HospitalFacts(
                declared_patients=(size, size),
                test_patients=(size // 3,) * 2,
                rarest_class=(0 if name == "tiny" else 3,) * 2,
            )
            for name, size in (("large", 200), (NASTY, 60), ("tiny", 10))
        },
        arms={
            name: Arm(
                title=name.replace("-", " ").capitalize(),
                epsilon=None if "no-privacy" in name else 3.0,
                student=over_seeds(one),
                teacher=over_seeds(one),
                released=noised if name == "federated" else None,
            )
            for name, one in drawn.items()
        },
        differences=tuple(
            paired("federated", name, drawn) for name in levels if name != "federated"
        ),
        sweep=tuple(
            a_point({"privacy.epsilon": epsilon}, over_seeds(figures(0.8 + epsilon / 50)))
            for epsilon in (0.5, 3.0)
        ),
        curves={
            "finetune": tuple(
                CurvePoint(number, mean_interval([0.6 + number / 20] * seeds))
                for number in (1, 2, 3)
            )
        },
    )
