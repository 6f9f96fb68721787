"""Processes that must run: started in order, restarted when they die, stopped in reverse.

Children die with their supervisor, also when it is killed (Linux: ``PR_SET_PDEATHSIG``), so that a
restarted supervisor never meets its own leftovers.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import RunError

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_STEADY_S = 120.0  # a service that lived so long starts again without waiting
_POLL_S = 0.05
_LARGEST_LOG = 16 * 2**20
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, kw_only=True)
class Service:
    """One process. ``ready`` is polled after each start, ``ready_s`` at most.

    ``log`` takes its output; what is in it is moved aside (``.1``) whenever it grows large.
    ``pass_fds``: file descriptors it inherits. ``stop_s``: how long it may take to end.
    ``death_signal``: what the kernel sends it when its supervisor is killed; a program with
    children of its own, which no signal reaches, needs one it can act on.
    """

    name: str
    argv: tuple[str, ...]
    log: Path
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    ready: Callable[[], bool] = lambda: True
    ready_s: float = 60.0
    stop_s: float = 10.0
    pass_fds: tuple[int, ...] = ()
    death_signal: signal.Signals = signal.SIGKILL


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a service: ``started``, ``ready``, ``died`` or ``stopped``."""

    service: str
    kind: str
    pid: int
    code: int | None = None


@dataclass
class _Running:
    service: Service
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    is_ready: bool = False
    restarts: int = 0
    failures: int = 0
    next_start: float = 0.0


class Supervisor:
    """Keeps ``services`` running; call ``poll`` several times a second."""

    def __init__(
        self, services: Sequence[Service], on_event: Callable[[Event], None] = lambda _: None
    ) -> None:
        """``services`` in the order in which they need each other."""
        self._running = [_Running(one) for one in services]
        self._on_event = on_event

    def start(self) -> None:
        """Start all, each once the ones before are ready. Raises RunError, with all stopped."""
        for one in self._running:
            self._launch(one)
            deadline = time.monotonic() + one.service.ready_s
            while not self._is_ready(one):
                assert one.process is not None  # noqa: S101
                if one.process.poll() is not None or time.monotonic() > deadline:
                    code = one.process.poll()
                    self.stop()
                    how = "did not become ready" if code is None else f"ended with code {code}"
                    raise RunError(
                        f"{one.service.name}: expected it to start, but it {how}; "
                        f"see {one.service.log}"
                    )
                time.sleep(_POLL_S)

    def poll(self) -> None:
        """Restart what has died, after a wait that doubles with each early death."""
        now = time.monotonic()
        for one in self._running:
            _keep_small(one.service.log)
            if one.process is None:
                if now >= one.next_start:
                    one.restarts += 1
                    self._launch(one)
            elif (code := one.process.poll()) is not None:
                self._emit(one, "died", code)
                _end_group(one.process.pid)
                one.process = None
                one.failures = 0 if now - one.started > _STEADY_S else one.failures + 1
                wait = min(_FIRST_WAIT_S * 2 ** max(0, one.failures - 1), _LONGEST_WAIT_S)
                one.next_start = now + wait
            elif not one.is_ready:
                self._is_ready(one)

    def stop(self) -> None:
        """End all, the last one first: SIGTERM, then SIGKILL after its ``stop_s``."""
        for one in reversed(self._running):
            if one.process is None:
                continue
            if one.process.poll() is None:
                one.process.terminate()
                try:
                    one.process.wait(one.service.stop_s)
                except subprocess.TimeoutExpired:
                    one.process.kill()
                    one.process.wait()
            _end_group(one.process.pid)
            self._emit(one, "stopped", one.process.returncode)
            one.process, one.is_ready, one.next_start = None, False, float("inf")

    def status(self) -> dict[str, dict[str, int | bool | None]]:
        """Of each service: its pid (None while it waits to start), readiness and restarts."""
        return {
            one.service.name: {
                "pid": one.process.pid if one.process else None,
                "ready": one.is_ready,
                "restarts": one.restarts,
            }
            for one in self._running
        }

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a running service; nothing happens while it is down."""
        for one in self._running:
            if one.service.name == name and one.process and one.process.poll() is None:
                one.process.send_signal(number)

    def _launch(self, one: _Running) -> None:
        service = one.service
        service.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _keep_small(service.log)
        with open(service.log, "ab", opener=_private) as output:
            one.process = subprocess.Popen(
                service.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(service.environ),
                pass_fds=service.pass_fds,
                # Ctrl-C in a terminal reaches the supervisor alone, which stops them in order.
                start_new_session=True,
                # One system call, bound beforehand: safe next to threads.
                preexec_fn=_end_with_parent(os.getpid(), service.death_signal),  # noqa: PLW1509
            )
        one.started, one.is_ready = time.monotonic(), False
        self._emit(one, "started")

    def _is_ready(self, one: _Running) -> bool:
        if not one.is_ready and one.service.ready():
            one.is_ready = True
            self._emit(one, "ready")
        return one.is_ready

    def _emit(self, one: _Running, kind: str, code: int | None = None) -> None:
        pid = one.process.pid if one.process else 0
        self._on_event(Event(service=one.service.name, kind=kind, pid=pid, code=code))


def _end_group(pid: int) -> None:
    """End what a dead process left of its own session: it may hold a port or old permissions."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel signal this process when its parent ends; end now if it already has."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)


def _end_with_parent(parent: int, number: signal.Signals) -> Callable[[], None]:
    return lambda: end_with_parent(parent, number)


def _keep_small(log: Path) -> None:
    """Move a large log's content aside (``.1``); its writer only ever appends, and goes on."""
    with suppress(OSError):
        if log.stat().st_size > _LARGEST_LOG:
            shutil.copy2(log, log.with_name(log.name + ".1"))
            os.truncate(log, 0)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
