"""The gate that every release passes: what it lets through, once, and what it refuses."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from flwr.app import Context, Message, RecordDict
from flwr.app.metadata import Metadata

from client import rounds
from client.app import build_client_app
from client.consent import withdraw
from client.guard import LedgerGuard, MemoryGuard, Release, refuse_beyond_study, request_digest
from client.hospital import Hospital, open_hospital
from client.policyfile import sign_policy
from client.safe import create_safe, open_safe
from client.training import Assignment
from common.errors import RefusalError
from common.features import FeatureMap, range_scaling, scaling_tensor
from common.flower import pack
from common.models import build_student, build_teacher
from common.privacy.accounting import GaussianEvent
from common.privacy.units import PrivacyUnit, Relation
from common.randomness import SecretNoise, SeededNoise, Stream
from common.study import Study
from common.wire import Hello, TrainTask
from tests.offers import approve_by_hand

MakeHospital = Callable[..., Hospital]


def task_of(study: Study, **changes: object) -> TrainTask:
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    task = TrainTask(
        study_digest=study.digest(),
        stage="finetune",
        round=0,
        attempt=0,
        teacher=build_teacher(study, features).state_dict(),
        student=build_student(study, features).state_dict(),
        scaling=scaling_tensor(study.dictionary, features.scaling),
    )
    return replace(task, **changes)  # type: ignore[arg-type]


@pytest.fixture
def policy_changes() -> dict[str, dict[str, object]]:
    return {}


@pytest.fixture
def folder(tmp_path: Path, policy_changes: dict[str, dict[str, object]]) -> Path:
    """A hospital's safe whose policy suits small cohorts."""
    home = tmp_path / "safe"
    create_safe(home, {})
    policy = tomllib.loads((home / "policy.toml").read_text())
    policy["release"] |= {
        "smallest_cohort": 10,
        "fewest_peers": 0,
        "smallest_noise_multiplier": 0.1,
        "largest_delta_times_cohort": 0.1,
        "tasks": ["diagnosis"],
        "trust": ["local"],
    }
    policy["budget"] |= {"epsilon_lifetime": 50.0, "epsilon_per_year": 50.0}
    policy["hours"]["quiet"] = []
    for section, changes in policy_changes.items():
        policy[section] |= changes
    (home / "policy.toml").write_text(tomli_w.dumps(policy))
    with open_safe(home, {}) as safe:
        sign_policy(safe.folder.policy, safe.identity, safe.log)
    return home


@pytest.fixture
def guarded(folder: Path, small: Study, make_hospital: MakeHospital) -> Iterator[Hospital]:
    with open_safe(folder, {}) as safe:
        yield replace(make_hospital(small), guard=LedgerGuard(safe, safe.noise()))


def test_the_same_request_is_charged_once_and_answered_alike(guarded: Hospital) -> None:
    task = task_of(guarded.study)
    first, again = rounds.train(guarded, task), rounds.train(guarded, task)
    assert torch.equal(first.update, again.update)
    entries = guarded.guard.safe.ledger.entries()  # type: ignore[attr-defined]
    assert [entry.state for entry in entries] == ["committed"]


def test_a_stored_release_is_sent_again_without_touching_a_patient(
    guarded: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(guarded.study)
    first = rounds.train(guarded, task).update
    monkeypatch.setattr(Assignment, "update", lambda *_: pytest.fail("computed again"))
    assert torch.equal(rounds.train(guarded, task).update, first)


def test_every_round_once_is_the_studys_epsilon_and_one_more_is_refused(
    guarded: Hospital,
) -> None:
    for number in range(guarded.study.finetune.rounds):
        rounds.train(guarded, task_of(guarded.study, round=number))
    for extra in (task_of(guarded.study, attempt=1), _other_model(guarded.study)):
        with pytest.raises(RefusalError) as refusal:
            rounds.train(guarded, extra)
        assert refusal.value.rule == "study.epsilon"


def test_memory_holds_a_simulated_hospital_to_its_study(
    small: Study, make_hospital: MakeHospital
) -> None:
    hospital = make_hospital(small)
    for number in range(small.finetune.rounds):
        rounds.train(hospital, task_of(small, round=number))
    rounds.train(hospital, task_of(small, round=0))  # the same again is free
    with pytest.raises(RefusalError, match="study promised"):
        rounds.train(hospital, _other_model(small))


def _other_model(study: Study) -> TrainTask:
    task = task_of(study)
    return replace(task, teacher={name: one + 1 for name, one in task.teacher.items()})


@pytest.mark.parametrize(
    ("policy_changes", "rule"),
    [
        ({"release": {"smallest_cohort": 1000}}, "release.smallest_cohort"),
        ({"release": {"fewest_peers": 50}}, "release.fewest_peers"),
        ({"release": {"tasks": ["imaging"]}}, "release.tasks"),
        ({"release": {"stages": ["distill"]}}, "release.stages"),
        ({"release": {"smallest_noise_multiplier": 1e5}}, "release.smallest_noise_multiplier"),
        ({"release": {"largest_delta_times_cohort": 1e-9}}, "release.largest_delta_times_cohort"),
        (
            {"budget": {"epsilon_lifetime": 0.01, "epsilon_per_year": 0.01}},
            "budget.epsilon_lifetime",
        ),
        ({"hours": {"quiet": ["00:00-12:30", "12:00-00:30"]}}, "hours.quiet"),
    ],
)
def test_the_policy_decides_before_any_patient_is_touched(
    guarded: Hospital, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Assignment, "update", lambda *_: pytest.fail("computed"))
    with pytest.raises(RefusalError) as refusal:
        rounds.train(guarded, task_of(guarded.study))
    assert refusal.value.rule == rule
    assert guarded.guard.safe.ledger.entries() == []  # type: ignore[attr-defined]
    assert guarded.guard.safe.log.latest("refused") is not None  # type: ignore[attr-defined]


def test_withdrawn_patients_are_in_no_round(
    guarded: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    safe = guarded.guard.safe  # type: ignore[attr-defined]
    gone = str(guarded.train.patients[0])
    withdraw(safe.withdrawals(safe.policy()), [gone], ledger=safe.ledger, log=safe.log)
    seen: list[int] = []
    real = Assignment.records
    monkeypatch.setattr(
        Assignment,
        "records",
        lambda self, table: seen.append(int((table.patients == gone).sum())) or real(self, table),
    )
    before = guarded.guard.admit([gone], study="s", round_number=0)
    assert before == frozenset()
    rounds.train(guarded, task_of(guarded.study))
    assert seen == [0]
    (entry,) = safe.ledger.entries()
    everyone = len(set(guarded.train.patients))
    assert [cohort.patients for cohort in safe.ledger.cohorts()] == [everyone - 1]
    assert entry.stage == "finetune"


def test_the_coordinator_learns_the_rule_and_no_number(
    folder: Path, small: Study, make_hospital: MakeHospital
) -> None:
    from contextlib import nullcontext

    hospital = make_hospital(small)
    for number in range(small.finetune.rounds):
        rounds.train(hospital, task_of(small, round=number))
    app = build_client_app(lambda *_: nullcontext(hospital))
    metadata = Metadata(1, "m", 0, 1, "", "", 0.0, 60.0, "train")
    message = Message(content=pack(_other_model(small)), metadata=metadata)
    context = Context(1, 1, {}, RecordDict(), {})
    reply = app(message, context)
    assert reply.has_error()
    assert reply.error.reason == "refused by rule study.epsilon"


def test_nothing_leaves_a_safe_without_a_promise(guarded: Hospital) -> None:
    open_study = guarded.study.revised(
        privacy__trust="none", privacy__epsilon=None, privacy__delta=None
    )
    hospital = replace(guarded, study=open_study)
    with pytest.raises(RefusalError) as refusal:
        rounds.train(hospital, task_of(open_study))
    assert refusal.value.rule == "release.trust"


@pytest.mark.parametrize("test_noise", [False, True])
def test_only_the_hospitals_own_file_sets_test_noise(
    folder: Path, small: Study, tmp_path: Path, test_noise: bool
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    rows = [f"p{one},{one % 7 - 3},{one % 5 - 2},{one % 2}" for one in range(40)]
    (home / "data.csv").write_text("\n".join(["who,a,b,ill", *rows]) + "\n")
    settings = {
        "name": "north",
        "declared_patients": 40,
        "safe": "../safe",
        "source": {"kind": "csv", "path": "data.csv"},
    }
    if test_noise:
        settings["test_noise_seed"] = 5
    (home / "hospital.toml").write_text(tomli_w.dumps(settings))
    with pytest.raises(RefusalError) as refusal, open_hospital(home, small.digest()):
        pass
    assert refusal.value.rule == "study.approval"
    approve_by_hand(home, small, folder, ["north"])
    hello = Hello(study_digest=small.digest())
    with open_hospital(home, small.digest()) as hospital:
        assert hospital.guard.is_lasting
        assert rounds.hello(hospital, hello).secret_noise is not test_noise
        deployed = rounds.train(hospital, task_of(small)).update
        simulated = replace(hospital, guard=MemoryGuard(SeededNoise(5, "north")))
        same = torch.equal(rounds.train(simulated, task_of(small)).update, deployed)
        assert same is test_noise
    (home / "paused").touch()
    with pytest.raises(RefusalError) as refusal, open_hospital(home, small.digest()):
        pass
    assert refusal.value.rule == "hospital.paused"


def test_a_crash_between_reserve_and_release_is_paid_and_never_exceeds_the_study(
    guarded: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lost attempt stays charged; so the study's last round no longer fits, and is refused."""
    with monkeypatch.context() as patched:
        patched.setattr(Assignment, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rounds.train(guarded, task_of(guarded.study))
    last = guarded.study.finetune.rounds - 1
    for number in range(last):
        rounds.train(guarded, task_of(guarded.study, round=number))
    with pytest.raises(RefusalError) as refusal:
        rounds.train(guarded, task_of(guarded.study, round=last))
    assert refusal.value.rule == "study.epsilon"
    states = [entry.state for entry in guarded.guard.safe.ledger.entries()]  # type: ignore[attr-defined]
    assert states == ["reserved"] + ["committed"] * last


def release(event: GaussianEvent) -> Release:
    return Release(
        study="s",
        study_digest="d",
        task="diagnosis",
        stage="finetune",
        round=0,
        attempt=0,
        request="r",
        rows="x",
        pool="train",
        trust="local",
        unit=PrivacyUnit.PATIENT,
        relation=Relation.ADD_REMOVE,
        records_per_patient=1,
        events=(event,),
        patients=("p",),
        peers=1,
        epsilon=1.0,
        delta=1e-5,
    )


def test_refusal_compares_with_what_the_study_promised() -> None:
    one = GaussianEvent(noise_multiplier=4.0)
    asked = release(one)
    refuse_beyond_study([], asked)  # one such release is ε 0.93
    with pytest.raises(RefusalError):
        refuse_beyond_study([one], asked)


def test_no_two_requests_share_a_digest() -> None:
    assert request_digest("a", 1) != request_digest("a", "1")
    assert request_digest("ab", "c") != request_digest("a", "bc")


def test_memory_draws_the_same_noise_for_the_same_request_only() -> None:
    guard = MemoryGuard(SecretNoise(bytes(32)))
    asked = release(GaussianEvent(noise_multiplier=100.0))

    def draw(stream: Stream) -> torch.Tensor:
        return torch.from_numpy(stream.normal(4))

    first = guard.release(asked, draw)
    assert torch.equal(first, guard.release(asked, draw))
    assert not torch.equal(first, guard.release(replace(asked, rows="y"), draw))
