"""What a monitoring system may ask a hospital's daemon, on this machine only.

``/health``: JSON, status 200 while all is well and 503 otherwise. ``/metrics``: for Prometheus.
No count of patients or rows is among them.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric

from common.errors import RunError


@dataclass
class Vitals:
    """The daemon's state as others may see it; replaced as a whole, read from other threads."""

    state: str = "starting"
    is_well: bool = False
    services: dict[str, dict[str, int | bool | None]] = field(default_factory=dict)
    coordinator: str = "not asked yet"
    is_connected: bool = False
    clock_offset_s: float | None = None
    certificate_days: float | None = None
    largest_share: float | None = None
    disk_free_bytes: float | None = None
    test_noise: bool = False


class AuditTally:
    """Answered rounds and refusals by rule, read from the audit log as it grows."""

    def __init__(self, path: Path) -> None:
        """``path``: the audit log; its lines are counted, not verified."""
        self._path = path
        self._read = 0
        self._lock = threading.Lock()
        self.answered = 0
        self.refused: Counter[str] = Counter()

    def update(self) -> None:
        """Count what was added since."""
        with self._lock, self._path.open("rb") as file:
            file.seek(self._read)
            fresh = file.read()
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.splitlines():
                record = json.loads(line)
                if record["kind"] == "committed":
                    self.answered += 1
                elif record["kind"] == "refused":
                    self.refused[str(record["facts"].get("rule", "request"))] += 1


class _Collector:
    def __init__(self, vitals: Callable[[], Vitals], tally: AuditTally) -> None:
        self._vitals, self._tally = vitals, tally

    def collect(self) -> Iterator[Metric]:
        now, tally = self._vitals(), self._tally
        tally.update()
        yield _counter("rounds_answered", "Releases that left this hospital.", {"": tally.answered})
        yield _counter("refusals", "Releases refused, by rule.", tally.refused, label="rule")
        restarts = {name: int(one["restarts"] or 0) for name, one in now.services.items()}
        yield _counter("service_restarts", "Programs restarted.", restarts, label="service")
        for name, words, value in (
            ("up", "1 while all is well.", float(now.is_well)),
            ("connected", "1 while the coordinator is heard of.", float(now.is_connected)),
            ("test_noise", "1 when hospital.toml sets test noise.", float(now.test_noise)),
            ("certificate_expiry_days", "Until the certificate ends.", now.certificate_days),
            ("clock_offset_seconds", "Ahead of the coordinator's clock.", now.clock_offset_s),
            ("epsilon_share_max", "Of the budget, by who spent most.", now.largest_share),
            ("disk_free_bytes", "Below the hospital's folder.", now.disk_free_bytes),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"consilium_hospital_{name}", words, value)


def _counter(
    name: str, words: str, values: Mapping[str, int], *, label: str = ""
) -> CounterMetricFamily:
    family = CounterMetricFamily(
        f"consilium_hospital_{name}", words, labels=[label] if label else []
    )
    for key, value in sorted(values.items()):
        family.add_metric([key] if label else [], value)
    return family


@contextmanager
def health_endpoint(port: int, vitals: Callable[[], Vitals], tally: AuditTally) -> Iterator[int]:
    """Serve both pages on the loopback; the port (0 takes a free one). Raises RunError."""
    registry = CollectorRegistry()
    registry.register(_Collector(vitals, tally))

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            """Answer one of the two pages."""
            if self.path == "/health":
                now = vitals()
                body, kind = json.dumps(_public(now)).encode(), "application/json"
                self._send(200 if now.is_well else 503, body, kind)
            elif self.path == "/metrics":
                self._send(200, generate_latest(registry), CONTENT_TYPE_LATEST)
            else:
                self._send(404, b"", "text/plain")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Polls are not worth a line."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise RunError(
            f"health endpoint: 127.0.0.1:{port} cannot be used ({error.strerror}); choose another "
            f"with --health-port"
        ) from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2})
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _public(now: Vitals) -> dict[str, Any]:
    return {
        "state": now.state,
        "services": {
            name: {"ready": one["ready"], "restarts": one["restarts"]}
            for name, one in now.services.items()
        },
        "coordinator": now.coordinator,
        "clock_offset_s": now.clock_offset_s,
        "certificate_days": now.certificate_days,
        "test_noise": now.test_noise,
    }
