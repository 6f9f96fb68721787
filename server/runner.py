"""The coordinator's task runner: each run is conducted by the ServerApp installed here.

Whoever reaches Flower's control interface can start runs with code of their own; that code is never
unpacked. A run only names a study, whose folder must have been prepared by this coordinator.

::

    runs/ID/job.json       hospitals by Flower node, and where the public corpus lies
    runs/ID/failure.json   why the last attempt ended early; gone once one succeeds
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType

import httpx
from flwr.app import Context
from flwr.serverapp import ServerApp

from common.compute import ComputeSpec
from common.errors import ConsiliumError, RunError
from common.flower_tasks import (
    Endpoint,
    RunNotRunningException,
    TaskQueue,
    node_activations,
    run_server_task,
)
from common.place import choose
from common.strict import parse_strict
from common.study import Study
from common.supervise import end_with_parent
from server.app import Job, build_server_app, log_progress, read_corpus
from server.flower_link import Enrolled
from server.store import RunFolder

STUDY_SETTING = "study"  # the one setting of a run: which folder below runs/

_logger = logging.getLogger(__name__)

# Too few hospitals, a full disk, a SuperLink that went away and took the run with it, our own end.
_PASSING = (RunError, OSError, httpx.HTTPError, RunNotRunningException, KeyboardInterrupt)
_STUDY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended. ``is_passing``: it may go better another time."""

    message: str
    is_passing: bool


def prepare(
    run: Path,
    study: Study,
    *,
    nodes: Mapping[int, str],
    public_folder: Path,
    compute: ComputeSpec,
) -> None:
    """Make or refresh the folder of a run: its study, and its hospitals by Flower node."""
    folder = RunFolder(run) if (run / "study.toml").is_file() else RunFolder.create(run, study)
    folder.write_json(
        "job.json",
        {
            "hospitals": {str(node): name for node, name in nodes.items()},
            "public_folder": str(public_folder),
            "compute": compute.model_dump(),
        },
    )


def failure_of(run: Path) -> Failure | None:
    """Why the last attempt ended early; None when it did not, or left no word (it was killed)."""
    if not (run / "failure.json").exists():
        return None
    found = RunFolder(run).read_json("failure.json")
    return Failure(str(found["message"]), bool(found["is_passing"]))


def conduct_task(runs: Path, endpoint: Endpoint, token: str) -> None:
    """Conduct the study that the run behind ``token`` names; keep the reason if that fails."""
    path: Path | None = None
    held = ExitStack()

    def app_of(context: Context, grid: object) -> ServerApp:
        nonlocal path
        name = str(context.run_config.get(STUDY_SETTING, ""))
        if not _STUDY_ID.fullmatch(name) or not (runs / name / "job.json").is_file():
            raise RunError(f"no study {name[:40]!r} was prepared here; the run is refused")
        held.enter_context(RunFolder(runs / name).exclusive())
        path = runs / name
        (path / "failure.json").unlink(missing_ok=True)
        run, study = RunFolder.open(path)
        job = run.read_json("job.json")
        choose(parse_strict(ComputeSpec, job["compute"], origin="job.json"))
        enrolled = Enrolled(
            names={int(node): str(one) for node, one in job["hospitals"].items()},
            activations=lambda: node_activations(grid),  # type: ignore[arg-type]
        )
        corpus = read_corpus(study, Path(job["public_folder"]))
        return build_server_app(lambda _: Job(study, run, corpus, log_progress, enrolled))

    try:
        run_server_task(endpoint, token, app_of)
    except BaseException as error:
        if path is not None:
            # A ConsiliumError speaks of settings and counts of hospitals; anything else may not.
            spoken = str(error) if isinstance(error, ConsiliumError) else type(error).__name__
            passing = isinstance(error, _PASSING)
            RunFolder(path).write_json("failure.json", {"message": spoken, "is_passing": passing})
        raise
    finally:
        held.close()


class Runner:
    """Takes runs as they come, each in a process of its own, until told to stop."""

    def __init__(self, runs: Path, endpoint: Endpoint, secret: bytes) -> None:
        """``endpoint``, ``secret``: of the SuperLink's Runtime interface."""
        self._runs, self._endpoint = runs, endpoint
        self._queue = TaskQueue(endpoint, secret, "server")
        self._children: set[int] = set()
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM; studies in hand stop after their last finished round."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while not self._stopping:
            self._reap()
            token = self._queue.take()
            if token is None:
                continue
            me = os.getpid()
            child = os.fork()  # no thread runs here
            if child == 0:
                self._conduct(token, me)
            self._children.add(child)
        for child in self._children:
            os.kill(child, signal.SIGINT)
        for child in self._children:
            os.waitpid(child, 0)

    def _conduct(self, token: str, parent: int) -> None:
        """Conduct one run and end; nothing of the parent's clean-up runs here."""
        code = 1
        try:
            end_with_parent(parent)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            conduct_task(self._runs, self._endpoint, token)
            code = 0
        except BaseException as error:
            told = error if isinstance(error, ConsiliumError) else type(error).__name__
            _logger.error("a run ended early: %s", told)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        for child in list(self._children):
            if os.waitpid(child, os.WNOHANG)[0]:
                self._children.discard(child)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True


def main() -> None:
    """``python -m server.runner FOLDER HOST:PORT``, started by `consilium coordinator start`."""
    parser = argparse.ArgumentParser(prog="server.runner", description=__doc__)
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    parser.add_argument("address", help="host:port of the SuperLink")
    given = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("flwr").propagate = False  # it writes for itself, in colours
    import_module("dp_accounting")  # here once, not in each run's process
    run = given.folder / "run"
    endpoint = Endpoint(given.address, (run / "loopback-ca.pem").read_bytes())
    Runner(given.folder / "runs", endpoint, (run / "superexec.secret").read_bytes()).run()


if __name__ == "__main__":
    main()
