"""`flwr run .` on Flower's own engine gives the result of the run in process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from client.hospital import open_hospital
from common.study import Study, load_study
from common.tensors import load_tensors
from server.app import read_corpus
from server.store import RunFolder
from simulations.hospitals import build_world, write_world
from simulations.simulate import run_in_process

pytest.importorskip("ray", reason="Flower's engine needs the extra: pip install 'consilium[ray]'")

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SEED = 3
HOSPITALS = 3


def _environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def superlink(home: Path, port: int) -> Iterator[None]:
    """Flower's link in simulation mode, on loopback only; it and all it started end with it."""
    with (home / "superlink.log").open("w") as log:
        process = subprocess.Popen(
            [
                BIN / "flower-superlink",
                *("--insecure", "--simulation", "--isolation", "subprocess"),
                *("--host", "127.0.0.1", "--port", str(port), "--database", home / "state.db"),
            ],
            env=_environment(home),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with suppress(ProcessLookupError):  # its own group: what it started and left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(15)


def flwr_run(home: Path, folder: Path, run: Path) -> str:
    """Submit the repository as it stands and follow its log to the end."""
    port = _free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n'
        f'[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with superlink(home, port):
        done = subprocess.run(
            [
                BIN / "flwr",
                *("run", ROOT, "test", "--stream"),
                *("--federation-config", f"num-supernodes={HOSPITALS}"),
                *("--run-config", f'folder="{folder}" run-folder="{run}"'),
            ],
            env=_environment(home),
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        return done.stdout + done.stderr + (home / "superlink.log").read_text()


def in_process(folder: Path, run: Path) -> None:
    study = load_study(folder / "study.toml")
    homes = sorted((folder / "hospitals").iterdir())
    with ExitStack() as stack:
        run_in_process(
            study,
            RunFolder.create(run, study),
            [stack.enter_context(open_hospital(home, study.digest())) for home in homes],
            read_corpus(study, folder / "public"),
            lambda _: None,
            debug=True,
        )


@pytest.mark.timeout(180)
def test_flower_engine_and_in_process_runs_are_equal(wisconsin: Study, tmp_path: Path) -> None:
    study = wisconsin.revised(
        finetune__rounds=2,
        finetune__sampling_rate=0.5,
        pretrain__steps=10,
        distill__on="patients",
        distill__rounds=1,
        simulation__hospitals=HOSPITALS,
        federation__minimum_hospitals=HOSPITALS,
    )
    folder, theirs, ours = tmp_path / "split", tmp_path / "theirs", tmp_path / "ours"
    write_world(build_world(study, Path()), folder, noise_seed=SEED)
    home = tmp_path / "flwr"
    home.mkdir()
    log = flwr_run(home, folder, theirs)
    assert (theirs / "result.json").exists(), log[-5000:]
    in_process(folder, ours)
    for name in ("teacher.safetensors", "student.safetensors"):
        engine, twin = load_tensors(theirs / name), load_tensors(ours / name)
        assert engine.keys() == twin.keys()
        for key, tensor in engine.items():
            torch.testing.assert_close(tensor, twin[key], rtol=0, atol=1e-6)
    assert RunFolder(theirs).metrics() == RunFolder(ours).metrics()
    results = [json.loads((one / "result.json").read_text()) for one in (theirs, ours)]
    assert results[0]["hospitals"] == results[1]["hospitals"]
    assert len(results[0]["hospitals"]) == HOSPITALS
    statement = json.loads((theirs / "privacy.json").read_text())
    assert not statement["guaranteed"]  # a seed was used, and the statement says so
