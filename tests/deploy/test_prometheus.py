"""Alerts fire on what they are for, and know only metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from client.health import AuditTally, Vitals, health_endpoint
from client.safe import create_safe
from common.secretfiles import replace_file
from server.api.metrics import Metrics
from tests.unit.coordinator import FakeClock, world_at

Tool = Callable[..., subprocess.CompletedProcess[str]]


def alerts(deploy: Path) -> list[dict[str, object]]:
    groups = yaml.safe_load((deploy / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def families(text: str) -> dict[str, set[str]]:
    """Names of samples in Prometheus's format, each with its labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def served_by_coordinator(folder: Path) -> dict[str, set[str]]:
    with world_at(folder, FakeClock()) as world:
        world.join("north")
        processes = {"nginx": {"pid": 1, "ready": True, "restarts": 0}}
        replace_file(world.service.desk.folder.state, json.dumps(processes).encode())
        return families(Metrics(world.service).text().decode())


def served_by_hospital(folder: Path) -> dict[str, set[str]]:
    safe = create_safe(folder)
    tally = AuditTally(safe.audit_log)
    tally.refused["budget"] += 1
    services = {"tunnel": {"pid": 1, "ready": True, "restarts": 0}}
    vitals = Vitals(
        services=services,
        clock_offset_s=0.0,
        certificate_days=1.0,
        largest_share=0.1,
        disk_free_bytes=1.0,
    )
    with health_endpoint(0, lambda: vitals, tally) as port:
        reply = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    return families(reply.text)


@pytest.mark.parametrize(
    ("group", "served"),
    [
        ("consilium-coordinator", served_by_coordinator),
        ("consilium-hospital", served_by_hospital),
    ],
)
def test_alerts_ask_for_what_is_served(
    deploy: Path, tmp_path: Path, group: str, served: Callable[[Path], dict[str, set[str]]]
) -> None:
    metrics = served(tmp_path / "folder")
    groups = yaml.safe_load((deploy / "prometheus" / "rules.yml").read_text())["groups"]
    (rules,) = [one["rules"] for one in groups if one["name"] == group]
    for alert in rules:
        for name, selector in re.findall(r"(consilium_\w+)(?:\{([^}]*)\})?", alert["expr"]):
            assert name in metrics, alert["alert"]
            labels = set(re.findall(r"(\w+)\s*!?=", selector))
            assert labels <= metrics[name], alert["alert"]


def test_every_alert_says_what_to_do(deploy: Path, root: Path) -> None:
    manual = (root / "docs" / "operations.md").read_text()
    for alert in alerts(deploy):
        assert set(alert["annotations"]) == {"summary", "action"}
        assert alert["labels"]["severity"] in {"warning", "critical"}
        assert str(alert["alert"]) in manual


def test_metrics_are_scraped_on_loopback(deploy: Path) -> None:
    config = yaml.safe_load((deploy / "prometheus" / "prometheus.yml").read_text())
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]
    }
    assert targets == {
        "consilium-coordinator": ["127.0.0.1:8440"],
        "consilium-hospital": ["127.0.0.1:8450"],
    }


def test_promtool_accepts_the_configuration(deploy: Path, tool: Tool) -> None:
    done = tool("promtool", "check", "config", deploy / "prometheus" / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_on_a_bad_day_and_only_then(tool: Tool) -> None:
    done = tool("promtool", "test", "rules", Path(__file__).parent / "alert_rules.test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_in_the_bad_day(deploy: Path) -> None:
    tests = yaml.safe_load((Path(__file__).parent / "alert_rules.test.yml").read_text())["tests"]
    expected = {
        re.search(r'alertname="(\w+)"', sample["labels"]).group(1)
        for sample in tests[1]["promql_expr_test"][0]["exp_samples"]
    }
    assert expected == {str(alert["alert"]) for alert in alerts(deploy)}
