"""The three programs of a hospital's daemon: tunnel, Flower's SuperNode, task runner.

::

    runner ──▶ SuperNode ──▶ tunnel ══ mutual TLS ══▶ coordinator
        (loopback, ephemeral certificates)

All secrets between them are made anew at each start, in ``FOLDER/run``. The node key reaches the
SuperNode as a file in memory.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from client.hospitalfile import load_hospital_file
from common.environ import QUIET_SERVICE
from common.errors import RunError
from common.loopback import make_loopback_certificate
from common.secretfiles import KEY_FILE_VARIABLE, KEY_VARIABLE, PASSPHRASE_VARIABLE, replace_file
from common.supervise import Service

TUNNEL, SUPERNODE, RUNNER = "tunnel", "supernode", "runner"

_SECRETS = (KEY_VARIABLE, KEY_FILE_VARIABLE, PASSPHRASE_VARIABLE)


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How the programs find each other. ``tunnel``: its listening socket, kept over restarts.

    ``node_key``: the descriptor of a memory file. ``runtime_port``: the SuperNode's own interface.
    """

    folder: Path
    tunnel: socket.socket
    node_key: int
    runtime_port: int
    drain_s: float


def prepare_run_folder(folder: Path) -> Path:
    """``FOLDER/run`` with this start's certificate and secret."""
    run = folder / "run"
    try:
        run.mkdir(mode=0o700, exist_ok=True)
        (run / "flower").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run}: cannot be made ({error.strerror})") from None
    make_loopback_certificate(run)
    replace_file(run / "superexec.secret", secrets.token_hex(32).encode())
    return run


def outer_services(wiring: Wiring, check_stop: Callable[[], None]) -> list[Service]:
    """The way to the coordinator. ``check_stop`` may raise, to end a start that is under way."""
    folder, run, logs = wiring.folder, wiring.folder / "run", wiring.folder / "logs"
    descriptor = wiring.tunnel.fileno()
    # Only the runner reads records, so only it may know the password of their database.
    of_data = load_hospital_file(folder).secret_variables()
    environ = _without(of_data, os.environ) | QUIET_SERVICE
    tunnel = Service(
        name=TUNNEL,
        argv=(
            *(sys.executable, "-m", "client.tunnel", str(folder)),
            *("--descriptor", str(descriptor)),
        ),
        environ=environ,
        log=logs / "tunnel.log",
        pass_fds=(descriptor,),
        stop_s=3.0,
    )
    port = wiring.runtime_port

    def ready() -> bool:
        check_stop()
        return _listens(port)

    supernode = Service(
        name=SUPERNODE,
        argv=(
            *(sys.executable, "-m", "client.supernode"),
            *("--superlink", f"127.0.0.1:{wiring.tunnel.getsockname()[1]}"),
            *("--root-certificates", str(run / "loopback-ca.pem")),
            *("--auth-supernode-private-key", f"/proc/self/fd/{wiring.node_key}"),
            *("--isolation", "process", "--host", "127.0.0.1", "--port", str(port)),
            *("--ssl-certfile", str(run / "loopback.pem")),
            *("--ssl-keyfile", str(run / "loopback.key")),
            *("--ssl-ca-certfile", str(run / "loopback-ca.pem")),
            *("--superexec-auth-secret-file", str(run / "superexec.secret")),
        ),
        # It carries messages, and has no business with the keys of the safe.
        environ=_without(_SECRETS, environ) | {"FLWR_HOME": str(run / "flower")},
        log=logs / "supernode.log",
        pass_fds=(wiring.node_key,),
        ready=ready,
        stop_s=5.0,
    )
    return [tunnel, supernode]


def runner_service(wiring: Wiring) -> Service:
    """The one that answers; it may take ``drain_s`` to finish the message in hand."""
    folder = wiring.folder
    return Service(
        name=RUNNER,
        argv=(
            *(sys.executable, "-m", "client.runner", str(folder)),
            f"127.0.0.1:{wiring.runtime_port}",
        ),
        environ=dict(os.environ) | QUIET_SERVICE | {"FLWR_HOME": str(folder / "run" / "flower")},
        log=folder / "logs" / "runner.log",
        stop_s=wiring.drain_s,
    )


def free_port() -> int:
    """A port of this machine's loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _without(names: Collection[str], environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}
