"""One service a folder: a locked file that holds its process id.

The lock is the kernel's and ends with the process, however that ends: nothing stale is left behind.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import RunError


@contextmanager
def single_instance(lock: Path, advice: str) -> Iterator[None]:
    """Hold ``lock``. Raises RunError, with what to do about it, when another process does."""
    lock.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = f"it is running already (process {_pid(descriptor)})"
            raise RunError(f"{lock.parent.parent}: {found}; {advice}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def running_instance(lock: Path) -> int | None:
    """The process that holds ``lock``; None when none does."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(descriptor)
    finally:
        os.close(descriptor)
    return None


def _pid(descriptor: int) -> int:
    text = os.pread(descriptor, 20, 0).decode("ascii", "replace")
    return int(text) if text.isdigit() else 0
