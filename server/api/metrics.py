"""Figures for Prometheus: counts and durations, never a name."""

from __future__ import annotations

import shutil
import time
from collections import Counter as Tally
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.service import Service

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
        registry = self._service.desk.registry
        hospitals = Tally("revoked" if one.revoked_at else "active" for one in registry.hospitals())
        studies = registry.studies()
        states = Tally(one.state for one in studies)
        yield _gauge(
            "consilium_hospitals",
            "Hospitals that joined",
            "state",
            {state: hospitals[state] for state in ("active", "revoked")},
        )
        yield _gauge(
            "consilium_studies",
            "Studies",
            "state",
            {
                state: states[state]
                for state in ("offered", "running", "finished", "failed", "stopped")
            },
        )
        yield GaugeMetricFamily(
            "consilium_nodes_online",
            "Hospitals connected to Flower",
            sum(self._service.driver.nodes.values()),
        )
        yield GaugeMetricFamily(
            "consilium_study_failures",
            "Attempts at running studies that failed since their last finished round",
            sum(one.attempts for one in studies if one.state == "running"),
        )
        yield CounterMetricFamily(
            "consilium_rounds_finished",
            "Rounds finished, of all studies",
            sum(one.progress for one in studies),
        )
        yield _gauge(
            "consilium_certificate_expiry_days",
            "Until it ends; of the hospitals', the one that ends first",
            "kind",
            self._days_left(),
        )
        yield GaugeMetricFamily(
            "consilium_disk_free_bytes",
            "Where the coordinator's folder is",
            shutil.disk_usage(self._service.desk.folder.path).free,
        )

    def _days_left(self) -> dict[str, float]:
        desk = self._service.desk
        ends = desk.authority.ends()
        newest = [
            issued[-1].not_after
            for one in desk.registry.hospitals()
            if one.revoked_at is None and (issued := desk.registry.certificates(one.name))
        ]
        if newest:
            ends["hospital"] = min(newest)
        now = desk.clock()
        return {kind: (end - now).total_seconds() / 86_400 for kind, end in ends.items()}


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


def _gauge(name: str, doc: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, doc, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
