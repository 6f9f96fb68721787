"""What many hospitals cost the coordinator: real SuperLink and task runner, light hospitals.

Ten nodes, then two hundred, take part in one study whose updates have 10⁶ parameters, over TLS on
loopback. Memory is the coordinator's: the SuperLink and the process that conducts the study, each
page counted once (PSS), at its peak.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.compute import ComputeSpec
from common.environ import QUIET
from common.errors import RunError
from common.features import FeatureMap, range_scaling
from common.flower_tasks import Control, Endpoint
from common.loopback import make_loopback_certificate
from common.models import build_teacher
from common.study import Study, parse_study
from common.supervise import Supervisor
from common.tensors import get_vector
from server.coordinator import services as coordinator_services
from server.runner import STUDY_SETTING, prepare
from server.settings import CoordinatorFolder, CoordinatorSettings
from server.store import RunFolder
from simulations.bench.load_driver import public_pem
from simulations.bench.processes import family

NODES, ROUNDS = (10, 200), 20
_HIDDEN = (1000, 980)
_SAMPLE_S = 0.25
_LONGEST_S = 3600.0


def load(data_folder: Path, nodes: tuple[int, ...] = NODES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Rounds, failures, memory and seconds a round; ``data_folder`` is not used."""
    del data_folder
    study = _study(rounds)
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    size = get_vector(build_teacher(study, features)).numel()
    found = {count: _one(study, count, size) for count in nodes}
    few, many = min(nodes), max(nodes)
    figures: dict[str, Any] = {
        "nodes": many,
        "rounds": rounds,
        "parameters": size,
        "failed_rounds": sum(one["failed_rounds"] for one in found.values()),
        "rss_ratio_200_to_10": found[many]["peak_mib"] / found[few]["peak_mib"],
        "round_s": found[many]["round_s"],
    }
    for count, one in found.items():
        figures[f"rss_mib_{count}"] = one["peak_mib"]
        figures[f"rss_mib_{count}_by_process"] = one["by_process"]
        figures[f"round_s_{count}"] = one["round_s"]
    figures["model_mib"] = size * 4 / 2**20
    return figures


def _one(study: Study, nodes: int, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="consilium-load-") as name:
        folder = Path(name)
        with _superlink(folder) as (endpoint, services):
            plan = _enrol(folder, endpoint, study, nodes, size)
            with _hospitals(folder, plan), _Memory(services) as memory:
                run = folder / "runs" / "load"
                with closing(Control(endpoint)) as control:
                    number = control.start_run({STUDY_SETTING: "load"})
                    deadline = time.monotonic() + _LONGEST_S
                    while control.run_state(number) == "running":
                        if time.monotonic() > deadline:
                            raise RunError(f"the run of {nodes} nodes did not end in time")
                        time.sleep(0.5)
        lines = [one for one in RunFolder(run).metrics() if one["stage"] == "finetune"]
        times = [path.stat().st_mtime for path in sorted((run / "rounds").glob("finetune-*"))]
        whole = sum(one["hospitals"] == nodes for one in lines)
        gaps = [late - early for early, late in pairwise(times)]
        return {
            "failed_rounds": study.finetune.rounds - whole,
            "round_s": statistics.median(gaps) if gaps else None,
            "peak_mib": memory.peak_mib,
            "by_process": memory.by_process,
        }


def _study(rounds: int) -> Study:
    sgd = {"kind": "sgd", "learning_rate": 0.1}
    return parse_study(
        {
            "name": "load",
            "task": "diagnosis",
            "dictionary": {
                "label": {"name": "ill", "classes": [[0], [1]]},
                "columns": [
                    {"name": f"c{one}", "kind": "numeric", "range": [-4.0, 4.0]} for one in range(8)
                ],
            },
            "public": {"kind": "dictionary", "records": 16},
            "teacher": {"kind": "mlp", "hidden": list(_HIDDEN)},
            "student": {"kind": "mlp", "hidden": [8]},
            "pretrain": {"steps": 0, "optimiser": sgd},
            "finetune": {"rounds": rounds, "trainable": "all", "optimiser": sgd},
            "distill": {"on": "public", "steps": 1, "optimiser": sgd},
            "privacy": {"trust": "local", "epsilon": 3.0, "delta": 1e-6, "clip_norm": 1.0},
        },
        origin="load",
    )


@contextmanager
def _superlink(folder: Path) -> Iterator[tuple[Endpoint, Supervisor]]:
    """The coordinator's SuperLink and task runner, as `consilium coordinator start` has them."""
    at = CoordinatorFolder(folder)
    at.run.mkdir(mode=0o700)
    made = make_loopback_certificate(at.run)
    (at.run / "superexec.secret").write_bytes(secrets.token_bytes(32))
    settings = CoordinatorSettings(host=("localhost",), superlink_port=_free_port())
    address = f"127.0.0.1:{settings.superlink_port}"
    parts = {one.name: one for one in coordinator_services(at, settings, made, os.environ)}
    services = Supervisor([parts["superlink"], parts["runner"]])
    services.start()
    try:
        yield Endpoint(address, made.ca.read_bytes()), services
    finally:
        services.stop()


def _enrol(folder: Path, endpoint: Endpoint, study: Study, nodes: int, size: int) -> Path:
    """Register every node, prepare the study's folder; the driver's plan."""
    keys = folder / "keys"
    keys.mkdir(mode=0o700)
    names, paths = {}, {}
    with closing(Control(endpoint)) as control:
        for number in range(nodes):
            name = f"hospital-{number:03d}"
            key = ec.generate_private_key(ec.SECP384R1())
            paths[name] = keys / f"{name}.pem"
            paths[name].write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
            names[control.register_node(public_pem(key), name)] = name
    prepare(
        folder / "runs" / "load", study, nodes=names, public_folder=folder, compute=ComputeSpec()
    )
    plan = folder / "plan.json"
    plan.write_text(
        json.dumps(
            {
                "address": endpoint.address,
                "root_certificates": str(folder / "run" / "loopback-ca.pem"),
                "hospitals": {name: str(path) for name, path in paths.items()},
                "size": size,
            }
        )
    )
    return plan


@contextmanager
def _hospitals(folder: Path, plan: Path) -> Iterator[None]:
    with (folder / "driver.log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "simulations.bench.load_driver", str(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | QUIET,
        )
        assert driver.stdin is not None and driver.stdout is not None  # noqa: S101
        try:
            if driver.stdout.readline() != b"ready\n":
                raise RunError(f"the load driver did not start; see {folder / 'driver.log'}")
            yield
        finally:
            driver.kill()
            driver.wait()
            driver.stdin.close()
            driver.stdout.close()


class _Memory:
    """Samples the memory of the services and all they started."""

    def __init__(self, services: Supervisor) -> None:
        self._services = services
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_mib = 0.0
        self.by_process: dict[str, float] = {}

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            now = {
                name: sum(_pss_mib(pid) for pid in family(one["pid"]))
                for name, one in self._services.status().items()
                if one["pid"]
            }
            self.peak_mib = max(self.peak_mib, sum(now.values()))
            for name, value in now.items():
                self.by_process[name] = max(value, self.by_process.get(name, 0.0))


def _pss_mib(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    line = next((one for one in text.splitlines() if one.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) / 1024


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
