"""The run folder: everything a study leaves behind, and all it needs to continue.

::

    runs/NAME/
    ├── study.toml            the resolved study
    ├── environment.json      versions, machine, seed
    ├── metrics.jsonl         one line per round
    ├── costs.jsonl           what each round took here: seconds by the wall and of the processors
    ├── checkpoint.json       the last finished step and the tensors that belong to it
    ├── checkpoints/          those tensors (safetensors)
    ├── rounds/               the model after every round (safetensors, trainable weights)
    ├── attempts.json         numbers given to attempts at secure sums (trust = "distributed")
    ├── teacher.safetensors   the results
    ├── student.safetensors
    └── privacy.json, PRIVACY.md    the statement

A checkpoint is written in full, synced, and only then named by ``checkpoint.json``; a crash at any
moment leaves the previous step intact, and metrics beyond it are dropped on resume.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import RunError
from common.files import write_atomically
from common.study import Study, load_study
from common.tensors import load_tensors, save_tensors

COSTS = "costs.jsonl"
_LOOK_S = 0.5
_PACKAGES = ("flwr", "torch", "opacus", "numpy", "dp-accounting", "cryptography")


@dataclass(frozen=True)
class Checkpoint:
    """A finished step: its stage and round, its tensors, and plain facts."""

    stage: str
    round: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @classmethod
    def create(cls, path: Path, study: Study) -> RunFolder:
        """A fresh run. Raises RunError when the folder already holds one."""
        if (path / "study.toml").exists():
            raise RunError(
                f"{path} already holds a run; continue it with `consilium resume {path}`, "
                f"choose another folder, or start over with --replace"
            )
        run = cls(path)
        try:
            for folder in ("checkpoints", "rounds"):
                (path / folder).mkdir(parents=True, exist_ok=True)
            write_atomically(path / "study.toml", study.to_toml().encode())
            run.write_json("environment.json", environment(study))
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror})") from None
        return run

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, Study]:
        """An existing run and its study."""
        if not (path / "study.toml").is_file():
            raise RunError(f"{path}: expected a run folder with a study.toml, found none")
        return cls(path), load_study(path / "study.toml")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunError while another conducts it.

        A coordinator that crashed right after it started a run starts another one: two must never
        write one folder.
        """
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _locked(descriptor, wait_s=_LOOK_S):
                raise RunError(f"{self.path}: another process conducts this run; wait for it")
            yield
        finally:
            os.close(descriptor)

    def is_held(self) -> bool:
        """Whether a process conducts the run right now (see ``exclusive``)."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not _locked(descriptor, wait_s=0.0)
        finally:
            os.close(descriptor)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``name`` atomically."""
        write_atomically(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read ``name``. Raises RunError when absent or damaged."""
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{self.path}: has no {name}; the run did not get that far") from None
        except ValueError as error:
            raise RunError(f"{self.path / name}: not valid JSON ({error})") from None
        return value

    def attempts(self, stage: str, number: int, fresh: int) -> Iterator[int]:
        """Numbers for attempts at this round's secure sum, each on disk before it is used.

        First the newest number given before a crash, if any: hospitals that did not hear of it, or
        simulated ones that forgot it, give what they would have given; the others refuse. Then
        ``fresh`` new ones, because a hospital answers no number twice.
        """
        name, key = "attempts.json", f"{stage}-{number}"
        given = self.read_json(name) if (self.path / name).exists() else {}
        newest = int(given.get(key, 0))
        if newest:
            yield newest - 1
        for attempt in range(newest, newest + fresh):
            self.write_json(name, {**given, key: attempt + 1})
            yield attempt

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics."""
        return _whole_lines(self.path / "metrics.jsonl")

    def log_cost(self, line: Mapping[str, Any]) -> None:
        """Append what a round took here. Apart from the metrics, which two runs have alike."""
        with (self.path / COSTS).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def costs(self) -> list[dict[str, Any]]:
        """All whole lines of costs."""
        return _whole_lines(self.path / COSTS)

    def save_round(self, stage: str, number: int, weights: Tensor) -> None:
        """Keep the model after a round, for curves and audits."""
        save_tensors(self.round_path(stage, number), {"weights": weights})

    def round_path(self, stage: str, number: int) -> Path:
        """Where the model after a round lies."""
        return self.path / "rounds" / f"{stage}-{number:04d}.safetensors"

    def checkpoint(self, done: Checkpoint) -> None:
        """Make ``done`` the step from which a resume continues."""
        name = f"checkpoints/{done.stage}-{done.round:04d}.safetensors"
        save_tensors(self.path / name, done.tensors)
        previous = self._named_checkpoint()
        self.write_json(
            "checkpoint.json",
            {
                "stage": done.stage,
                "round": done.round,
                "tensors": name,
                "facts": done.facts,
                "metrics_lines": len(self.metrics()),
            },
        )
        if previous and previous["tensors"] != name:
            (self.path / str(previous["tensors"])).unlink(missing_ok=True)

    def last_checkpoint(self) -> Checkpoint | None:
        """The last finished step, with later metrics dropped; None for a run not begun."""
        named = self._named_checkpoint()
        lines = self.metrics()[: named["metrics_lines"]] if named else []
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.path / "metrics.jsonl", text.encode())
        if named is None:
            return None
        return Checkpoint(
            stage=named["stage"],
            round=named["round"],
            facts=named["facts"],
            tensors=load_tensors(self.path / named["tensors"]),
        )

    def _named_checkpoint(self) -> dict[str, Any] | None:
        return (
            self.read_json("checkpoint.json") if (self.path / "checkpoint.json").exists() else None
        )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Objects line by line; a line that was cut at the end is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _locked(descriptor: int, *, wait_s: float) -> bool:
    """Take the lock; whether that went well in time. (``is_held`` has it for an instant.)"""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_S / 10)


def environment(study: Study) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    return {
        "seed": study.seed,
        "study_digest": study.digest(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in ("consilium", *_PACKAGES)},
    }
