"""The coordinator's service, put together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.auditlog import Clock, utc_now
from server.admission import Admission, Edge
from server.desk import Desk, UnavailableError, open_desk
from server.driver import Driver
from server.federation import Federation, FlowerFederation
from server.nginx import NginxEdge
from server.studies import Studies


@dataclass(frozen=True)
class Service:
    """All of one coordinator, open."""

    desk: Desk
    admission: Admission
    studies: Studies
    driver: Driver

    @classmethod
    def over(cls, desk: Desk, federation: Federation, edge: Edge) -> Service:
        """The service on an open desk."""
        admission, studies = Admission(desk, federation, edge), Studies(desk, federation)
        return cls(desk, admission, studies, Driver(desk, federation, admission, studies))

    def revoke(self, name: str, *, actor: str) -> list[str]:
        """Shut a hospital out; the studies that this stopped.

        A SuperLink that is away keeps neither from happening.
        """
        away: UnavailableError | None = None
        try:
            self.admission.revoke(name, actor=actor)
        except UnavailableError as error:
            away = error
        stopped = self.studies.hospital_left(name)
        if away is not None:
            raise UnavailableError(
                f"{name} is shut out; its Flower node follows once the SuperLink answers ({away})"
            )
        return stopped

    def processes(self) -> dict[str, dict[str, Any]]:
        """The supervised processes: pid, readiness, restarts. Empty without a supervisor."""
        try:
            found = json.loads(self.desk.folder.state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


@contextmanager
def open_service(
    path: Path, environ: Mapping[str, str] = os.environ, clock: Clock = utc_now
) -> Iterator[Service]:
    """The service of folder ``path`` over Flower and nginx; the entrance is brought up to date."""
    with open_desk(path, environ, clock) as desk:
        address = f"127.0.0.1:{desk.settings.superlink_port}"
        federation = FlowerFederation(address, desk.folder.superlink_ca)
        service = Service.over(desk, federation, NginxEdge(desk.folder, desk.settings))
        if not service.admission.maintain():
            service.admission.publish()
        yield service
