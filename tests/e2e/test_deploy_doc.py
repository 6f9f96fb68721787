"""The commands of docs/deploy.md, run as they stand there."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.federation import ROOT, ip, why_not

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "possible"),
    pytest.mark.timeout(400),
]


def commands(page: Path) -> str:
    """All blocks marked ``sh``, in order."""
    return "\n".join(re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S))


@pytest.fixture
def namespace() -> Iterator[str]:
    """A machine of its own: the page uses the standard ports."""
    name = f"cd{secrets.token_hex(3)}"
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")
    yield name
    ip("netns", "delete", name)


def test_the_page_leads_to_a_result(tmp_path: Path, namespace: str) -> None:
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    program = tmp_path / "bin" / "consilium"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m simulations.cli "$@"\n')
    program.chmod(0o755)
    script = "set -euo pipefail\n" + commands(ROOT / "docs" / "deploy.md")
    assert script.count("consilium ") > 20
    with subprocess.Popen(
        ["ip", "netns", "exec", namespace, "bash", "-c", script],
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            output, _ = shell.communicate(timeout=360)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    logs = [tmp_path / f"{name}.out" for name in ("coordinator", "hospital-1", "hospital-2")]
    told = output + "".join(log.read_text() for log in logs if log.exists())
    assert shell.returncode == 0, told
    assert (tmp_path / "results" / "student.safetensors").stat().st_size > 0
    assert "ε = 1" in (tmp_path / "results" / "PRIVACY.md").read_text()
    assert "verified" in output
    shutil.rmtree(tmp_path / "try")


def test_only_blocks_that_are_run_look_like_it() -> None:
    """Nothing on the page looks like a command that the test leaves out."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    fences = re.findall(r"^```(\w*)$", text, re.M)
    assert set(fences) <= {"sh", "console", ""}
    assert fences.count("console") == 1
