"""Benchmarks: every figure the project states is printed by one of these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulations.bench.accuracy import ROWS, Row, accuracy
from simulations.bench.distributed import distributed
from simulations.bench.exposure import exposure
from simulations.bench.gpu import gpu
from simulations.bench.load import load
from simulations.bench.pretraining import pretraining
from simulations.bench.privacy import privacy
from simulations.bench.scale import scale
from simulations.bench.secagg import secagg
from simulations.bench.simulation import simulation

BENCHES: dict[str, Callable[[Path], dict[str, Any] | None]] = {
    "distributed": distributed,
    "exposure": exposure,
    "gpu": gpu,
    "load": load,
    "pretraining": pretraining,
    "privacy": privacy,
    "scale": scale,
    "secagg": secagg,
    "simulation": simulation,
}

# Whose figures are no times: several processes may share their work.
SHARED: dict[str, Row] = {
    "accuracy": accuracy,
    # A row of `accuracy` for itself: `consilium bench accuracy.heart`.
    **{f"accuracy.{name}": row for name, row in ROWS.items()},
}
