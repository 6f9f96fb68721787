"""The hospital's task runner: each message is answered by the ClientApp installed here.

It stands where Flower would start a program that runs whatever code the coordinator shipped. Each
message gets a process of its own, forked from this one, in which everything is loaded already:
whatever becomes of it, the next message meets a clean one, and the coordinator gets an answer. What
one of them had to load for its study is loaded here as well, for those that follow.

A SuperNode cannot forget a task whose answer was lost on the way to it, and waits for ever. Then
the runner ends with ``LOST``, the daemon starts both anew, and the coordinator asks again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import FrameType

import httpx
from flwr.clientapp import ClientApp

from client.app import build_client_app
from client.hospital import open_hospital
from common.flower_tasks import ClientTask, Endpoint, RunNotRunningException, TaskQueue
from common.supervise import end_with_parent

_logger = logging.getLogger(__name__)

LOST = 3  # exit code: a task was lost between here and the SuperNode

_SENDING = "sending"
_ENDED_EARLY = "failed (the hospital's process ended early); see the hospital's log"


class Runner:
    """Takes tasks one after the other until told to stop; the one in hand is finished first."""

    def __init__(self, endpoint: Endpoint, secret: bytes, app: ClientApp) -> None:
        """``endpoint``, ``secret``: of the SuperNode's Runtime interface."""
        self._endpoint = endpoint
        self._queue = TaskQueue(endpoint, secret, "client")
        self._app = app
        self._stopping = False
        self._child = 0

    def run(self) -> int:
        """Serve until SIGTERM (a second one also ends the task in hand); the exit code."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while not self._stopping:
            token = self._queue.take()
            if token is None:
                continue
            try:
                self._serve(ClientTask.pull(self._endpoint, token))
            except (httpx.HTTPError, RunNotRunningException, RuntimeError) as error:
                _logger.warning("a task was lost: %s", type(error).__name__)
                return LOST
        return 0

    def _serve(self, task: ClientTask) -> None:
        me = os.getpid()
        told, telling = os.pipe()
        self._child = os.fork()  # no thread runs here: heartbeats begin below
        if self._child == 0:
            _child(task, self._app, me, telling)
        os.close(telling)
        with task.kept_alive():
            with os.fdopen(told, encoding="utf-8") as pipe:
                words = pipe.read().splitlines()
            _, status = os.waitpid(self._child, 0)
        self._child = 0
        if status != 0:
            _logger.error("a task's process ended early (status %d)", status)
            if words:
                raise RuntimeError("half an answer is at the SuperNode")
            task.fail(_ENDED_EARLY)
            return
        for name in words[1:]:
            with suppress(Exception):  # it is only sooner; who needs it says what is wrong
                import_module(name)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        if self._stopping and self._child:
            os.kill(self._child, signal.SIGKILL)
        self._stopping = True


def _child(task: ClientTask, app: ClientApp, parent: int, telling: int) -> None:
    """Answer and end; nothing of the parent's clean-up runs here.

    ``telling``: a pipe on which the parent is told, in a line each, that sending begins and which
    modules were loaded; it ends with this process.
    """
    code = 1
    try:
        end_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # draining: the parent decides
        known = set(sys.modules)
        task.answer(app, lambda: _say(telling, [_SENDING, *sorted(set(sys.modules) - known)]))
        code = 0
    except BaseException as error:
        _logger.error("answering failed: %s", type(error).__name__)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _say(telling: int, lines: list[str]) -> None:
    with os.fdopen(os.dup(telling), "w", encoding="utf-8") as pipe:
        pipe.writelines(f"{line}\n" for line in lines)


def main() -> None:
    """``python -m client.runner FOLDER HOST:PORT``, started by `consilium hospital start`."""
    parser = argparse.ArgumentParser(prog="client.runner", description=__doc__)
    parser.add_argument("folder", type=Path, help="the hospital's folder")
    parser.add_argument("address", help="host:port of the SuperNode's Runtime interface")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("flwr").propagate = False  # it writes for itself, in colours
    import_module("dp_accounting")  # a second; every private round needs it
    run = given.folder / "run"
    app = build_client_app(lambda _context, digest: open_hospital(given.folder, digest))
    endpoint = Endpoint(given.address, (run / "loopback-ca.pem").read_bytes())
    sys.exit(Runner(endpoint, (run / "superexec.secret").read_bytes(), app).run())


if __name__ == "__main__":
    main()
