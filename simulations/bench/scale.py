"""What one hospital more costs each simulation engine: processor time a round, and memory.

Made-up hospitals of 40 patients, 30 of whom train; 20 numbers each; a teacher of 5,600 parameters,
trained whole. Every measurement is a process of its own, of which the first round (data are
encoded, noise is calibrated) is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common.study import Study, parse_study
from server.conduct import Progress
from simulations.bench.processes import family
from simulations.simulate import Engine, parse_engine, simulate

_PATIENTS, _COLUMNS, _ROUNDS = 40, 20, 4
_SIZES: dict[Engine, tuple[int, int]] = {
    "stacked": (100, 1000),
    "one-by-one": (100, 1000),
    "ray": (20, 200),
}
_PROGRAM = "from simulations.bench.scale import main; main()"
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def scale(data_folder: Path) -> dict[str, Any]:  # noqa: ARG001 (its data are made up)
    """Processor seconds and memory by engine, and what follows for one hospital."""
    figures: dict[str, Any] = {}
    for engine, sizes in _SIZES.items():
        few, many = (_measured(engine, size) for size in sizes)
        more = sizes[1] - sizes[0]
        figures[engine] = {
            "hospitals": sizes,
            "cpu_s_a_round": [few["cpu_s_a_round"], many["cpu_s_a_round"]],
            "wall_s_a_round": [few["wall_s_a_round"], many["wall_s_a_round"]],
            "memory_mib": [few["memory_mib"], many["memory_mib"]],
            "start_s": [few["start_s"], many["start_s"]],
            "cpu_ms_per_hospital_and_round": 1e3
            * (many["cpu_s_a_round"] - few["cpu_s_a_round"])
            / more,
            "memory_kib_per_hospital": 1024 * (many["memory_mib"] - few["memory_mib"]) / more,
        }
    return figures


def measure(engine: Engine, hospitals: int) -> dict[str, float]:
    """One run of ``hospitals`` in this process and those it starts."""
    marks: list[tuple[float, float]] = []
    peak = 0.0

    def mark(progress: Progress) -> None:
        nonlocal peak
        if progress.stage == "finetune":
            cpu_s, memory_bytes = _tree()
            peak = max(peak, memory_bytes)
            marks.append((time.monotonic(), cpu_s))

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as temporary:
        folder = Path(temporary)
        _write_patients(folder / "patients.csv", hospitals)
        study = scale_study(hospitals)
        simulate(study, folder / "run", folder, mark, noise_seed=0, engine=engine)
    (first, first_cpu), (last, last_cpu) = marks[0], marks[-1]
    return {
        "start_s": first - began,
        "wall_s_a_round": (last - first) / (len(marks) - 1),
        "cpu_s_a_round": (last_cpu - first_cpu) / (len(marks) - 1),
        "memory_mib": peak / 2**20,
    }


def scale_study(hospitals: int) -> Study:
    """The study that is measured."""
    sgd = {"kind": "sgd", "learning_rate": 0.5}
    names = [f"c{one}" for one in range(_COLUMNS)]
    return parse_study(
        {
            "name": "scale",
            "task": "diagnosis",
            "dictionary": {
                "label": {"name": "ill", "classes": [[0], [1]]},
                "columns": [
                    {"name": one, "kind": "numeric", "range": [-4.0, 4.0], "optional": False}
                    for one in names
                ],
            },
            "public": {"kind": "dictionary", "records": 64},
            "teacher": {"kind": "mlp", "hidden": [64, 64]},
            "student": {"kind": "mlp", "hidden": [8]},
            "pretrain": {"steps": 0, "optimiser": sgd},
            "finetune": {"rounds": _ROUNDS, "trainable": "all", "optimiser": sgd},
            "distill": {"on": "public", "steps": 1, "optimiser": sgd},
            "privacy": {"trust": "local", "epsilon": 3.0, "delta": 1e-5},
            "simulation": {
                "hospitals": hospitals,
                "source": {"kind": "csv", "path": "patients.csv"},
            },
        },
        origin="bench scale",
    )


def _write_patients(path: Path, hospitals: int) -> None:
    generator = np.random.default_rng(0)
    rows = hospitals * _PATIENTS
    labels = generator.integers(0, 2, rows)
    values = generator.normal(0, 1, (rows, _COLUMNS)) + 0.3 * labels[:, None]
    header = ",".join([*(f"c{one}" for one in range(_COLUMNS)), "ill"])
    table = np.column_stack([values.clip(-4, 4), labels])
    formats = ["%.6f"] * _COLUMNS + ["%d"]
    np.savetxt(path, table, delimiter=",", header=header, comments="", fmt=formats)


def _measured(engine: Engine, hospitals: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, engine, str(hospitals)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _tree() -> tuple[float, float]:
    """Processor seconds and resident bytes of this process and all it started (Linux)."""
    cpu_s = memory_bytes = 0.0
    for one in family(os.getpid()):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        cpu_s += sum(int(ticks) for ticks in fields[11:15]) / _TICKS
        memory_bytes += int(fields[21]) * _PAGE_BYTES
    return cpu_s, memory_bytes


def main() -> None:
    """Measure the engine and the number of hospitals on the command line; print JSON."""
    print(json.dumps(measure(parse_engine(sys.argv[1]), int(sys.argv[2]))))
