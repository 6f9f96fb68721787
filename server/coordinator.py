"""`consilium coordinator start`: the coordinator's processes, kept running.

::

    superlink   Flower's link: loopback, TLS, registered nodes only, tasks for who holds the secret
    api         hospital interface (Unix socket), admin interface (loopback), the driver of studies
    nginx       the public entrance: mutual TLS
    runner      conducts each run with the server app installed here

All state that matters is in the registry, the run folders and Flower's database; this process may
be killed at any moment, and the next start goes on from there.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from common.environ import QUIET_SERVICE
from common.errors import RunError
from common.instance import running_instance, single_instance
from common.loopback import LoopbackCertificate, make_loopback_certificate
from common.secretfiles import replace_file
from common.supervise import Event, Service, Supervisor
from server.nginx import nginx_argv
from server.settings import CoordinatorFolder, CoordinatorSettings

_POLL_S = 0.2
_SECRET_BYTES = 32
_logger = logging.getLogger(__name__)


def run_coordinator(path: Path, on_ready: Callable[[], None] = lambda: None) -> None:
    """Run the coordinator in ``path`` until SIGTERM or SIGINT.

    Raises RunError when it runs already, a port is taken, or a service does not start.
    """
    folder = CoordinatorFolder(path.resolve())
    settings = folder.load_settings()
    _check_machine(settings)
    with single_instance(folder.pid, "`consilium coordinator stop` ends it"):
        made = make_loopback_certificate(folder.run)
        replace_file(folder.run / "superexec.secret", secrets.token_bytes(_SECRET_BYTES))
        supervisor = Supervisor(services(folder, settings, made, os.environ), _log_event)
        stopping = False

        def stop(_number: int, _frame: FrameType | None) -> None:
            nonlocal stopping
            stopping = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        supervisor.start()
        try:
            on_ready()
            told: object = None
            while not stopping:
                supervisor.poll()
                if (status := supervisor.status()) != told:
                    replace_file(folder.state, json.dumps(status).encode())
                    told = status
                time.sleep(_POLL_S)
        finally:
            supervisor.stop()
            folder.state.unlink(missing_ok=True)


def services(
    folder: CoordinatorFolder,
    settings: CoordinatorSettings,
    made: LoopbackCertificate,
    environ: Mapping[str, str],
) -> list[Service]:
    """The coordinator's processes, in the order in which they need each other."""
    flower = folder.path / "flower"
    flower.mkdir(mode=0o700, exist_ok=True)
    # The keys are for the API alone; whatever else runs here does without.
    plain = {name: value for name, value in environ.items() if not name.startswith("CONSILIUM_")}
    quiet = plain | QUIET_SERVICE | {"FLWR_HOME": str(flower)}
    superlink = f"127.0.0.1:{settings.superlink_port}"
    return [
        Service(
            name="superlink",
            argv=(
                _program("flower-superlink"),
                *("--host", "127.0.0.1", "--port", str(settings.superlink_port)),
                *("--ssl-certfile", str(made.certificate), "--ssl-keyfile", str(made.key)),
                *("--ssl-ca-certfile", str(made.ca), "--enable-supernode-auth"),
                *("--database", str(flower / "superlink.db"), "--isolation", "process"),
                *("--superexec-auth-secret-file", str(folder.run / "superexec.secret")),
                "--disable-runtime-dependency-installation",
            ),
            log=folder.logs / "superlink.log",
            environ=quiet,
            ready=_listens("127.0.0.1", settings.superlink_port),
            stop_s=3,  # it waits for open connections; its database survives a kill
        ),
        Service(
            name="api",
            argv=(sys.executable, "-m", "server.api", str(folder.path)),
            log=folder.logs / "api.log",
            environ=dict(environ) | QUIET_SERVICE,
            ready=_listens("127.0.0.1", settings.admin_port),
        ),
        Service(
            name="nginx",
            argv=nginx_argv(folder),
            log=folder.logs / "nginx.log",
            environ=plain,
            ready=_listens(settings.listen, settings.port),
            death_signal=signal.SIGTERM,  # killed outright, it would leave its workers listening
        ),
        Service(
            name="runner",
            argv=(sys.executable, "-m", "server.runner", str(folder.path), superlink),
            log=folder.logs / "runner.log",
            environ=quiet,
            stop_s=30,
        ),
    ]


def running_pid(folder: CoordinatorFolder) -> int | None:
    """The process of this folder's coordinator; None when none runs."""
    return running_instance(folder.pid)


def stop_coordinator(folder: CoordinatorFolder, timeout_s: float = 60.0) -> None:
    """Ask the running coordinator to stop, and wait. Raises RunError when none runs or it stays."""
    pid = running_pid(folder)
    if pid is None:
        raise RunError(f"{folder.path}: no coordinator runs in this folder")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while running_pid(folder) is not None:
        if time.monotonic() > deadline:
            raise RunError(f"process {pid} did not stop within {timeout_s:.0f} s; see its logs")
        time.sleep(_POLL_S)


def _check_machine(settings: CoordinatorSettings) -> None:
    """What would fail later and less clearly."""
    if shutil.which("nginx") is None:
        raise RunError("nginx: expected it on PATH, found none; install it (Debian: nginx-light)")
    for name, host, port in (
        ("port", settings.listen, settings.port),
        ("admin_port", "127.0.0.1", settings.admin_port),
        ("superlink_port", "127.0.0.1", settings.superlink_port),
    ):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise RunError(
                    f"{name}: {host}:{port} cannot be used ({error.strerror}); end what uses it, "
                    f"or change {name} in coordinator.toml"
                ) from None


def _program(name: str) -> str:
    """Flower's program from the environment this code runs in, whatever PATH says."""
    return str(Path(sys.executable).with_name(name))


def _listens(host: str, port: int) -> Callable[[], bool]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (compared only)

    def ready() -> bool:
        with socket.socket(family) as probe:
            probe.settimeout(1)
            return probe.connect_ex((target, port)) == 0

    return ready


def _log_event(event: Event) -> None:
    level = logging.WARNING if event.kind == "died" else logging.INFO
    code = "" if event.code is None else f", code {event.code}"
    _logger.log(level, "%s %s (process %d%s)", event.service, event.kind, event.pid, code)
