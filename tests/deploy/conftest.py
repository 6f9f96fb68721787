"""Where the deployment files are, and the tools that check them where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def deploy() -> Path:
    """Its deployment files."""
    return ROOT / "deploy"


@pytest.fixture(scope="session")
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``tool("helm", "lint", …)``: run it and return what it printed; skip where it is missing."""

    def run(
        name: str, *arguments: str | Path, **options: str | Path
    ) -> subprocess.CompletedProcess[str]:
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        if found is None:
            pytest.skip(f"{name} is not installed")
        command = [found, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, **options
        )

    return run
