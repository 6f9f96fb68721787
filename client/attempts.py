"""The hospital's durable memory of secure sums: steps taken, and sessions between messages.

Every message may meet a new process. What a session needs to go on is written before its answer
leaves: the coordinator's task as it came, and the protocol's state, which is secret, encrypted.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import MessageError, RefusalError
from common.secagg.plan import STAGES
from common.secretfiles import WrappingKey, read_secret, replace_file, write_secret
from common.tensors import load_tensors, save_tensors
from common.wire import AggregateTask, from_parts, to_parts

_PURPOSE = "secure aggregation session"


@dataclass(frozen=True)
class DurableAttempts:
    """``Attempts`` in a SQLite file, synchronised before each claim returns."""

    path: Path

    def claim(self, release: bytes, attempt: int, step: int) -> None:
        """See ``common.secagg.Attempts``: strictly forward, for each release."""
        database = sqlite3.connect(self.path, isolation_level=None, timeout=30)
        try:
            self.path.chmod(0o600)
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN IMMEDIATE")
            database.execute(
                "CREATE TABLE IF NOT EXISTS claimed "
                "(release BLOB PRIMARY KEY, attempt INTEGER NOT NULL, step INTEGER NOT NULL)"
            )
            row = database.execute(
                "SELECT attempt, step FROM claimed WHERE release = ?", (release,)
            ).fetchone()
            if row is not None and (attempt, step) <= (row[0], row[1]):
                raise RefusalError(
                    f"secagg.attempt: step {step} of attempt {attempt} is not after step {row[1]} "
                    f"of attempt {row[0]}, which was taken already; raise the attempt number",
                    rule="secagg.attempt",
                )
            database.execute(
                "INSERT INTO claimed VALUES (?, ?, ?) ON CONFLICT (release) "
                "DO UPDATE SET attempt = excluded.attempt, step = excluded.step",
                (release, attempt, step),
            )
            database.execute("COMMIT")
        finally:
            database.close()


@dataclass(frozen=True)
class SessionFolder:
    """Open sessions on disk; one a stage and round, the newest attempt only."""

    path: Path
    key: WrappingKey

    def save(self, task: AggregateTask, frozen: bytes) -> None:
        """Keep the session as it stands. The task is public; the state is encrypted."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        values, arrays = to_parts(task)
        home = self._home(task.stage, task.round)
        save_tensors(
            home.with_suffix(".safetensors"),
            {name: torch.from_numpy(array) for name, array in arrays.items()},
        )
        replace_file(home.with_suffix(".json"), json.dumps(values).encode())
        self.update(task, frozen)

    def update(self, task: AggregateTask, frozen: bytes) -> None:
        """Replace the protocol's state after a step."""
        write_secret(
            self._home(task.stage, task.round).with_suffix(".secret"),
            frozen,
            key=self.key,
            purpose=_PURPOSE,
        )

    def load(self, stage: str, round_number: int) -> tuple[AggregateTask, bytes] | None:
        """The task and state of an open session; None without one."""
        home = self._home(stage, round_number)
        if not home.with_suffix(".secret").exists():
            return None
        values = json.loads(home.with_suffix(".json").read_text(encoding="utf-8"))
        tensors = load_tensors(home.with_suffix(".safetensors"))
        task = from_parts(
            AggregateTask, values, {name: tensor.numpy() for name, tensor in tensors.items()}
        )
        return task, read_secret(home.with_suffix(".secret"), key=self.key, purpose=_PURPOSE)

    def forget(self, stage: str, round_number: int) -> None:
        """Delete a session that is over."""
        for suffix in (".secret", ".json", ".safetensors"):
            self._home(stage, round_number).with_suffix(suffix).unlink(missing_ok=True)

    def _home(self, stage: str, round_number: int) -> Path:
        if stage not in STAGES or round_number < 0:
            raise MessageError(f"unknown stage {stage!r} or round {round_number}")
        return self.path / f"{stage}-{round_number}"
