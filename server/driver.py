"""The loop that keeps studies going: begins, watches, tries again, ends.

Nothing is kept in memory: after any crash the next ``tick`` finds in the registry, the run folders
and at Flower what is to be done. An attempt that dies is made again and continues after the last
finished round; the waits between attempts double, and start anew once a round was finished.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta

from common.errors import ConsiliumError
from server.admission import SERVICE, Admission
from server.desk import Desk, UnavailableError
from server.federation import Federation
from server.registry import StudyRow, StudyState
from server.runner import failure_of, prepare
from server.store import RunFolder
from server.studies import Studies

POLL_S = 3.0
ATTEMPTS = 3  # failures without progress, unless they may pass by themselves

_NODES_EVERY = timedelta(seconds=15)  # the SuperLink logs each look
_FIRST_WAIT, _LONGEST_WAIT = timedelta(seconds=5), timedelta(minutes=30)
# Flower counts a run as running until its heartbeats have been missing for a minute or two.
_ABANDONED = timedelta(seconds=10)

_logger = logging.getLogger(__name__)


class Driver:
    """Call ``tick`` every few seconds, from one thread."""

    def __init__(
        self, desk: Desk, federation: Federation, admission: Admission, studies: Studies
    ) -> None:
        """All of one coordinator."""
        self._desk = desk
        self._federation = federation
        self._admission = admission
        self._studies = studies
        self.nodes: Mapping[int, bool] = {}
        self._nodes_at: datetime | None = None
        self._idle_since: dict[int, datetime] = {}
        self.outcomes: Counter[str] = Counter()  # of attempts since this process began

    def run(self, stopping: threading.Event) -> None:
        """Tick until told to stop; an error is logged and met again at the next tick."""
        is_away = False
        while not stopping.is_set():
            try:
                self.tick()
                is_away = False
            except UnavailableError as error:
                if not is_away:
                    _logger.warning("%s", error)
                is_away = True
            except ConsiliumError as error:
                _logger.error("%s", error)
            except Exception:
                _logger.exception("the driver met an unexpected error and goes on")
            stopping.wait(POLL_S)

    def tick(self) -> None:
        """Do whatever is due. Raises UnavailableError when Flower is away."""
        self._admission.maintain()
        self._look_at_nodes()
        for row in self._desk.registry.studies():
            with self._desk.lock:
                now = self._studies.find(row.id)
                try:
                    self._step(now)
                except UnavailableError:
                    raise
                except ConsiliumError as error:
                    self._note(now, str(error))

    def _look_at_nodes(self) -> None:
        now = self._desk.clock()
        if self._nodes_at is not None and now < self._nodes_at + _NODES_EVERY:
            return
        try:
            self.nodes = self._admission.reconcile()
        except UnavailableError:
            self.nodes, self._nodes_at = {}, None
            raise
        self._nodes_at = now

    def _step(self, row: StudyRow) -> None:
        if row.state == "offered":
            self._begin_if_all_agree(row)
        elif row.state == "running":
            self._watch(row)
        else:
            self._studies.halt(row)

    def _begin_if_all_agree(self, row: StudyRow) -> None:
        standing = self._studies.standing(row)
        if standing.pending:
            return
        if standing.missing:
            self._note(row, f"all have answered: {standing.missing}")
            return
        self._studies.begin(row.id, actor=SERVICE)

    def _watch(self, row: StudyRow) -> None:
        folder = self._studies.folder(row)
        if (folder.path / "result.json").is_file():
            self._change(row, progress=len(folder.metrics()))
            self.outcomes["finished"] += 1
            self._end(row, "finished", "")
            return
        if row.run_id is None:
            if row.next_attempt_at is None or self._desk.clock() >= row.next_attempt_at:
                self._attempt(row)
            return
        run_id = row.run_id
        status = self._federation.run_status(run_id)
        rounds = len(folder.metrics())
        if rounds > row.progress:
            self._change(row, progress=rounds, attempts=0, last_error="")
            row = self._studies.find(row.id)
        if status == "unknown":  # Flower lost its own memory; the study did not fail
            self._change(row, run_id=None, next_attempt_at=self._desk.clock())
        elif status != "running":
            self._failed(row, status)
        elif self._is_abandoned(run_id, folder):
            self._federation.stop_run(run_id)
            self._failed(row, "failed")

    def _is_abandoned(self, run_id: int, folder: RunFolder) -> bool:
        """Whether an attempt that counts as running has had no process for a while."""
        if folder.is_held():
            self._idle_since.pop(run_id, None)
            return False
        now = self._desk.clock()
        return now - self._idle_since.setdefault(run_id, now) > _ABANDONED

    def _attempt(self, row: StudyRow) -> None:
        standing = self._studies.standing(row)
        by_name = {one.name: one for one in self._desk.registry.hospitals()}
        nodes = {
            node: name for name in standing.approved if (node := by_name[name].node_id) is not None
        }
        public = (self._desk.folder.path / self._desk.settings.public_folder).resolve()
        path = self._studies.folder(row).path
        prepare(
            path,
            self._studies.study(row),
            nodes=nodes,
            public_folder=public,
            compute=self._desk.settings.compute,
        )
        run_id = self._federation.start_run(row.id)
        self._change(row, run_id=run_id, next_attempt_at=None)
        _logger.info("study %s: attempt %d begins", row.id, row.attempts + 1)

    def _failed(self, row: StudyRow, status: str) -> None:
        failure = failure_of(self._studies.folder(row).path)
        is_passing = failure.is_passing if failure else status == "failed"
        message = failure.message if failure else "its process ended without a word"
        attempts = row.attempts + 1
        self.outcomes["failed"] += 1
        if attempts >= ATTEMPTS and not is_passing:
            self._end(row, "failed", f"{attempts} attempts: {message}")
            return
        wait = min(_FIRST_WAIT * 2 ** min(attempts - 1, 20), _LONGEST_WAIT)
        self._change(
            row,
            run_id=None,
            attempts=attempts,
            last_error=message,
            next_attempt_at=self._desk.clock() + wait,
        )
        _logger.warning("study %s: attempt %d ended: %s", row.id, attempts, message)

    def _end(self, row: StudyRow, state: StudyState, reason: str) -> None:
        self._studies.move(
            row,
            state,
            actor=SERVICE,
            reason=reason,
            last_error=reason,
            next_attempt_at=None,
        )
        _logger.info("study %s: %s", row.id, state)

    def _note(self, row: StudyRow, message: str) -> None:
        if row.last_error != message:
            self._desk.registry.change_study(row.id, [row.state], last_error=message)

    def _change(self, row: StudyRow, **values: object) -> None:
        self._desk.registry.change_study(row.id, ["running"], **values)
