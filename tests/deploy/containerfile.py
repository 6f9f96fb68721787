"""Enough of a Containerfile's grammar for the ones of this repository."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One ``FROM``: its name, the stage or image it builds on, and its instructions in order."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]


def read_stages(path: Path) -> dict[str, Stage]:
    """All stages by name; a stage's inherited steps come before its own."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(str.strip, joined.splitlines()):
        instruction, _, text = line.strip().partition(" ")
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", text.strip()).groups()
            current = Stage(name, base, list(stages[base].steps) if base in stages else [])
            stages[name] = current
        elif current is not None:
            current.steps.append((instruction, text.strip()))
    return stages


def exec_form(text: str) -> list[str]:
    """The words of ``["a", "b"]``; fails for the shell form."""
    return json.loads(text)
