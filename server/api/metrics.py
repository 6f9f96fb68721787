"""Figures for Prometheus: counts and durations, never a name."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
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


def _gauge(name: str, doc: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, doc, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
