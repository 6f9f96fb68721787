"""Services start in order, come back after death, stop in reverse, die with their supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import RunError
from common.supervise import Event, Service, Supervisor

SLEEPER = "import time; time.sleep(600)"


def service(name: str, folder: Path, code: str = SLEEPER, **options: object) -> Service:
    return Service(
        name=name,
        argv=(sys.executable, "-c", code),
        log=folder / f"{name}.log",
        **options,  # type: ignore[arg-type]
    )


def eventually(happened: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_they_start_in_order_each_once_the_last_is_ready(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    slow = f"import time, pathlib; time.sleep(.3); pathlib.Path({str(flag)!r}).touch(); {SLEEPER}"
    events: list[Event] = []
    supervisor = Supervisor(
        [service("first", tmp_path, slow, ready=flag.exists), service("second", tmp_path)],
        events.append,
    )
    supervisor.start()
    try:
        assert [(one.service, one.kind) for one in events] == [
            ("first", "started"),
            ("first", "ready"),
            ("second", "started"),
            ("second", "ready"),
        ]
    finally:
        supervisor.stop()
    stopped = [one.service for one in events if one.kind == "stopped"]
    assert stopped == ["second", "first"]
    assert all(one["pid"] is None for one in supervisor.status().values())


def test_a_dead_service_comes_back_after_a_growing_wait(tmp_path: Path) -> None:
    deaths: list[float] = []

    def note(event: Event) -> None:
        if event.kind == "died":
            deaths.append(time.monotonic())

    supervisor = Supervisor([service("brief", tmp_path, "pass", ready=lambda: True)], note)
    supervisor.start()
    try:

        def three_deaths() -> bool:
            supervisor.poll()
            return len(deaths) >= 3

        assert eventually(three_deaths)
        assert supervisor.status()["brief"]["restarts"] == 2
        # 0.5 s, then 1 s, and the process's own short life.
        assert deaths[1] - deaths[0] >= 0.5
        assert deaths[2] - deaths[1] >= 1.0
    finally:
        supervisor.stop()


def test_a_killed_service_is_restarted(tmp_path: Path) -> None:
    supervisor = Supervisor([service("one", tmp_path)])
    supervisor.start()
    try:
        first = supervisor.status()["one"]["pid"]
        assert isinstance(first, int)
        os.kill(first, signal.SIGKILL)

        def replaced() -> bool:
            supervisor.poll()
            return supervisor.status()["one"]["pid"] not in (None, first)

        assert eventually(replaced)
    finally:
        supervisor.stop()


def test_one_that_cannot_start_is_named_with_its_log(tmp_path: Path) -> None:
    running = service("running", tmp_path)
    broken = service("broken", tmp_path, "raise SystemExit(7)", ready=lambda: False)
    supervisor = Supervisor([running, broken])
    with pytest.raises(RunError, match=r"broken: expected it to start.*code 7.*broken\.log"):
        supervisor.start()
    assert all(one["pid"] is None for one in supervisor.status().values())


def test_one_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    stubborn = (
        "import signal, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(flag)!r}).touch(); {SLEEPER}"
    )
    events: list[Event] = []
    supervisor = Supervisor(
        [service("stubborn", tmp_path, stubborn, ready=flag.exists, stop_s=0.2)], events.append
    )
    supervisor.start()
    supervisor.stop()
    assert events[-1].kind == "stopped"
    assert events[-1].code == -signal.SIGKILL


def test_its_output_is_private(tmp_path: Path) -> None:
    log = tmp_path / "talker.log"
    supervisor = Supervisor([service("talker", tmp_path, f"print('here', flush=True); {SLEEPER}")])
    supervisor.start()
    try:
        assert eventually(lambda: log.read_text() == "here\n")
        assert log.stat().st_mode & 0o077 == 0
    finally:
        supervisor.stop()


def test_a_log_that_grows_is_moved_aside_under_its_writer(tmp_path: Path) -> None:
    log, go = tmp_path / "talker.log", tmp_path / "go"
    code = (
        "import pathlib, time; print('x' * (17 * 2**20), flush=True)\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(.02)\n"
        f"print('and more', flush=True); {SLEEPER}"
    )
    supervisor = Supervisor([service("talker", tmp_path, code)])
    supervisor.start()
    try:
        aside = tmp_path / "talker.log.1"

        def moved() -> bool:
            supervisor.poll()
            return aside.exists() and log.stat().st_size == 0

        assert eventually(moved)
        go.touch()
        assert eventually(lambda: log.read_text() == "and more\n")
        assert aside.stat().st_mode & 0o077 == 0
    finally:
        supervisor.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_they_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()));"
    program = (
        "import sys, time; from pathlib import Path;"
        "from common.supervise import Service, Supervisor;"
        f"s = Service(name='a', argv=(sys.executable, '-c', {child + SLEEPER!r}),"
        f" log=Path({str(tmp_path / 'a.log')!r}), ready=Path({str(pid_file)!r}).exists);"
        "Supervisor([s]).start(); print('up', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        pid = int(pid_file.read_text())
        assert alive(pid)
        parent.kill()
        parent.wait()
    assert eventually(lambda: not alive(pid))


PARENT = """
import os, subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""


def test_what_a_killed_service_leaves_behind_is_ended(tmp_path: Path) -> None:
    note = tmp_path / "child"
    one = Service(
        name="parent",
        argv=(sys.executable, "-c", PARENT, str(note)),
        log=tmp_path / "log",
        ready=lambda: note.exists() and note.read_text() != "",
    )
    supervisor = Supervisor([one])
    supervisor.start()
    try:
        child = int(note.read_text())
        parent = supervisor.status()["parent"]["pid"]
        assert isinstance(parent, int)
        os.kill(parent, signal.SIGKILL)

        def is_ended() -> bool:
            supervisor.poll()
            return not alive(child)

        assert eventually(is_ended)
    finally:
        supervisor.stop()


def test_a_service_with_children_is_told_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    told, ready = tmp_path / "told", tmp_path / "ready"
    polite = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(told)!r}).touch(), "
        "sys.exit()))\n"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    )
    program = (
        "import signal, sys, time\nfrom pathlib import Path\n"
        "from common.supervise import Service, Supervisor\n"
        f"one = Service(name='x', argv=(sys.executable, '-c', {polite!r}), "
        f"log=Path({str(tmp_path / 'log')!r}), ready=Path({str(ready)!r}).exists, "
        "death_signal=signal.SIGTERM)\n"
        "Supervisor([one]).start()\nprint('up', flush=True)\ntime.sleep(600)"
    )
    root = Path(__file__).resolve().parents[2]
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "up\n"
    finally:
        supervisor.kill()
        supervisor.communicate()
    assert eventually(told.exists)
