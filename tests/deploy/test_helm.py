"""The chart: values that cannot be wrong unnoticed, pods of the restricted profile."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

NEEDED = {"settings": {"host": ["consilium.example.org"]}, "keySecret": "consilium-key"}
EVERYTHING = NEEDED | {
    "databaseSecret": "consilium-database",
    "metrics": {"enabled": True, "serviceMonitor": {"enabled": True}},
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "consilium", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "podAnnotations": {"note": "x"},
    "persistence": {"size": "5Gi", "storageClassName": "fast"},
    "networkPolicy": {"enabled": True, "to": [{"to": [{"podSelector": {}}]}]},
    "service": {"annotations": {"a": "b"}, "loadBalancerSourceRanges": ["192.0.2.0/24"]},
}

Tool = Callable[..., subprocess.CompletedProcess[str]]
Render = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def chart(deploy: Path) -> Path:
    return deploy / "helm" / "consilium-coordinator"


@pytest.fixture
def render(chart: Path, tmp_path: Path, tool: Tool) -> Render:
    """``render(values)``: the objects by kind; the metrics Service as ``Service/metrics``."""

    def run(values: dict[str, Any]) -> dict[str, Any]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        done = tool("helm", "template", "north", chart, "--values", file)
        assert done.returncode == 0, done.stderr
        found = {}
        for one in yaml.safe_load_all(done.stdout):
            metrics = "app.kubernetes.io/component" in one["metadata"]["labels"]
            found[one["kind"] + ("/metrics" if metrics else "")] = one
        return found

    return run


def merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values over the chart's, as helm merges them."""
    both = dict(base)
    for name, value in values.items():
        old = both.get(name)
        deep = isinstance(old, dict) and isinstance(value, dict)
        both[name] = merged(old, value) if deep else value
    return both


def problems(chart: Path, values: dict[str, Any]) -> list[str]:
    """What the schema has against ``values``."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((chart / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    whole = merged(yaml.safe_load((chart / "values.yaml").read_text()), values)
    return [
        ".".join(map(str, error.absolute_path)) or error.message
        for error in jsonschema.Draft7Validator(schema).iter_errors(whole)
    ]


def test_values_are_complete_with_host_and_key(chart: Path) -> None:
    assert sorted(problems(chart, {})) == ["keySecret", "settings.host"]
    assert problems(chart, NEEDED) == []
    assert problems(chart, EVERYTHING) == []


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"replicas": 2}, "Additional properties"),
        ({"image": {"tag": "latest"}}, "image.tag"),
        ({"image": {"digest": "sha256:abc"}}, "image.digest"),
        ({"settings": {"host": ['x" # y']}}, "settings.host.0"),
        ({"settings": {"port": 1}}, "settings"),
        ({"service": {"port": 443}}, "service.port"),
        ({"service": {"type": "ExternalName"}}, "service.type"),
        ({"maxUnavailable": 2}, "maxUnavailable"),
        ({"networkPolicy": {"from": [{}]}}, "networkPolicy.from.0"),
        ({"terminationGracePeriodSeconds": 5}, "terminationGracePeriodSeconds"),
        ({"resources": {"limits": {"memory": None}}}, "resources.limits.memory"),
    ],
)
def test_wrong_values_are_refused(chart: Path, wrong: dict[str, Any], where: str) -> None:
    found = problems(chart, merged(NEEDED, wrong))
    assert len(found) == 1
    assert where in found[0]


def test_helm_lints_it(chart: Path, tmp_path: Path, tool: Tool) -> None:
    file = tmp_path / "values.yaml"
    for values in (NEEDED, EVERYTHING):
        file.write_text(yaml.safe_dump(values))
        done = tool("helm", "lint", "--strict", chart, "--values", file)
        assert done.returncode == 0, done.stdout + done.stderr
    assert tool("helm", "template", "north", chart).returncode != 0


@pytest.mark.parametrize("values", [NEEDED, EVERYTHING], ids=["needed", "everything"])
def test_pods_keep_the_restricted_profile(render: Render, values: dict[str, Any]) -> None:
    pod = render(values)["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(pod)
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["fsGroup"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["fsGroupChangePolicy"] == "OnRootMismatch"
    for container in pod["initContainers"] + pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
    for volume in pod["volumes"]:
        assert {"secret", "emptyDir", "configMap"} & set(volume)


def test_one_replica_with_its_own_volume_and_no_token(render: Render) -> None:
    found = render(NEEDED)
    spec = found["StatefulSet"]["spec"]
    assert spec["replicas"] == 1
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert found["ServiceAccount"]["automountServiceAccountToken"] is False
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 0
    assert "ServiceMonitor" not in found


def test_secrets_come_from_secrets(render: Render) -> None:
    pod = render(EVERYTHING)["StatefulSet"]["spec"]["template"]["spec"]
    coordinator = pod["containers"][0]
    plain = {one["name"]: one.get("value") for one in coordinator["env"]}
    assert plain["CONSILIUM_KEY_FILE"] == "/key/key"
    assert plain["CONSILIUM_DATABASE_URL"] is None
    mounts = {one["name"] for one in coordinator["volumeMounts"]}
    assert "secret" not in mounts  # only the copy that the coordinator accepts
    metrics = {one["name"] for one in pod["containers"][1]["volumeMounts"]}
    assert metrics == {"config", "metrics-tmp"}


def test_the_settings_are_the_coordinators(render: Render) -> None:
    from server.settings import parse_settings

    text = render(NEEDED)["ConfigMap"]["data"]["coordinator.toml"]
    settings = parse_settings(tomllib.loads(text), origin="chart")
    assert settings.host == ("consilium.example.org",)
    assert settings.listen == "0.0.0.0"  # noqa: S104 - the pod's


def test_the_network_is_closed_but_for_hospitals(render: Render) -> None:
    bare = render(NEEDED)["NetworkPolicy"]["spec"]
    assert bare["policyTypes"] == ["Ingress", "Egress"]
    assert bare["egress"] == []
    assert [rule["ports"][0]["port"] for rule in bare["ingress"]] == ["hospitals"]
    whole = render(EVERYTHING)["NetworkPolicy"]["spec"]
    assert [rule["ports"][0]["port"] for rule in whole["ingress"]] == ["hospitals", "metrics"]
    assert len(whole["egress"]) == 2
    off = render(NEEDED | {"networkPolicy": {"enabled": False}})
    assert "NetworkPolicy" not in off


def test_metrics_pass_and_nothing_else_of_the_admin_api(render: Render, tool: Tool) -> None:
    found = render(EVERYTHING)
    config = found["ConfigMap"]["data"]["metrics.conf"]
    assert "location = /metrics" in config
    assert "location / { return 404; }" in config
    assert config.count("proxy_pass") == 1
    monitor = found["ServiceMonitor"]["spec"]
    labels = found["Service/metrics"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["jobLabel"]] == "consilium-coordinator"  # as the alert rules have it
    public = found["Service"]["metadata"]["labels"]
    assert not monitor["selector"]["matchLabels"].items() <= public.items()


def test_nginx_accepts_the_metrics_configuration(
    render: Render, tmp_path: Path, tool: Tool
) -> None:
    config = tmp_path / "metrics.conf"
    text = render(EVERYTHING)["ConfigMap"]["data"]["metrics.conf"]
    config.write_text(text.replace("/tmp/", f"{tmp_path}/"))  # noqa: S108
    done = tool("nginx", "-t", "-e", "stderr", "-c", config)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("values", [NEEDED, EVERYTHING], ids=["needed", "everything"])
def test_kubernetes_accepts_every_object(render: Render, values: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for kind, one in render(values).items():
        if kind != "ServiceMonitor":  # an extension's
            kubernetes.validate(one, "1.30", strict=True)
