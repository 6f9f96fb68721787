"""`consilium hospital start`: everything a hospital runs, kept running.

::

    one instance ▶ essentials checked ▶ tunnel ▶ SuperNode ▶ runner
                                       └ visits to the coordinator every half minute

While the clock is too far off, nothing runs. SIGTERM drains: the message in hand is finished and
sent. A second signal ends everything at once; the ledger is safe either way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from client.budget import budget_report
from client.check import ESSENTIAL, Examination
from client.health import AuditTally, Vitals, health_endpoint
from client.hospitalfile import load_hospital_file
from client.linkfolder import (
    LinkFolder,
    days_left,
    memory_file,
    node_key,
    write_memory_file,
)
from client.running import PAUSED, lock_of
from client.safe import SafeFolder, open_safe
from client.services import (
    RUNNER,
    SUPERNODE,
    Wiring,
    free_port,
    outer_services,
    prepare_run_folder,
    runner_service,
)
from client.tunnel import listen
from client.visits import Visitor
from common.auditlog import utc_now
from common.errors import ConsiliumError, RunError
from common.instance import single_instance
from common.jsonlog import JsonLog
from common.secretfiles import WrappingKey, replace_file
from common.supervise import Event, Service, Supervisor

DEFAULT_HEALTH_PORT = 8450
_POLL_S = 0.2
_STATE_EVERY_S = 2.0
_BUDGET_EVERY_S = 600.0
_FORWARD_S = 3.0  # for the SuperNode to pass on the last answer
_LONGEST_RETRY_S = 60.0
_FIRST_VISIT_S = 60.0
_SILENCE_S = 300.0  # a coordinator not heard of for so long is no longer "well"

OuterServices = Callable[[Wiring, Callable[[], None]], list[Service]]


class _StopError(Exception):
    """Somebody asked for an end while a start was under way."""


class _AtOnceError(BaseException):
    """The second signal."""


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """``drain_s``: how long the message in hand may take at the end. ``health_port``: 0 for any."""

    health_port: int = DEFAULT_HEALTH_PORT
    drain_s: float = 90.0
    visit_every_s: float = 30.0
    outer: OuterServices = outer_services
    runner: Callable[[Wiring], Service] = runner_service


class Daemon:
    """One hospital's programs; ``run`` returns once they have ended."""

    def __init__(self, folder: Path, options: DaemonOptions = DaemonOptions()) -> None:
        """``folder``: of `consilium hospital init`, joined."""
        self._folder, self._options = folder.resolve(), options
        self._link = LinkFolder(self._folder)
        # A plain flag: a signal handler could deadlock on an Event that is being awaited.
        self._is_stopping = False
        self._wake = threading.Event()
        self._has_visited = False
        self._vitals = Vitals()
        self._clock_is_off = False
        self._heard = time.monotonic()
        self._supervisors: list[Supervisor] = []
        self._log: JsonLog | None = None

    def run(self) -> None:
        """Run until told to stop. Raises ConsiliumError when something essential is missing."""
        with ExitStack() as stack:
            advice = "`consilium hospital stop` ends it"
            stack.enter_context(single_instance(lock_of(self._folder), advice))
            for finding in Examination(self._folder).findings(ESSENTIAL):
                if not finding.is_well:
                    raise RunError(f"{finding.name}: {finding.text}")
            wrapping = WrappingKey.of_folder(self._folder, os.environ)
            prepare_run_folder(self._folder)
            self._log = log = JsonLog(self._folder / "logs" / "daemon.log")
            stack.callback(log.close)
            tunnel = stack.enter_context(listen())
            key = self._link.read_key(wrapping)
            descriptor = stack.enter_context(memory_file("node-key", node_key(key)))
            wiring = Wiring(
                folder=self._folder,
                tunnel=tunnel,
                node_key=descriptor,
                runtime_port=free_port(),
                drain_s=self._options.drain_s,
            )
            test_noise = load_hospital_file(self._folder).test_noise_seed is not None
            self._vitals = replace(self._vitals, test_noise=test_noise)
            tally = AuditTally(SafeFolder(self._folder).audit_log)
            port = stack.enter_context(
                health_endpoint(self._options.health_port, lambda: self._vitals, tally)
            )
            stack.enter_context(self._signals())
            log.event("started", pid=os.getpid(), health_port=port, test_noise=test_noise)
            visits = threading.Thread(target=self._visit_for_ever, daemon=True)
            visits.start()
            try:
                self._serve(wiring, wrapping)
                self._note(state="stopping", is_well=False)
                self._drain()
            except _AtOnceError:
                log.warning("ended_at_once")
                for one in self._supervisors:
                    for name in one.status():
                        one.signal(name, signal.SIGKILL)
                    one.stop()
            self._wake.set()
            visits.join(timeout=5.0)
            with suppress(FileNotFoundError):
                (self._folder / "run" / "state.json").unlink()
            log.event("stopped")

    def stop(self) -> None:
        """Begin to drain."""
        self._is_stopping = True

    def _serve(self, wiring: Wiring, wrapping: WrappingKey) -> None:
        """Keep everything running, except while the clock is off."""
        retry_at, wait_s, written = 0.0, 1.0, 0.0
        public = self._link.read_key(wrapping).public_key()
        # The first visit tells whether the clock is right; a coordinator that is away does not.
        deadline = time.monotonic() + _FIRST_VISIT_S
        while not (self._has_visited or self._is_stopping or time.monotonic() > deadline):
            time.sleep(_POLL_S)
        while not self._is_stopping:
            if self._clock_is_off and self._supervisors:
                self._drain()
            elif not self._clock_is_off and not self._supervisors and time.monotonic() >= retry_at:
                try:
                    self._start(wiring)
                    wait_s = 1.0
                except _StopError:
                    break
                except ConsiliumError as error:
                    self._event("not_started", reason=str(error))
                    self._drain()
                    retry_at = time.monotonic() + wait_s
                    wait_s = min(2 * wait_s, _LONGEST_RETRY_S)
            for one in self._supervisors:
                one.poll()
            if self._supervisors and self._link.read_certificate().public_key() != public:
                # The key was rotated: the SuperNode reads the new one from the same descriptor.
                key = self._link.read_key(wrapping)
                public = key.public_key()
                write_memory_file(wiring.node_key, node_key(key))
                self._supervisors[0].signal(SUPERNODE, signal.SIGTERM)
            self._refresh()
            if time.monotonic() >= written + _STATE_EVERY_S:
                self._write_state()
                written = time.monotonic()
            time.sleep(_POLL_S)

    def _start(self, wiring: Wiring) -> None:
        def check_stop() -> None:
            if self._is_stopping:
                raise _StopError

        outer = Supervisor(self._options.outer(wiring, check_stop), self._on_event)
        runner = Supervisor([self._options.runner(wiring)], self._on_event)
        self._supervisors = [outer, runner]
        outer.start()
        runner.start()

    def _drain(self) -> None:
        """End the runner once its message is answered, give the answer time to leave, end all."""
        if not self._supervisors:
            return
        outer, runner = self._supervisors
        begun = time.monotonic()
        runner.stop()
        if time.monotonic() - begun > 1.0:
            time.sleep(_FORWARD_S)
        outer.stop()
        self._supervisors = []

    def _visit_for_ever(self) -> None:
        """The second thread: the coordinator may be slow, and the programs must not wait."""
        visitor: Visitor | None = None
        counted = -_BUDGET_EVERY_S
        while not self._is_stopping:
            try:
                visitor = visitor or Visitor(self._folder)
                self._visit(visitor)
                if time.monotonic() - counted > _BUDGET_EVERY_S:
                    self._note(largest_share=self._largest_share())
                    counted = time.monotonic()
            except ConsiliumError as error:
                self._note(coordinator=f"not reached: {error}")
                self._event("visit_failed", reason=str(error))
            except Exception as error:
                visitor = None  # the thread must live on; a fresh start may do better
                self._event("visit_failed", reason=type(error).__name__)
            self._has_visited = True
            self._wake.wait(self._options.visit_every_s)

    def _visit(self, visitor: Visitor) -> None:
        visit = visitor.visit()
        self._heard = time.monotonic()
        if visit.is_clock_off != self._clock_is_off:
            self._event("clock_off" if visit.is_clock_off else "clock_corrected")
        self._clock_is_off = visit.is_clock_off
        words = "; ".join(visit.problems) or "reached"
        self._note(coordinator=words, clock_offset_s=round(visit.clock_offset_s, 1))
        for problem in visit.problems:
            self._event("visit_problem", reason=problem)
        for digest in visit.studies.new:
            self._event("study_offered", study_digest=digest)
        for digest in visit.studies.answered:
            self._event("answer_sent", study_digest=digest)
        for digest, reason in visit.studies.unusable.items():
            self._event("offer_unusable", study_digest=digest, reason=reason)
        if visit.is_countersigned:
            self._event("checkpoint_countersigned")
        if visit.is_renewed:
            self._event("certificate_renewed")

    def _largest_share(self) -> float:
        """How much of its budget the patient who spent most has spent."""
        with open_safe(self._folder) as safe:
            limits = safe.policy().limits()
            report = budget_report(safe.ledger, limits, utc_now())
        return max(
            (
                max(
                    one.spent_lifetime / limits.epsilon_lifetime,
                    one.spent_year / limits.epsilon_per_year,
                )
                for one in report.cohorts
            ),
            default=0.0,
        )

    def _refresh(self) -> None:
        services = {
            name: status for one in self._supervisors for name, status in one.status().items()
        }
        ready = len(services) == 3 and all(one["ready"] for one in services.values())
        heard = time.monotonic() - self._heard < _SILENCE_S
        state = "serving" if ready else "starting"
        if (self._folder / PAUSED).exists():
            state = "paused"
        if self._clock_is_off:
            state = "clock off: nothing runs until it is corrected"
        left = days_left(self._link.read_certificate(), utc_now())
        self._note(
            state=state,
            services=services,
            is_well=ready and heard and not self._clock_is_off and left > 0,
            is_connected=heard,
            disk_free_bytes=float(shutil.disk_usage(self._folder).free),
            certificate_days=round(left, 2),
        )

    def _note(self, **changes: object) -> None:
        self._vitals = replace(self._vitals, **changes)  # type: ignore[arg-type]

    def _write_state(self) -> None:
        facts = asdict(self._vitals) | {"pid": os.getpid()}
        with suppress(ConsiliumError):  # a full disk is the ledger's to report
            replace_file(self._folder / "run" / "state.json", json.dumps(facts).encode())

    def _on_event(self, event: Event) -> None:
        if (event.service, event.kind) == (RUNNER, "died"):
            # The SuperNode would wait for ever for what died with it; a new one is asked again.
            self._supervisors[0].signal(SUPERNODE, signal.SIGTERM)
        self._event(f"service_{event.kind}", service=event.service, pid=event.pid, code=event.code)

    def _event(self, event: str, **facts: str | int | None) -> None:
        if self._log is not None:
            self._log.event(event, **facts)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(_number: int, _frame: FrameType | None) -> None:
            if self._is_stopping:
                raise _AtOnceError
            self.stop()

        before = {
            number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
