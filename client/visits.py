"""The hospital's regular visits to its coordinator, outside of rounds.

::

    clock ▶ studies and answers ▶ countersigned checkpoint ▶ certificate

A visit that finds the clock too far off ends there: nothing is signed under a time that a corrected
clock would contradict.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

from client.link import Coordinator, connect, renew
from client.linkfolder import LinkFolder, is_due
from client.safe import SafeFolder
from client.studies import Member, SyncReport, sync_studies
from common.auditlog import AuditLog, utc_now
from common.checkpoint import Checkpoint, make_checkpoint, verify_checkpoint
from common.errors import AuditError, ConsiliumError
from common.identity import Identity
from common.secretfiles import WrappingKey, replace_file

LARGEST_OFFSET_S = 120.0  # with a clock further off nothing runs and nothing is signed
_CHECKPOINT_EVERY = timedelta(hours=1)

Dial = Callable[[Path, WrappingKey], AbstractContextManager[Coordinator]]


@dataclass
class Visit:
    """What a visit brought. ``problems``: what did not work, in one line each; the rest did."""

    clock_offset_s: float
    studies: SyncReport = field(default_factory=SyncReport)
    is_countersigned: bool = False
    is_renewed: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def is_clock_off(self) -> bool:
        """Whether the clock is too far off to go on."""
        return abs(self.clock_offset_s) > LARGEST_OFFSET_S


class Visitor:
    """Visits for one folder. The audit log stays open in between; use it from one thread."""

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str] = os.environ,
        *,
        dial: Dial = connect,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """``dial``: how the coordinator is reached."""
        self._folder, self._link = folder, LinkFolder(folder)
        self._safe = SafeFolder(folder)
        self._wrapping = WrappingKey.of_folder(folder, environ)
        self._identity = Identity.load(self._safe.identity, key=self._wrapping)
        self._dial, self._clock = dial, clock

    @cached_property
    def _log(self) -> AuditLog:
        return AuditLog(self._safe.audit_log, self._identity, self._clock)

    def visit(self) -> Visit:
        """Go there once. Raises LinkError when the coordinator cannot be reached."""
        facts = self._link.facts()
        member = Member(name=facts.name, coordinator=facts.identity, identity=self._identity)
        with self._dial(self._folder, self._wrapping) as coordinator:
            visit = Visit(coordinator.clock_offset_s())
            if visit.is_clock_off:
                return visit
            try:
                visit.studies = sync_studies(self._folder, coordinator, member, self._log)
            except ConsiliumError as error:
                visit.problems.append(f"studies: {error}")
            try:
                visit.is_countersigned = self._countersign(coordinator, member)
            except ConsiliumError as error:
                visit.problems.append(f"checkpoint: {error}")
            try:
                if is_due(self._link.read_certificate(), self._clock()):
                    renew(
                        self._folder, coordinator, self._identity, self._wrapping, now=self._clock
                    )
                    visit.is_renewed = True
            except ConsiliumError as error:
                visit.problems.append(f"certificate: {error}")
        return visit

    def _countersign(self, coordinator: Coordinator, member: Member) -> bool:
        """Have the log's head countersigned, once an hour when it has grown."""
        path = self._link.checkpoint
        self._log.refresh()
        seq, _ = self._log.head
        if path.exists():
            age = self._clock().timestamp() - path.stat().st_mtime
            # The record of the last checkpoint is itself the next head.
            if Checkpoint.load(path).seq + 1 >= seq or age < _CHECKPOINT_EVERY.total_seconds():
                return False
        asked = make_checkpoint(self._log, self._identity)
        signed = coordinator.countersign(asked)
        verify_checkpoint(signed, hospital=self._identity.public, coordinator=member.coordinator)
        if signed.signed_bytes() != asked.signed_bytes():
            raise AuditError("expected this log's head countersigned, found another; ask again")
        replace_file(path, signed.text().encode())
        self._log.append(
            "checkpoint",
            {
                "checkpoint_seq": signed.seq,
                "checkpoint_head": signed.head,
                "coordinator": signed.coordinator,
            },
        )
        return True
