"""Alerts fire on what they are for, and know only metrics that exist."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

# What the services serve, by name and with the labels that the rules may use.
METRICS = {
    "consilium_hospitals": {"state"},
    "consilium_studies": {"state"},
    "consilium_rounds_finished_total": set(),
    "consilium_round_seconds": set(),
    "consilium_run_attempts_total": {"outcome"},
    "consilium_certificate_expiry_days": {"kind"},
    "consilium_service_restarts_total": {"service"},
    "consilium_disk_free_bytes": set(),
    "consilium_hospital_answers_total": {"action", "outcome"},
    "consilium_hospital_refusals_total": {"rule"},
    "consilium_hospital_epsilon_share_max": set(),
    "consilium_hospital_certificate_expiry_days": set(),
    "consilium_hospital_connected": set(),
    "consilium_hospital_service_restarts_total": {"service"},
    "consilium_hospital_disk_free_bytes": set(),
}

Tool = Callable[..., subprocess.CompletedProcess[str]]


def alerts(deploy: Path) -> list[dict[str, object]]:
    groups = yaml.safe_load((deploy / "prometheus" / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_alerts_ask_for_metrics_that_exist(deploy: Path) -> None:
    for alert in alerts(deploy):
        for name, selector in re.findall(r"(consilium_\w+)(?:\{([^}]*)\})?", str(alert["expr"])):
            assert name in METRICS, alert["alert"]
            labels = set(re.findall(r"(\w+)\s*!?=", selector))
            assert labels <= METRICS[name], alert["alert"]


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
