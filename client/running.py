"""The daemon of a folder, seen from outside: whether it runs, what it says, how to end it.

Commands that only ask start at once: nothing here loads what the daemon computes with.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from client.health import Vitals
from common.errors import RunError
from common.instance import running_instance

PAUSED = "paused"  # while a file of this name lies in a hospital's folder, it answers no round
_POLL_S = 0.1


def running_daemon(folder: Path) -> int | None:
    """The process id of the folder's daemon; None when none runs."""
    return running_instance(lock_of(folder))


def lock_of(folder: Path) -> Path:
    """The file that the folder's daemon holds locked."""
    return folder / "run" / "daemon.lock"


def stop_daemon(folder: Path, *, wait_s: float, at_once: bool = False) -> bool:
    """End the folder's daemon; whether there was one. Raises RunError when it does not end."""
    pid = running_daemon(folder)
    if pid is None:
        return False
    for _ in range(2 if at_once else 1):
        os.kill(pid, signal.SIGTERM)
        time.sleep(_POLL_S)
    deadline = time.monotonic() + wait_s
    while running_daemon(folder) == pid:
        if time.monotonic() > deadline:
            raise RunError(
                f"{folder}: the daemon (process {pid}) still finishes a message after "
                f"{wait_s:.0f} s; wait, or `consilium hospital stop --now`"
            )
        time.sleep(_POLL_S)
    return True


def daemon_state(folder: Path) -> Vitals | None:
    """What the running daemon last said of itself; None when none runs."""
    if running_daemon(folder) is None:
        return None
    try:
        facts = json.loads((folder / "run" / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Vitals()
    facts.pop("pid", None)
    return Vitals(**facts)
