"""The compose file keeps the images' promises, and publishes one port."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

SIDES = ("coordinator", "hospital")


@pytest.fixture(scope="module")
def compose(deploy: Path) -> dict[str, Any]:
    return yaml.safe_load((deploy / "compose.yaml").read_text())


@pytest.mark.parametrize("side", SIDES)
def test_a_service_can_write_its_volume_and_nothing_else(
    compose: dict[str, Any], side: str
) -> None:
    service = compose["services"][side]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert "user" not in service  # the image's own
    assert service["security_opt"] == ["no-new-privileges:true"]
    (tmpfs,) = service["tmpfs"]
    assert tmpfs.startswith("/tmp:")  # noqa: S108 - in the container
    assert {"noexec", "nosuid", "nodev"} <= set(tmpfs.split(":")[1].split(","))
    writable = [one for one in service["volumes"] if isinstance(one, str)]
    assert writable == [f"{side}:/var/lib/consilium"]
    assert all(one["read_only"] for one in service["volumes"] if isinstance(one, dict))


@pytest.mark.parametrize("side", SIDES)
def test_a_service_has_limits_and_time_to_stop(compose: dict[str, Any], side: str) -> None:
    service = compose["services"][side]
    limits = service["deploy"]["resources"]["limits"]
    assert {"cpus", "memory", "pids"} == set(limits)
    assert service["stop_grace_period"] == {"coordinator": "2m", "hospital": "150s"}[side]
    assert service["logging"]["options"]["max-size"]
    assert service["profiles"] == [side]  # each side starts by itself
    assert service["build"]["target"] == side
    dockerfile = Path(service["build"]["dockerfile"])
    assert (Path(__file__).resolve().parents[2] / dockerfile).exists()


@pytest.mark.parametrize("side", SIDES)
def test_the_wrapping_key_is_a_file(compose: dict[str, Any], side: str) -> None:
    service = compose["services"][side]
    (secret,) = service["secrets"]
    assert service["environment"] == {"CONSILIUM_KEY_FILE": f"/run/secrets/{secret}"}
    assert set(compose["secrets"][secret]) == {"file"}


def test_only_the_coordinators_public_port_is_published(compose: dict[str, Any]) -> None:
    assert compose["services"]["coordinator"]["ports"] == ["8443:8443"]
    assert "ports" not in compose["services"]["hospital"]
    networks = [set(compose["services"][side]["networks"]) for side in SIDES]
    assert not networks[0] & networks[1]
    assert all(
        "network_mode" not in service and "pid" not in service
        for service in compose["services"].values()
    )


def test_the_compose_specification_accepts_it(compose: dict[str, Any]) -> None:
    parser = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    text = yaml.safe_dump(compose)
    for variable, default in {
        "${CONSILIUM_DATA:-./data}": "./data",
        "${CONSILIUM_COORDINATOR_KEY:-./secrets/coordinator.key}": "./secrets/coordinator.key",
        "${CONSILIUM_HOSPITAL_KEY:-./secrets/hospital.key}": "./secrets/hospital.key",
    }.items():
        assert variable in text
        text = text.replace(variable, default)
    assert sorted(parser.PyCompose.from_yaml(text).service_names()) == list(SIDES)
    with pytest.raises(ValueError, match="read_onyl"):
        parser.PyCompose.from_yaml(text.replace("read_only: true", "read_onyl: true"))
