"""The running service's process: written and locked by it, read by those who would stop it."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import RunError

_POLL_S = 0.1


@contextmanager
def pid_file(path: Path) -> Iterator[None]:
    """Hold ``path`` with this process's number. Raises RunError when another process does.

    The lock, not the number, says who runs: a number left by a crash may be anybody's.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{path}: expected nothing to run here, found process {_number(descriptor)}; "
                f"stop it first"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def stop_process(path: Path, *, timeout_s: float) -> int:
    """Send SIGTERM to the process that holds ``path`` and wait for its end; its number.

    Raises RunError when none does, or when it does not end in time.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise RunError(f"{path}: expected a running service, found none") from None
    try:
        pid = _holder(descriptor)
        if pid is None:
            raise RunError(f"{path}: expected a running service, found none")
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while _holder(descriptor) is not None:
            if time.monotonic() > deadline:
                raise RunError(
                    f"process {pid}: expected it to end within {timeout_s:.0f} s; see its log"
                )
            time.sleep(_POLL_S)
        return pid
    except PermissionError:
        raise RunError(f"{path}: the service is another user's; stop it as that user") from None
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> int | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _number(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return None


def _number(descriptor: int) -> int | None:
    text = os.pread(descriptor, 20, 0).strip()
    return int(text) if text.isdigit() else None
