"""The operations manual names commands, files and sections that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from simulations.cli import app
from simulations.reference import walk

MANUALS = ("docs/operations.md", "deploy/container/README.md", "deploy/nginx/README.md")


@pytest.mark.parametrize("manual", MANUALS)
def test_every_command_exists(root: Path, manual: str) -> None:
    command = typer.main.get_command(app)
    known = {" ".join(path) for path, _ in walk(command, ("consilium",))}
    text = (root / manual).read_text() + (root / "deploy" / "prometheus" / "rules.yml").read_text()
    for side, word, after in re.findall(
        r"consilium(?:-as| ) ?(coordinator|hospital) +([a-z][a-z-]+)(?: +([a-z][a-z-]+))?", text
    ):
        wanted = f"consilium {side} {word}"
        assert wanted in known, wanted
        if after and any(one.startswith(f"{wanted} ") for one in known):  # a family of commands
            assert f"{wanted} {after}" in known, f"{wanted} {after}"


@pytest.mark.parametrize("manual", MANUALS)
def test_links_lead_somewhere(root: Path, manual: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (root / manual).read_text()):
        assert (root / manual).parent.joinpath(target).exists(), target
