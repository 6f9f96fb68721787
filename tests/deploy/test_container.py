"""What the images promise: no root, no secret, no fetched file, a health check that tells."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from tests.deploy.containerfile import Stage, exec_form, read_stages

SIDES = {"coordinator": 8440, "hospital": 8450}


@pytest.fixture(scope="module")
def stages(deploy: Path) -> dict[str, Stage]:
    return read_stages(deploy / "container" / "Containerfile")


def health_code(stage: Stage) -> str:
    """The Python program of the image's HEALTHCHECK."""
    (check,) = stage.of("HEALTHCHECK")
    python, flag, code = exec_form(check.partition("CMD ")[2])
    assert (python, flag) == ("python3", "-c")
    return code


@pytest.mark.parametrize("side", SIDES)
def test_an_image_runs_as_a_number_that_is_not_root(stages: dict[str, Stage], side: str) -> None:
    assert stages[side].of("USER")[-1] == "10001:10001"
    assert stages[side].of("STOPSIGNAL") == ["SIGTERM"]
    assert stages[side].of("VOLUME") == ['["/var/lib/consilium"]']
    assert exec_form(stages[side].of("ENTRYPOINT")[-1]) == ["consilium"]
    assert exec_form(stages[side].of("CMD")[-1]) == [side, "start"]
    assert f'title="consilium-{side}"' in stages[side].of("LABEL")[-1]


def test_nginx_is_in_the_coordinators_image_alone(stages: dict[str, Stage]) -> None:
    installs = {name: " ".join(stage.of("RUN")) for name, stage in stages.items()}
    assert "nginx-light" in installs["coordinator"]
    assert "nginx" not in installs["hospital"]
    assert "build-essential" not in installs["coordinator"] + installs["hospital"]
    assert stages["coordinator"].of("EXPOSE") == ["8443"]
    assert stages["hospital"].of("EXPOSE") == []


def test_layers_hold_no_secret_and_nothing_fetched(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        assert stage.of("ADD") == []
        assert not any("curl " in run or "wget " in run for run in stage.of("RUN"))
        for text in stage.of("ENV") + stage.of("ARG"):
            names = re.findall(r"(?:^|\s)([A-Z_]+)=", text)
            assert names
            assert not [
                name for name in names if re.search("KEY|SECRET|TOKEN|PASS|CREDENTIAL", name)
            ]
    assert all("--mount=type=secret" in run for run in stages["build"].of("RUN") if "pip " in run)


def test_copied_sources_exist_and_are_all_the_package(stages: dict[str, Stage], root: Path) -> None:
    copied = [
        source
        for text in stages["build"].of("COPY")
        for source in text.split()[:-1]
        if not source.startswith("--")
    ]
    assert [source for source in copied if not (root / source).exists()] == []
    project = tomllib.loads((root / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {package.rstrip("*") for package in packages} <= set(copied)
    for stage in ("runtime", "coordinator", "hospital"):
        assert all(text.startswith("--from=build ") for text in stages[stage].of("COPY"))


def test_torch_is_the_projects(stages: dict[str, Stage], root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (torch,) = [one for one in project["dependencies"] if one.startswith("torch")]
    assert f'TORCH="{torch}"' in stages["build"].of("ARG")


def test_the_build_sees_only_what_it_installs(root: Path, deploy: Path) -> None:
    rules = (root / ".containerignore").read_text()
    assert (deploy / "container" / "Containerfile.dockerignore").read_text() == rules
    lines = [line for line in rules.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "common",
        "client",
        "server",
        "simulations",
    }


@contextmanager
def health_endpoint(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("side", "port"), SIDES.items())
def test_the_health_check_tells(stages: dict[str, Stage], side: str, port: int) -> None:
    code = health_code(stages[side])
    assert f"'127.0.0.1', {port}" in code

    def check(at: int) -> int:
        environ = {"http_proxy": "http://127.0.0.1:9", "PATH": ""}  # a proxy is not asked
        command = [sys.executable, "-c", code.replace(str(port), str(at))]
        return subprocess.run(
            command, env=environ, stderr=subprocess.DEVNULL, timeout=30, check=False
        ).returncode

    with health_endpoint(200) as at:
        assert check(at) == 0
    with health_endpoint(503) as at:
        assert check(at) != 0
    assert check(at) != 0  # nobody listens any more


@pytest.mark.parametrize("side", SIDES)
def test_compose_checks_health_as_the_image_does(
    stages: dict[str, Stage], deploy: Path, side: str
) -> None:
    services = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]
    assert services[side]["healthcheck"]["test"][-1] == health_code(stages[side])


def test_hadolint_finds_nothing(
    deploy: Path, tool: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = tool("hadolint", "--no-color", deploy / "container" / "Containerfile")
    assert (done.returncode, done.stdout) == (0, "")
