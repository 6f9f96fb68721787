"""The four heart-disease hospitals as a deployed federation, and the same study in simulation."""

from __future__ import annotations

import csv
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from common.study import Study, load_study
from common.tensors import load_tensors
from server.store import RunFolder
from simulations.hospitals import build_world, write_world
from simulations.simulate import simulate
from tests.e2e.federation import ROOT, Federation, federation, wait_for, why_not

NOISE_SEED = 11
ENTRIES = "SELECT COUNT(*) FROM entry"
OF_STUDY = "json_extract(facts, '$.study_digest') = ?"
NAMES = ["cleveland", "hungarian", "switzerland", "va"]
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data")) / "heart"

needs_federation = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "possible"),
    pytest.mark.skipif(not DATA.is_dir(), reason="needs the heart data set (CONSILIUM_DATA)"),
    pytest.mark.timeout(600),
]


def heart(seed: int, *, rounds: int = 4, **changes: Any) -> Study:
    """A short study of the four hospitals; another seed makes another study."""
    study = load_study(ROOT / "deploy" / "examples" / "heart.toml")
    return study.revised(
        seed=seed,
        finetune__rounds=rounds,
        pretrain__steps=20,
        distill__steps=60,
        federation__round_timeout_s=25.0,
        privacy__epsilon=0.3,  # many studies must fit into the policy's ε of a year
        **changes,
    )


def as_deployed(study: Study) -> Study:
    """Without what only a simulation reads: the study whose digest hospitals approve."""
    return study.revised(simulation=None)


@dataclass
class HeartFederation:
    """The running federation."""

    made: Federation
    folder: Path

    def submit(self, study: Study, *, approve: list[str] | None = None) -> str:
        """Offer it, and have hospitals' operators approve; its id."""
        path = self.folder / f"study-{study.seed}.toml"
        path.write_text(as_deployed(study).to_toml())
        offered = self.made.ask("submit", str(path))
        digest = offered["digest"]
        with ThreadPoolExecutor() as operators:
            asked = [
                operators.submit(self.approve, name, digest)
                for name in (NAMES if approve is None else approve)
            ]
        for one in asked:
            one.result()
        return str(offered["id"])

    def approve(self, name: str, digest: str) -> None:
        host = self.made.hospitals[name]
        host.command("hospital", "approve", digest[:12], "--yes", "--folder", str(host.folder))

    def state(self, study_id: str) -> Any:
        return next(one for one in self.made.status()["list"] if one["id"] == study_id)

    def wait_finished(self, study_id: str, seconds: float = 240) -> Any:
        """Until it has ended, well; looked at on disk, and asked now and then."""
        result, asked = self.run(study_id).path / "result.json", time.monotonic()

        def ended() -> Any:
            nonlocal asked
            if not result.exists() and time.monotonic() - asked < 15:
                return None
            asked = time.monotonic()
            try:
                found = self.state(study_id)
            except AssertionError:  # the coordinator is down at the moment
                return None
            return found if found["state"] in ("finished", "failed", "stopped") else None

        found = wait_for(ended, seconds, f"study {study_id} ends")
        assert found["state"] == "finished", found
        return found

    def wait_rounds(self, study_id: str, rounds: int, seconds: float = 120) -> None:
        """Until so many rounds on patients are finished."""
        run = self.run(study_id)

        def far_enough() -> bool:
            lines = [one for one in run.metrics() if one["stage"] == "finetune"]
            return len(lines) >= rounds

        wait_for(far_enough, seconds, f"{rounds} rounds of {study_id}")

    def run(self, study_id: str) -> RunFolder:
        return RunFolder(self.made.coordinator.folder / "runs" / study_id)

    def student(self, study_id: str) -> dict[str, torch.Tensor]:
        return load_tensors(self.run(study_id).path / "student.safetensors")

    def hospitals_by_round(self, study_id: str) -> list[int]:
        lines = self.run(study_id).metrics()
        return [int(one["hospitals"]) for one in lines if one["stage"] == "finetune"]


def simulated(study: Study, folder: Path) -> dict[str, torch.Tensor]:
    """The student of the same study, run in this process with the same test noise."""
    simulate(study, folder, DATA, lambda _: None, noise_seed=NOISE_SEED)
    return load_tensors(folder / "student.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5, msg=name)


def whole(seed: int) -> Study:
    """A study of which no round counts without all four hospitals."""
    return heart(seed, federation__minimum_hospitals=len(NAMES))


def settled(fed: HeartFederation, study_id: str, study: Study, folder: Path) -> None:
    """The ``whole`` study ended as if nothing had happened."""
    fed.wait_finished(study_id, 300)
    assert set(fed.hospitals_by_round(study_id)) == {len(NAMES)}
    assert_equal(fed.student(study_id), simulated(study, folder / "simulated"))
    covered(fed, study_id, study)


def covered(fed: HeartFederation, study_id: str, study: Study) -> None:
    """The ledgers hold at least every answer that the coordinator used."""
    digest = as_deployed(study).digest()
    rounds = fed.hospitals_by_round(study_id)
    charged = [ledger_entries(fed, name, digest) for name in NAMES]
    assert sum(charged) >= sum(rounds), (charged, rounds)


def ledger_entries(fed: HeartFederation, name: str, digest: str) -> int:
    """How many releases a hospital's ledger counts as spent on a study."""
    return count(fed, name, f"{ENTRIES} WHERE {OF_STUDY}", digest)


def count(fed: HeartFederation, name: str, query: str, digest: str) -> int:
    path = fed.made.hospitals[name].folder / "ledger.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        return int(database.execute(query, (digest,)).fetchone()[0])


@contextmanager
def heart_federation(folder: Path, *, canary: str = "") -> Iterator[HeartFederation]:
    """Four hospitals joined and running, their data laid out as `consilium split` does.

    ``canary``: patients' identifiers begin with it, so that any trace can be found.
    """
    laid_out = folder / "laid-out"
    write_world(build_world(heart(0), DATA), laid_out, noise_seed=NOISE_SEED)
    with federation(folder, NAMES) as made:
        made.start_coordinator()

        def joins(name: str) -> None:
            host = made.enrol(name)
            source = laid_out / "hospitals" / name
            shutil.copy(source / "records.csv", host.folder / "records.csv")
            if canary:
                _with_identifiers(host.folder / "records.csv", f"{canary}-{name}")
            settings = (source / "hospital.toml").read_text()
            (host.folder / "hospital.toml").write_text(f'safe = "."\n{settings}')
            policy = host.folder / "policy.toml"
            both = 'trust = ["local", "distributed"]'
            policy.write_text(policy.read_text().replace('trust = ["local"]', both))
            host.command("hospital", "policy", "sign", "--folder", str(host.folder))
            made.start_hospital(name)

        with ThreadPoolExecutor() as operators:
            list(operators.map(joins, NAMES))
        wait_for(lambda: made.status()["online"] == len(NAMES), 120, "all hospitals online")
        yield HeartFederation(made, folder)


def _with_identifiers(path: Path, prefix: str) -> None:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    rows[0].append("patient")
    for number, row in enumerate(rows[1:]):
        row.append(f"{prefix}-{number}")
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
