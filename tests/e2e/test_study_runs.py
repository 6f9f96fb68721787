"""Whole studies in one process: what they leave behind, and that interruptions change nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import app as client_app
from client import rounds
from client.hospital import Hospital
from common.errors import DataError, RunError
from common.study import Study, load_study
from common.wire import TrainReply, TrainTask
from server import flower_link
from server.conduct import Progress
from server.store import Checkpoint, RunFolder
from simulations.evaluation import finished_models, round_curve, score, together
from simulations.simulate import load_hospitals, resume, simulate
from tests.e2e.interruptions import Interrupted, stopping_at

Change = dict[str, Any]


def quiet(_: Progress) -> None:
    """Watch nothing."""


def run(study: Study, path: Path, **options: Any) -> RunFolder:
    return simulate(study, path, Path(), quiet, **({"noise_seed": 5, "debug": True} | options))


def student_auc(path: Path) -> float:
    study, hospitals = load_hospitals(path)
    _, student, features = finished_models(RunFolder(path), study)
    return together(score(student, study, features, hospitals)).figures["auc"]


@pytest.fixture(scope="module")
def finished(wisconsin: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "secret"
    run(wisconsin, path, noise_seed=None)
    return path


def test_a_run_leaves_everything_behind(wisconsin: Study, finished: Path) -> None:
    made = {str(one.relative_to(finished)) for one in finished.rglob("*") if one.is_file()}
    assert {
        "study.toml",
        "environment.json",
        "metrics.jsonl",
        "checkpoint.json",
        "teacher.safetensors",
        "student.safetensors",
        "privacy.json",
        "PRIVACY.md",
        "result.json",
        "simulation.key",
        *(f"rounds/finetune-{number:04d}.safetensors" for number in (1, 2, 3)),
    } <= made
    assert len([one for one in made if one.startswith("checkpoints/")]) == 1
    assert load_study(finished / "study.toml") == wisconsin
    assert (finished / "simulation.key").stat().st_mode & 0o077 == 0
    lines = RunFolder(finished).metrics()
    assert [(one["stage"], one["round"]) for one in lines] == [
        ("pretrain", 1),
        ("finetune", 1),
        ("finetune", 2),
        ("finetune", 3),
        ("distill", 1),
    ]
    assert {one["hospitals"] for one in lines if one["stage"] == "finetune"} == {4}


def test_the_statement_keeps_the_promise(wisconsin: Study, finished: Path) -> None:
    statement = json.loads((finished / "privacy.json").read_text())
    target = wisconsin.privacy.epsilon
    assert target is not None
    assert statement["guaranteed"]
    assert 0.98 * target < statement["epsilon_spent"] <= target
    assert [one["stage"] for one in statement["charges"]] == ["finetune", "evaluate"]
    assert len(statement["hospitals"]) == 4
    text = (finished / "PRIVACY.md").read_text()
    assert "differentially private for each training patient" in text
    spent = [one["epsilon"] for one in RunFolder(finished).metrics() if one["epsilon"]]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(statement["epsilon_spent"])


def test_a_seed_or_no_trust_voids_the_statement(wisconsin: Study, tmp_path: Path) -> None:
    bare = wisconsin.revised(
        privacy__trust="none",
        privacy__epsilon=None,
        privacy__delta=None,
        evaluation__epsilon=None,
    )
    for name, study, seed in (("seeded", wisconsin, 1), ("bare", bare, None)):
        run(study, tmp_path / name, noise_seed=seed)
        statement = json.loads((tmp_path / name / "privacy.json").read_text())
        assert not statement["guaranteed"]
        assert "No privacy guarantee" in (tmp_path / name / "PRIVACY.md").read_text()
    assert student_auc(tmp_path / "bare") > 0.95


def test_the_curve_of_rounds_can_be_drawn(wisconsin: Study, finished: Path) -> None:
    study, hospitals = load_hospitals(finished)
    curve = round_curve(RunFolder(finished), study, hospitals)
    assert [number for number, _ in curve] == [1, 2, 3]
    assert all(0 <= value <= 1 for _, value in curve)


def test_a_finished_run_is_neither_continued_nor_overwritten(
    wisconsin: Study, finished: Path
) -> None:
    before = (finished / "result.json").read_bytes()
    resume(finished, quiet)
    with pytest.raises(RunError, match="already holds a run"):
        run(wisconsin, finished)
    assert (finished / "result.json").read_bytes() == before


def test_replacing_spares_a_folder_that_is_no_run(wisconsin: Study, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("mine")
    with pytest.raises(RunError, match="already holds"):
        run(wisconsin, tmp_path, replace=True)
    assert (tmp_path / "study.toml").read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"distill__on": "public", "distill__steps": 150},
        {
            "distill__on": "patients",
            "distill__rounds": 12,
            "distill__optimiser": {"kind": "adam", "learning_rate": 0.05},
        },
    ],
    ids=["public", "patients"],
)
def test_students_learn_from_public_records_and_from_patients(
    wisconsin: Study, tmp_path: Path, changes: Change
) -> None:
    study = wisconsin.revised(privacy__epsilon=8.0, finetune__rounds=6, **changes)
    run(study, tmp_path / "run")
    assert student_auc(tmp_path / "run") > 0.93


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": {"rule": "fedavg"}},
        {"federation": {"rule": "fedavgm", "momentum": 0.5, "tail_average": 1.0}},
        {"federation": {"rule": "fedadam", "server_learning_rate": 0.05}},
        {"federation": {"rule": "fedyogi", "server_learning_rate": 0.05}},
        {"federation": {"rule": "fedprox", "proximal_mu": 0.1}, "finetune__local_steps": 3},
        {"scaling": "private"},
        {"privacy__unit": "record", "federation__weighting": "uniform"},
        {"privacy__relation": "replace_one", "finetune__trainable": "all"},
        {"finetune__sampling_rate": 0.1, "finetune__local_steps": 2, "pretrain__steps": 0},
        {"public": {"kind": "dictionary"}, "scaling": "ranges"},
    ],
    ids=lambda one: ",".join(f"{key}" for key in one),
)
def test_every_way_of_learning_runs(wisconsin: Study, tmp_path: Path, changes: Change) -> None:
    study = wisconsin.revised(finetune__rounds=2, privacy__epsilon=8.0, **changes)
    made = run(study, tmp_path / "run")
    spent = made.read_json("privacy.json")["epsilon_spent"]
    assert 0.98 * 8 < spent <= 8
    assert student_auc(tmp_path / "run") > 0.6


def test_records_as_units_are_refused_where_patients_repeat(
    wisconsin: Study, tmp_path: Path
) -> None:
    rows = (tmp_path / "two.csv").open("w")
    with rows:
        print("who,a,b,ill", file=rows)
        for one in range(80):
            print(f"p{one // 2},{one % 3},{one % 5},{one // 2 % 2}", file=rows)
    study = wisconsin.revised(
        privacy__unit="record",
        scaling="ranges",
        public={"kind": "dictionary"},
        simulation={"source": {"kind": "csv", "path": "two.csv"}, "hospitals": 3},
        dictionary={
            "patient_id": "who",
            "label": {"name": "ill", "classes": [[0], [1]]},
            "columns": [{"name": x, "kind": "numeric", "range": [0, 5]} for x in "ab"],
        },
    )
    with pytest.raises(DataError, match=r"needs one record per patient.*set unit = 'patient'"):
        simulate(study, tmp_path / "run", tmp_path, quiet, noise_seed=1, debug=True)
    simulate(study.revised(privacy__unit="patient"), tmp_path / "ok", tmp_path, quiet, noise_seed=1)


# Failures and interruptions


def failing(names: set[str], at_round: int) -> Callable[[Hospital, TrainTask], TrainReply]:
    original = rounds.train

    def train(hospital: Hospital, task: TrainTask) -> TrainReply:
        if hospital.name in names and task.round == at_round:
            raise OSError("the disk is full")
        return original(hospital, task)

    return train


def test_a_failing_hospital_is_left_out_of_its_round(
    wisconsin: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_app.rounds, "train", failing({"hospital-2"}, 1))
    made = run(wisconsin, tmp_path / "run", debug=False, engine="one-by-one")
    took_part = [one["hospitals"] for one in made.metrics() if one["stage"] == "finetune"]
    assert took_part == [4, 3, 4]


KEPT = ("teacher.safetensors", "student.safetensors", "metrics.jsonl", "result.json")


def same(first: Path, second: Path) -> None:
    for name in (*KEPT, "privacy.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for one in sorted((first / "rounds").iterdir()):
        assert one.read_bytes() == (second / "rounds" / one.name).read_bytes(), one.name
    assert len(list((first / "rounds").iterdir())) == len(list((second / "rounds").iterdir()))


def test_too_few_answers_stop_a_run_that_can_be_resumed(
    wisconsin: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(wisconsin, tmp_path / "whole", engine="one-by-one")
    with monkeypatch.context() as patch:
        patch.setattr(client_app.rounds, "train", failing({"hospital-2", "hospital-3"}, 1))
        with pytest.raises(RunError, match="at least 3 hospitals, found 2.*can be resumed"):
            run(wisconsin, tmp_path / "run", debug=False, engine="one-by-one")
    assert not (tmp_path / "run" / "result.json").exists()
    resume(tmp_path / "run", quiet)
    same(tmp_path / "whole", tmp_path / "run")


def test_too_few_hospitals_are_an_error_at_the_start(
    wisconsin: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_link, "_ASSEMBLY_S", 0.1)
    study = wisconsin.revised(federation__minimum_hospitals=5)
    with pytest.raises(RunError, match="at least 5 hospitals.*found 4"):
        simulate(study, tmp_path / "run", Path(), quiet, noise_seed=1)


ROADS: dict[str, Change] = {
    "public": {},
    "patients": {
        "scaling": "private",
        "distill__on": "patients",
        "distill__rounds": 2,
        "finetune__rounds": 2,
        "finetune__sampling_rate": 0.5,
        "finetune__local_steps": 2,
        "federation__rule": "fedyogi",
        "federation__server_learning_rate": 0.05,
    },
}


@pytest.mark.parametrize("noise", ["seeded", "secret"])
@pytest.mark.parametrize("road", ROADS)
def test_an_interruption_at_any_round_changes_no_byte(
    wisconsin: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    road: str,
    noise: str,
) -> None:
    study = wisconsin.revised(**ROADS[road])
    seed = 5 if noise == "seeded" else None
    whole = run(study, tmp_path / "whole", noise_seed=seed)
    steps = len(whole.metrics())
    assert steps == {"public": 5, "patients": 6}[road]
    for stop in range(1, steps + 1):
        path = tmp_path / f"stopped-{stop}"
        path.mkdir()
        if noise == "secret":
            shutil.copy(whole.path / "simulation.key", path)
        with pytest.raises(Interrupted):
            simulate(study, path, Path(), stopping_at(stop), noise_seed=seed)
        with pytest.raises(RunError, match="did not get that far"):
            RunFolder(path).read_json("result.json")
        resume(path, quiet)
        same(whole.path, path)


@pytest.mark.parametrize("moment", ["before the tensors", "before they are named"])
def test_an_interruption_inside_a_checkpoint_changes_no_byte(
    wisconsin: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The round is logged and its model saved, but the step is not finished yet."""
    whole = run(wisconsin, tmp_path / "whole")
    original_checkpoint, original_write = RunFolder.checkpoint, RunFolder.write_json

    def checkpoint(self: RunFolder, done: Checkpoint) -> None:
        if done.round == 2:
            raise Interrupted
        original_checkpoint(self, done)

    def write_json(self: RunFolder, name: str, value: Any) -> None:
        if name == "checkpoint.json" and value["round"] == 2:
            raise Interrupted
        original_write(self, name, value)

    with monkeypatch.context() as patch:
        if moment == "before the tensors":
            patch.setattr(RunFolder, "checkpoint", checkpoint)
        else:
            patch.setattr(RunFolder, "write_json", write_json)
        with pytest.raises(Interrupted):
            run(wisconsin, tmp_path / "run")
    assert len(RunFolder(tmp_path / "run").metrics()) == 3  # pretrain and two rounds
    resume(tmp_path / "run", quiet)
    same(whole.path, tmp_path / "run")


def test_interrupted_again_and_again(wisconsin: Study, tmp_path: Path) -> None:
    study = wisconsin.revised(**ROADS["patients"])
    whole = run(study, tmp_path / "whole")
    with pytest.raises(Interrupted):
        simulate(study, tmp_path / "run", Path(), stopping_at(2), noise_seed=5)
    for _ in range(10):
        try:
            resume(tmp_path / "run", stopping_at(2))
            break
        except Interrupted:
            continue
    same(whole.path, tmp_path / "run")


_KILLED = """
import os, signal, sys
from pathlib import Path
from common.study import load_study
from simulations.simulate import simulate

def watch(progress):
    if (progress.stage, progress.round) == ("finetune", 2):
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))

simulate(load_study(Path(sys.argv[1])), Path(sys.argv[2]), Path(), watch, noise_seed=5)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_killed_process_can_be_resumed(wisconsin: Study, tmp_path: Path, name: str) -> None:
    whole = run(wisconsin, tmp_path / "whole")
    (tmp_path / "study.toml").write_text(wisconsin.to_toml())
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, tmp_path / "study.toml", tmp_path / "run", name],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert killed.returncode == -getattr(signal, name), killed.stderr.decode()[-2000:]
    resume(tmp_path / "run", quiet)
    same(whole.path, tmp_path / "run")


def test_a_damaged_checkpoint_is_one_line(wisconsin: Study, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        simulate(wisconsin, tmp_path / "run", Path(), stopping_at(3), noise_seed=5)
    stored = next((tmp_path / "run" / "checkpoints").iterdir())
    stored.write_bytes(stored.read_bytes()[:100])
    with pytest.raises(RunError, match="not a whole safetensors file"):
        resume(tmp_path / "run", quiet)
    (tmp_path / "run" / "simulation.json").unlink()
    with pytest.raises(RunError, match=r"has no simulation\.json"):
        resume(tmp_path / "run", quiet)
