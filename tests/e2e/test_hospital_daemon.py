"""The daemon's processes: one instance, restarts, draining, health, and logs without a cell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from client.link import join
from client.linkfolder import LinkFolder
from client.running import daemon_state, lock_of, running_daemon, stop_daemon
from client.safe import create_safe
from common.enrolment import Offered
from common.errors import RunError
from common.identity import Identity
from common.instance import single_instance
from common.secretfiles import WrappingKey
from common.study import Study
from tests.coordinators import FakeCoordinator, read_all
from tests.offers import offer_of

ROOT = Path(__file__).parents[2]

# Stands in for Flower's SuperNode and for the runner, which have tests of their own.
SUPERNODE = """
import signal, socket, sys, time
port, key = int(sys.argv[1]), sys.argv[2]
assert b"OPENSSH PRIVATE KEY" in open(key, "rb").read()
listening = socket.create_server(("127.0.0.1", port))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    listening.accept()[0].close()
"""
RUNNER = """
import pathlib, signal, sys, time
folder, work_s = pathlib.Path(sys.argv[1]), float(sys.argv[2])
def stop(*_):
    time.sleep(work_s)
    (folder / "drained").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / "runner-started").touch()
while True:
    time.sleep(0.05)
"""
DAEMON = """
import sys
from dataclasses import replace
from pathlib import Path
from client import daemon, services
from client.daemon import Daemon, DaemonOptions
from client.services import outer_services, runner_service

folder, work_s = Path(sys.argv[1]), sys.argv[2]

def outer(wiring, check_stop):
    tunnel, node = outer_services(wiring, check_stop)
    argv = (sys.executable, "-c", SUPERNODE, str(wiring.runtime_port),
            f"/proc/self/fd/{wiring.node_key}")
    return [tunnel, replace(node, argv=argv)]

def runner(wiring):
    return replace(runner_service(wiring), argv=(sys.executable, "-c", RUNNER, str(folder), work_s))

SUPERNODE, RUNNER = sys.argv[3], sys.argv[4]
daemon._FORWARD_S = 0.1
Daemon(folder, DaemonOptions(health_port=0, drain_s=20.0, visit_every_s=0.3, outer=outer,
                             runner=runner)).run()
"""


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator().serving() as world:
        yield world


@pytest.fixture
def folder(tmp_path: Path, coordinator: FakeCoordinator) -> Path:
    path = tmp_path / "north"
    create_safe(path, {})
    rows = [f"CANARY-{one},{one % 7 - 3},{one % 5 - 2},{one % 2}" for one in range(80)]
    (path / "data.csv").write_text("\n".join(["who,a,b,ill", *rows]) + "\n")
    settings = {
        "name": "north",
        "declared_patients": 80,
        "safe": ".",
        "source": {"kind": "csv", "path": "data.csv"},
    }
    (path / "hospital.toml").write_text(tomli_w.dumps(settings))
    key = WrappingKey.of_folder(path, {})
    join(path, coordinator.code(), Identity.load(path / "identity", key=key), key)
    return path


def wait_for(found: Callable[[], Any], seconds: float = 40.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("did not happen in time")


@contextmanager
def daemon(folder: Path, *, work_s: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    environ = {name: value for name, value in os.environ.items() if "CONSILIUM" not in name}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", DAEMON, str(folder), str(work_s), SUPERNODE, RUNNER],
        cwd=ROOT,
        env=environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()  # its children die with it
        process.communicate()


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "logs" / "daemon.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def serving(folder: Path) -> Any:
    found = daemon_state(folder)
    return found if found is not None and found.is_well else None


def pid_of(folder: Path, service: str) -> int:
    found = daemon_state(folder)
    return int(found.services[service]["pid"] or 0) if found else 0


def test_it_serves_reports_restarts_and_drains(
    folder: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    keys = {"north": Identity.load(folder / "identity", key=WrappingKey.of_folder(folder, {}))}
    texts = {name: one.public.text() for name, one in keys.items()}
    coordinator.offers = [
        Offered(offer=offer_of(small, texts, coordinator.identity), state="offered")
    ]
    with daemon(folder, work_s=1.5) as process:
        wait_for(lambda: serving(folder))
        assert process.poll() is None
        port = next(one["health_port"] for one in events(folder) if one["event"] == "started")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as page:
            health = json.load(page)
        assert health["state"] == "serving"
        assert set(health["services"]) == {"tunnel", "supernode", "runner"}
        with pytest.raises(RunError, match="running already"), single_instance(lock_of(folder), ""):
            pass
        wait_for(lambda: (folder / "studies" / small.digest() / "offer.json").exists())
        # A program that dies is started again.
        first = pid_of(folder, "supernode")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: serving(folder) and pid_of(folder, "supernode") not in (0, first))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            metrics = page.read().decode()
        for line in (
            'consilium_hospital_service_restarts_total{service="supernode"} 1.0',
            "consilium_hospital_connected 1.0",
            "consilium_hospital_test_noise 0.0",
            "consilium_hospital_rounds_answered_total 0.0",
        ):
            assert line in metrics, metrics
        assert "patient" not in metrics.lower().replace("by the patient who", "")
        children = [pid_of(folder, one) for one in ("tunnel", "supernode", "runner")]
        assert stop_daemon(folder, wait_s=30)
        assert process.wait(10) == 0
        assert (folder / "drained").exists()
    assert running_daemon(folder) is None
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert not stop_daemon(folder, wait_s=1)
    logged = b"".join(path.read_bytes() for path in (folder / "logs").iterdir())
    assert b"CANARY" not in logged
    assert b"PRIVATE KEY" not in read_all(folder / "run").replace(
        (folder / "run" / "loopback.key").read_bytes(), b""
    )
    names = [one["event"] for one in events(folder)]
    assert {"started", "study_offered", "service_died", "stopped"} <= set(names)


def test_a_second_signal_does_not_wait(folder: Path) -> None:
    with daemon(folder, work_s=600.0) as process:
        wait_for(lambda: serving(folder))
        stop_daemon(folder, wait_s=15, at_once=True)
        output, _ = process.communicate(timeout=15)
    assert output == ""
    assert process.returncode == 0
    assert not (folder / "drained").exists()
    assert "ended_at_once" in [one["event"] for one in events(folder)]


def test_while_the_clock_is_off_nothing_runs(folder: Path, coordinator: FakeCoordinator) -> None:
    from datetime import UTC, datetime, timedelta

    right = coordinator.clock
    coordinator.clock = lambda: datetime.now(UTC) - timedelta(seconds=400)
    log = (folder / "audit.log").read_bytes()
    with daemon(folder) as process:
        found = wait_for(lambda: daemon_state(folder))
        found = wait_for(
            lambda: (one := daemon_state(folder)) and one.state.startswith("clock off") and one
        )
        assert found.services == {}
        port = next(one["health_port"] for one in events(folder) if one["event"] == "started")
        with pytest.raises(urllib.error.HTTPError) as page:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        assert page.value.code == 503
        page.value.close()
        assert not (folder / "runner-started").exists()
        assert (folder / "audit.log").read_bytes() == log
        coordinator.clock = right
        wait_for(lambda: serving(folder))
        coordinator.clock = lambda: datetime.now(UTC) - timedelta(seconds=400)
        wait_for(lambda: (one := daemon_state(folder)) and one.services == {})
        assert (folder / "drained").exists()
        assert process.poll() is None
        stop_daemon(folder, wait_s=15)


def test_a_killed_daemon_leaves_nothing_running_and_starts_again(folder: Path) -> None:
    with daemon(folder) as process:
        wait_for(lambda: serving(folder))
        children = [pid_of(folder, one) for one in ("tunnel", "supernode", "runner")]
        process.kill()
        process.wait()

        def gone(child: int) -> bool:
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                return True
            return b"\nState:\tZ" in Path(f"/proc/{child}/status").read_bytes()

        wait_for(lambda: all(gone(child) for child in children))
    with daemon(folder):
        wait_for(lambda: serving(folder))
        stop_daemon(folder, wait_s=15)


def test_a_rotated_key_restarts_the_node(folder: Path) -> None:
    from client.link import connect, renew

    key = WrappingKey.of_folder(folder, {})
    identity = Identity.load(folder / "identity", key=key)
    with daemon(folder):
        wait_for(lambda: serving(folder))
        first = pid_of(folder, "supernode")
        with connect(folder, key) as opened:
            renew(folder, opened, identity, key, with_new_key=True)
        wait_for(lambda: serving(folder) and pid_of(folder, "supernode") not in (0, first))
        stop_daemon(folder, wait_s=15)


def test_essentials_are_checked_before_anything_starts(folder: Path) -> None:
    settings = tomllib.loads((folder / "hospital.toml").read_text())
    (folder / "hospital.toml").write_text(tomli_w.dumps(settings | {"name": "nord"}))
    with daemon(folder) as process:
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0
    assert "expected name = 'north'" in output
    assert LinkFolder(folder).is_joined
