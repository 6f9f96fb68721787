"""A hospital with a safe takes part in a whole study, opened anew for every message."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w
from flwr.app import Context, Message, RecordDict

from client.app import build_client_app
from client.attempts import DurableAttempts
from client.hospital import open_hospital
from client.policyfile import sign_policy
from client.safe import SafeFolder, create_safe, open_safe
from common.auditlog import verify_log
from common.errors import RefusalError
from common.identity import Identity
from common.privacy.budget import budget_of, stage_charge
from common.study import Study, load_study
from server.app import Job, build_server_app, read_corpus
from server.store import RunFolder
from simulations.cli import main
from simulations.grid import InProcessGrid, one_by_one
from simulations.hospitals import build_world, write_world
from tests.offers import approve_by_hand


def make_split(wisconsin: Study, folder: Path, hospitals: int, **changes: object) -> Path:
    """Hospitals' folders, each with a safe whose policy suits the study."""
    study = wisconsin.revised(
        finetune__rounds=3,
        pretrain__steps=5,
        distill__steps=5,
        simulation__hospitals=hospitals,
        federation__minimum_hospitals=2,
        **changes,
    )
    write_world(build_world(study, Path()), folder)
    for home in sorted((folder / "hospitals").iterdir()):
        create_safe(home / "safe", {})
        path = home / "safe" / "policy.toml"
        policy = tomllib.loads(path.read_text())
        policy["release"] |= {
            "stages": ["statistics", "finetune", "evaluate"],
            "trust": ["local", "distributed"],
            "smallest_cohort": 10,
            "fewest_peers": 1,
            "smallest_noise_multiplier": 0.5,
            "largest_delta_times_cohort": 0.1,
        }
        policy["budget"] |= {"epsilon_lifetime": 4.0, "epsilon_per_year": 4.0, "delta": 1e-5}
        policy["hours"]["quiet"] = []
        path.write_text(tomli_w.dumps(policy))
        with open_safe(home / "safe", {}) as safe:
            sign_policy(safe.folder.policy, safe.identity, safe.log)
        settings = tomllib.loads((home / "hospital.toml").read_text())
        (home / "hospital.toml").write_text(tomli_w.dumps(settings | {"safe": "safe"}))
    approve_everywhere(folder)
    return folder


def approve_everywhere(folder: Path) -> None:
    """Every operator approves the study as the coordinator offers it."""
    study = load_study(folder / "study.toml")
    homes = sorted((folder / "hospitals").iterdir())
    keys = {home.name: SafeFolder(home / "safe").public().text() for home in homes}
    for home in homes:
        approve_by_hand(home, study, home / "safe", keys)


@pytest.fixture
def split(wisconsin: Study, tmp_path: Path) -> Path:
    return make_split(wisconsin, tmp_path / "split", 3, evaluation__epsilon=1.0)


@pytest.fixture
def enrolled(wisconsin: Study, tmp_path: Path) -> Path:
    """Five hospitals that have pinned one another's keys."""
    return make_split(
        wisconsin,
        tmp_path / "enrolled",
        5,
        scaling="private",
        evaluation__epsilon=1.0,
        privacy__trust="distributed",
        federation__hospitals=5,
        federation__tolerated_dropouts=1,
        finetune__local_steps=1,
        finetune__optimiser={"kind": "sgd", "learning_rate": 0.5},
    )


def run_study(folder: Path, run: Path) -> RunFolder:
    homes = sorted((folder / "hospitals").iterdir())
    study = load_study(folder / "study.toml")
    app = build_client_app(
        lambda context, digest: open_hospital(homes[context.node_id - 1], digest)
    )

    def handle(message: Message) -> Message:
        node = message.metadata.dst_node_id
        return app(message, Context(1, node, {}, RecordDict(), {}))

    results = RunFolder.create(run, study)
    corpus = read_corpus(study, folder / "public")
    server = build_server_app(lambda _: Job(study, results, corpus, lambda _: None))
    server(InProcessGrid(len(homes), one_by_one(handle)), Context(1, 0, {}, RecordDict(), {}))
    return results


def test_a_study_is_charged_logged_and_guaranteed(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_study(split, tmp_path / "run")
    statement = results.read_json("privacy.json")
    assert statement["guaranteed"]
    study = load_study(split / "study.toml")
    home = split / "hospitals" / "hospital-1"
    with open_safe(home / "safe", {}) as safe:
        entries = safe.ledger.entries()
        verify_log(safe.folder.audit_log, safe.identity.public)
        log = safe.folder.audit_log.read_bytes()
    assert [(one.stage, one.state) for one in entries] == [("finetune", "committed")] * 3 + [
        ("evaluate", "committed")
    ]
    events = budget_of(study).charge("finetune").events(1)
    assert all(one.declared == events for one in entries[:3])
    with open_hospital(home, study.digest()) as hospital:
        for patient in hospital.train.patients[:20]:
            assert str(patient).encode() not in log
    monkeypatch.setattr(
        "sys.argv", ["consilium", "hospital", "budget", "-C", str(home / "safe"), "--json"]
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    report = json.loads(capsys.readouterr().out)
    rows = {
        (one["study"], one["stage"]): one["releases"]
        for cohort in report["cohorts"]
        for one in cohort["studies"]
    }
    assert rows == {(study.name, "finetune"): 3, (study.name, "evaluate"): 1}
    training = max(report["cohorts"], key=lambda one: one["spent_lifetime"])
    assert 2.9 < training["spent_lifetime"] <= 3.0
    assert training["rounds_left"] >= 1


def test_the_same_study_again_is_answered_from_the_ledger(split: Path, tmp_path: Path) -> None:
    """Nothing more is charged, and every answer is the stored one, byte for byte."""
    first = run_study(split, tmp_path / "one")
    second = run_study(split, tmp_path / "two")
    home = split / "hospitals" / "hospital-1"
    with open_safe(home / "safe", {}) as safe:
        assert len(safe.ledger.entries()) == 4
    for name in ("teacher.safetensors", "student.safetensors"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


def test_secure_sums_over_processes_that_forget(enrolled: Path, tmp_path: Path) -> None:
    """Each message finds the hospital newly opened; nothing of a session is left at the end."""
    results = run_study(enrolled, tmp_path / "run")
    assert results.read_json("privacy.json")["guaranteed"]
    assert {one["hospitals"] for one in results.metrics() if one["stage"] == "finetune"} == {5}
    study = load_study(enrolled / "study.toml")
    for home in (enrolled / "hospitals").iterdir():
        with open_safe(home / "safe", {}) as safe:
            entries = safe.ledger.entries()
        assert [(one.stage, one.state) for one in entries] == [
            (stage, "committed") for stage in ("statistics", *["finetune"] * 3, "evaluate")
        ]
        for one in entries:
            assert one.declared == stage_charge(study, one.stage).events(1)
        assert list((home / "safe" / "sessions").iterdir()) == []
        assert (home / "safe" / "attempts.db").stat().st_mode & 0o077 == 0


def test_a_hospital_whose_peers_were_swapped_takes_no_part(enrolled: Path, tmp_path: Path) -> None:
    """It pinned another key for a peer than the coordinator now presents."""
    home = enrolled / "hospitals" / "hospital-1"
    study = load_study(enrolled / "study.toml")
    keys = {
        one.name: SafeFolder(one / "safe").public().text()
        for one in (enrolled / "hospitals").iterdir()
    }
    keys["hospital-2"] = Identity.generate().public.text()
    approve_by_hand(home, study, home / "safe", keys, new_keys=["hospital-2"])
    results = run_study(enrolled, tmp_path / "run")
    assert {one["hospitals"] for one in results.metrics() if one["stage"] == "finetune"} == {4}
    with open_safe(home / "safe", {}) as safe:
        assert safe.ledger.entries() == []


def test_claims_only_go_forward_even_over_processes(tmp_path: Path) -> None:
    path = tmp_path / "attempts.db"
    DurableAttempts(path).claim(b"r", 0, 1)
    DurableAttempts(path).claim(b"other", 0, 1)
    DurableAttempts(path).claim(b"r", 0, 2)
    for attempt, step in ((0, 2), (0, 1)):
        with pytest.raises(RefusalError, match="raise the attempt number"):
            DurableAttempts(path).claim(b"r", attempt, step)
    DurableAttempts(path).claim(b"r", 1, 0)
    with pytest.raises(RefusalError):
        DurableAttempts(path).claim(b"r", 0, 9)
