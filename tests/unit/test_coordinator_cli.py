"""The coordinator's commands: against its interface in memory, and against real processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w

import server.admin_client
from common.enrolment import PREFIX, JoinCode
from server.api.admin import admin_app
from server.api.metrics import Metrics
from server.settings import CoordinatorFolder
from simulations.cli import main
from tests.unit.coordinator import AppTransport, FakeClock, FakeHospital, World, world_at

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A coordinator whose commands reach it in memory."""
    monkeypatch.delenv("CONSILIUM_TOKEN", raising=False)
    monkeypatch.setenv("CONSILIUM_COORDINATOR", str(tmp_path / "desk"))
    with world_at(tmp_path / "desk", FakeClock()) as world:
        transport = AppTransport(admin_app(world.service, Metrics(world.service)))
        plain = httpx.Client

        def in_memory(**arguments: Any) -> httpx.Client:
            return plain(**(arguments | {"transport": transport}))

        monkeypatch.setattr(server.admin_client.httpx, "Client", in_memory)
        yield world


@pytest.fixture
def consilium(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["consilium", "coordinator", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


Consilium = Callable[..., tuple[int, str, str]]


@pytest.fixture
def study_file(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


def test_a_study_from_invitation_to_results(
    world: World, consilium: Consilium, study_file: Path, tmp_path: Path
) -> None:
    for name in ("north", "south"):
        code, out, _ = consilium("enroll", name, "--json")
        assert code == 0
        hospital = FakeHospital(name)
        join = JoinCode.from_text(json.loads(out)["code"])
        world.service.admission.join(hospital.join_request(join))
    world.service.admission.enroll("west", actor="local")
    _, out, _ = consilium("hospitals")
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["north", "offline"],
        ["south", "offline"],
        ["west", "invited"],
    ]
    code, out, _ = consilium("submit", study_file, "--hospitals", "north, south", "--json")
    assert code == 0
    study = json.loads(out)["id"]
    code, _, errors = consilium("begin", "small")
    assert code == 2
    assert "at least 2 approvals, found 0" in errors
    _, out, _ = consilium("status")
    assert "2 hospitals online" in out
    assert "waiting for north, south" in out
    assert consilium("stop-study", "small", "--reason", "later")[0] == 0
    code, out, _ = consilium("watch", "small", "--json")
    assert code == 1  # it ended, but not with a result
    assert json.loads(out)["last_error"] == "later"
    registry = world.service.desk.registry
    registry.change_study(study, ["stopped"], state="finished")
    row = world.service.studies.find(study)
    run = world.service.studies.folder(row)
    run.path.mkdir()
    run.write_json("result.json", {"hospitals": ["north", "south"]})
    run.write_json("privacy.json", {"epsilon_spent": 3.9, "delta": 1e-5, "unit": "patient"})
    assert consilium("watch", "small")[0] == 0
    code, out, _ = consilium("results", "small", "--to", tmp_path / "out")
    assert code == 0
    assert "north, south; ε 3.900" in out
    assert (tmp_path / "out" / "result.json").read_bytes() == (
        run.path / "result.json"
    ).read_bytes()
    code, out, _ = consilium("revoke", "north")
    assert (code, out) == (0, "north is shut out.\n")


def test_tokens_and_roles_from_the_command_line(
    world: World, consilium: Consilium, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = consilium("token", "create", "anna")
    assert code == 0
    with monkeypatch.context() as patch:
        patch.setenv("CONSILIUM_TOKEN", out.strip())
        assert consilium("status")[0] == 0
        code, _, errors = consilium("enroll", "north")
        assert code == 2
        assert "this takes role admin, found viewer" in errors
    _, out, _ = consilium("token", "list")
    assert "anna" in out
    assert consilium("token", "revoke", "anna")[0] == 0
    code, _, errors = consilium("token", "revoke", "anna")
    assert (code, errors.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "-C", "nowhere"],
        ["submit", "nowhere.toml"],
        ["results", "nothing"],
        ["revoke", "nobody"],
        ["enroll", "a/../b"],
        ["stop"],
        ["init", ".", "--host", "not a name"],
        ["backup", "nowhere/deep/file.tar.gz"],
        ["restore", "nowhere.tar.gz", "empty"],
    ],
)
def test_wrong_calls_are_one_line_and_exit_code_2(
    world: World,
    consilium: Consilium,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, errors = consilium(*arguments)
    assert code == 2
    assert out == ""
    assert errors.count("\n") == 1
    assert "Traceback" not in errors


def test_a_token_others_can_read_is_not_used(world: World, consilium: Consilium) -> None:
    world.service.desk.folder.admin_token.chmod(0o644)
    code, _, errors = consilium("status")
    assert code == 2
    assert "expected mode 600" in errors


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_the_service_in_a_process_of_its_own(
    consilium: Consilium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CONSILIUM_TOKEN", raising=False)
    desk = tmp_path / "desk"
    assert consilium("init", desk, "--host", "localhost")[0] == 0
    folder = CoordinatorFolder(desk)
    settings = folder.load_settings().model_copy(update={"admin_port": free_port()})
    folder.save_settings(settings)
    code, _, errors = consilium("status", "-C", desk)
    assert code == 2
    assert "does not answer" in errors
    command = [sys.executable, "-m", "server.api", str(desk)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while consilium("status", "-C", desk)[0] != 0:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        transport = httpx.HTTPTransport(uds=str(folder.hospital_socket))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            assert client.get(f"{PREFIX}/ca").text == (folder.pki / "ca.pem").read_text()
            assert client.get(f"{PREFIX}/studies").status_code == 401
        for path in (folder.run, folder.hospital_socket.parent):
            assert path.stat().st_mode & 0o077 == 0
        assert folder.nginx_conf.exists()
        second = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 2
        assert "not running" in second.stderr
        copy = tmp_path / "copy.tar.gz"
        assert consilium("backup", copy, "-C", desk)[0] == 0  # while it runs
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
