"""Figures for Prometheus: counts and durations, never a name."""

from __future__ import annotations

import shutil
import time
from collections import Counter as Tally
from collections.abc import Iterator, Mapping
from typing import TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.registry import StudyState
from server.service import Service

Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)

_DAY_S = 86_400
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})


class Metrics:
    """All figures of one coordinator."""

    def __init__(self, service: Service) -> None:
        """``service``: read at each request for the figures."""
        self._registry = CollectorRegistry()
        self._registry.register(_States(service))
        labels = ["app", "method", "route"]
        self.seconds = Histogram(
            "consilium_http_request_seconds",
            "Duration of HTTP requests",
            labels,
            registry=self._registry,
        )
        self.answers = Counter(
            "consilium_http_responses",
            "HTTP responses by status",
            [*labels, "status"],
            registry=self._registry,
        )

    def text(self) -> bytes:
        """In Prometheus's own format."""
        return generate_latest(self._registry)


class _States:
    """Read from the registry when asked, so that they are never out of date."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """One gauge a question."""
        desk, driver = self._service.desk, self._service.driver
        studies, now = desk.registry.studies(), desk.clock()
        hospitals = Tally(
            "revoked"
            if one.revoked_at
            else "online"
            if driver.nodes.get(one.node_id or 0)
            else "offline"
            for one in desk.registry.hospitals()
        )
        states = Tally(one.state for one in studies)
        yield _family(
            GaugeMetricFamily("consilium_hospitals", "Hospitals that joined", labels=["state"]),
            {state: hospitals[state] for state in ("online", "offline", "revoked")},
        )
        yield _family(
            GaugeMetricFamily("consilium_studies", "Studies", labels=["state"]),
            {state: states[state] for state in get_args(StudyState)},
        )
        yield _family(
            CounterMetricFamily(
                "consilium_run_attempts", "Attempts at studies that ended", labels=["outcome"]
            ),
            {outcome: driver.outcomes[outcome] for outcome in ("finished", "failed")},
        )
        yield CounterMetricFamily(
            "consilium_rounds_finished", "Finished rounds", sum(one.progress for one in studies)
        )
        yield _family(
            GaugeMetricFamily(
                "consilium_certificate_expiry_days", "Days until it ends", labels=["kind"]
            ),
            {
                kind: (end - now).total_seconds() / _DAY_S
                for kind, end in desk.authority.expiries().items()
            },
        )
        yield _family(
            CounterMetricFamily(
                "consilium_service_restarts", "Restarts of a process", labels=["service"]
            ),
            {name: one["restarts"] for name, one in self._service.processes().items()},
        )
        yield GaugeMetricFamily(
            "consilium_disk_free_bytes",
            "Free space where the coordinator's folder is",
            shutil.disk_usage(desk.folder.path).free,
        )


class Timed:
    """Times every request by its route, not by its path, which may hold names."""

    def __init__(self, app: ASGIApp, metrics: Metrics, app_name: str) -> None:
        self._app, self._metrics, self._name = app, metrics, app_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            labels = (self._name, method, route)
            self._metrics.seconds.labels(*labels).observe(time.perf_counter() - start)
            self._metrics.answers.labels(*labels, str(status)).inc()


def _family(family: Family, values: Mapping[str, float]) -> Family:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
