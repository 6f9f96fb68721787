"""The units: correct, hardened, and for a reason not hardened in one place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SIDES = ("coordinator", "hospital")
PROGRAM = "/opt/consilium/bin/consilium"
# Out of 10. What remains is the network, which both sides are for, and writable machine code.
LARGEST_EXPOSURE = 1.3

Tool = Callable[..., subprocess.CompletedProcess[str]]


def settings(unit: Path) -> dict[str, list[str]]:
    """Every setting of a unit, with its values in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def unit(deploy: Path, side: str) -> Path:
    return deploy / "systemd" / f"consilium-{side}.service"


def test_the_unit_is_valid(unit: Path, tmp_path: Path, tool: Tool) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(PROGRAM, sys.executable))
    done = tool("systemd-analyze", "verify", "--man=no", copy)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    copy.write_text(copy.read_text().replace("PrivateTmp=yes", "PrivateTpm=yes"))
    assert "PrivateTpm" in tool("systemd-analyze", "verify", "--man=no", copy).stderr


def test_little_is_exposed(unit: Path, tool: Tool) -> None:
    # systemd counts in tenths: a threshold of 13 lets 1.3 pass.
    limit = f"--threshold={LARGEST_EXPOSURE * 10:.0f}"
    done = tool("systemd-analyze", "security", "--offline=true", "--no-pager", limit, unit)
    assert done.returncode == 0, done.stdout


def test_a_weaker_unit_is_noticed(unit: Path, tmp_path: Path, tool: Tool) -> None:
    copy = tmp_path / unit.name
    weak = unit.read_text().replace("NoNewPrivileges=yes\n", "").replace("PrivateUsers=yes\n", "")
    copy.write_text(weak.replace("CapabilityBoundingSet=\n", ""))
    limit = f"--threshold={LARGEST_EXPOSURE * 10:.0f}"
    done = tool("systemd-analyze", "security", "--offline=true", "--no-pager", limit, copy)
    assert done.returncode != 0


def test_the_service_owns_its_state_and_gets_its_key_from_root(unit: Path, side: str) -> None:
    found = settings(unit)
    assert found["User"] == found["Group"] == found["StateDirectory"] == [f"consilium-{side}"]
    assert found["UMask"] == ["0077"]
    assert found["StateDirectoryMode"] == ["0700"]
    folder = f"%S/consilium-{side}"
    assert found["ExecStart"] == [f"{PROGRAM} {side} start --folder {folder}"]
    assert found["LoadCredential"] == [f"key:/etc/consilium/{side}.key"]
    assert "CONSILIUM_KEY_FILE=%d/key" in found["Environment"]
    assert found["LimitCORE"] == ["0"]
    # Nothing starts, and nothing restarts in vain, before the folder was made.
    made = {"coordinator": "coordinator.toml", "hospital": "link/link.json"}[side]
    assert found["ConditionPathExists"] == [f"/var/lib/consilium-{side}/{made}"]


def test_it_drains_before_it_is_killed_and_comes_back_after_a_crash(unit: Path, side: str) -> None:
    found = settings(unit)
    assert found["KillMode"] == ["mixed"]
    from client.daemon import DaemonOptions

    longest = DaemonOptions().drain_s if side == "hospital" else 60.0
    assert float(found["TimeoutStopSec"][0]) > longest + 20
    assert found["Restart"] == ["on-failure"]


def test_torch_does_not_survive_memory_deny_write_execute(unit: Path) -> None:
    """Why the one setting is missing. Once torch survives it, add it."""
    assert "MemoryDenyWriteExecute" not in settings(unit)
    program = """
import ctypes, json
refused = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, as systemd sets it
import torch
try:
    torch.nn.Conv2d(3, 8, 3)(torch.zeros(2, 3, 8, 8))
    error = ""
except RuntimeError as problem:
    error = str(problem)
print(json.dumps([refused, error]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True
    )
    refused, error = json.loads(done.stdout)
    if refused:
        pytest.skip("this kernel cannot refuse writable machine code (Linux 6.3)")
    if not error:
        pytest.skip("on this processor torch generates no machine code")
    assert "could not create a primitive" in error


def test_users_and_folders_are_those_of_the_units(deploy: Path, tool: Tool) -> None:
    folder = deploy / "systemd"
    users = [
        line.split()[:2]
        for line in (folder / "consilium.sysusers.conf").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert users == [["u", f"consilium-{side}"] for side in SIDES]
    done = tool("systemd-sysusers", "--dry-run", folder / "consilium.sysusers.conf")
    assert done.returncode == 0, done.stderr
    keys = (folder / "consilium.tmpfiles.conf").read_text()
    assert "d /etc/consilium 0700 root root" in keys
    assert "z /etc/consilium/*.key 0600 root root" in keys


@pytest.mark.parametrize("words", [(), ("researcher", "simulate"), ("--help",)])
def test_consilium_as_knows_two_sides(deploy: Path, tool: Tool, words: tuple[str, ...]) -> None:
    done = tool("sh", deploy / "systemd" / "consilium-as", *words)
    assert done.returncode == 2
    assert "expected 'coordinator' or 'hospital'" in done.stderr
