"""Studies whose hospitals reveal only their noised sum, through the messages of any run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

from client import aggregation, rounds
from client.guard import LedgerGuard
from client.hospital import Hospital
from client.policyfile import sign_policy
from client.safe import create_safe, open_safe
from common.errors import RefusalError, RunError, StudyError
from common.features import FeatureMap, range_scaling, scaling_tensor
from common.models import build_student, build_teacher
from common.privacy.budget import budget_of
from common.secagg import MemoryAttempts
from common.secagg.plan import encoding_of
from common.study import Study
from common.wire import AggregateReply, AggregateTask, TrainTask
from server.store import RunFolder
from simulations.hospitals import build_world, open_world, secret_noise
from simulations.simulate import run_in_process
from tests.e2e.secure_link import Direct, opened, panel_of

HOSPITALS = 6
MakeHospital = Callable[..., Hospital]


@pytest.fixture
def study(wisconsin: Study) -> Study:
    return wisconsin.revised(
        privacy__trust="distributed",
        federation__hospitals=HOSPITALS,
        federation__minimum_hospitals=2,
        federation__tolerated_dropouts=1,
        federation__tolerated_colluders=1,
        simulation__hospitals=HOSPITALS,
        finetune__rounds=3,
        finetune__local_steps=1,
        finetune__optimiser={"kind": "sgd", "learning_rate": 0.5},
        pretrain__steps=5,
        distill__steps=5,
        evaluation__epsilon=None,
    )


def task_of(study: Study) -> TrainTask:
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    return TrainTask(
        study_digest=study.digest(),
        stage="finetune",
        round=0,
        attempt=0,
        teacher=dict(build_teacher(study, features).state_dict()),
        student=dict(build_student(study, features).state_dict()),
        scaling=scaling_tensor(study.dictionary, features.scaling),
    )


def size_of(study: Study) -> int:
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    return sum(one.numel() for one in build_teacher(study, features).head.parameters())


def update_through(study: Study, link: Direct) -> tuple[torch.Tensor, int]:
    return panel_of(study, link).update(task_of(study), size_of(study))


def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Every hospital's noised integers, as it hands them to the protocol."""
    vectors: dict[str, np.ndarray] = {}
    real = aggregation._vector

    def spy(hospital: Hospital, *rest: object) -> torch.Tensor:
        vector = real(hospital, *rest)  # type: ignore[arg-type]
        vectors[hospital.name] = vector.numpy().copy()
        return vector

    monkeypatch.setattr(aggregation, "_vector", spy)
    return vectors


@pytest.mark.parametrize("lost_at", [None, 0, 1, 2, 3, 4])
def test_the_update_is_the_exact_sum_of_the_survivors(
    study: Study, monkeypatch: pytest.MonkeyPatch, lost_at: int | None
) -> None:
    vectors = spied(monkeypatch)
    _, hospitals = opened(study)
    gone = hospitals[2].name
    link = Direct(hospitals, lambda name, _, step: name == gone and step == lost_at)
    update, count = update_through(study, link)
    # Who masked its vector before it vanished is in the sum; who had not, is not.
    inside = [one for one in hospitals if one.name != gone or lost_at in (None, 3, 4)]
    assert count == len(inside)
    total = np.sum([vectors[one.name].astype(np.int64) for one in inside], axis=0)
    encoding = encoding_of(study, "finetune", size_of(study))
    declared = sum(one.declared_patients for one in inside)
    rate = study.finetune.sampling_rate
    expected = torch.from_numpy(total / encoding.scale) * (-0.5 / (rate * declared))
    torch.testing.assert_close(update, expected.float(), rtol=1e-6, atol=0)


def test_no_hospitals_vector_is_in_any_message(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = spied(monkeypatch)
    _, hospitals = opened(study)
    link = Direct(hospitals)
    update_through(study, link)
    everything = b"".join(link.seen)
    for vector in vectors.values():
        # Four consecutive integers in clear would be no coincidence.
        for start in range(0, len(vector) - 4, 4):
            assert vector[start : start + 4].astype("<i4").tobytes() not in everything


def test_too_many_dropouts_release_nothing_and_are_retried_only_if_budgeted(study: Study) -> None:
    _, hospitals = opened(study)
    gone = {hospitals[0].name, hospitals[1].name}
    with pytest.raises(RunError, match="no secure sum in 1 attempts"):
        update_through(study, Direct(hospitals, lambda name, *_: name in gone))

    spare = study.revised(privacy__spare_attempts=1)
    assert budget_of(spare).noise_multiplier > budget_of(study).noise_multiplier
    _, hospitals = opened(spare)
    failed: list[int] = []

    def lose(name: str, action: str, step: int) -> bool:
        if action == "aggregate.begin" and name == hospitals[0].name:
            failed.append(1)
        return name in gone and len(failed) == 1 and step == 2

    update, count = update_through(spare, Direct(hospitals, lose))
    assert count == HOSPITALS
    assert torch.isfinite(update).all()
    # Every hospital whose masked vector left in the failed attempt has paid twice.
    guard = hospitals[4].guard
    assert len(guard._charged) == 2  # type: ignore[attr-defined]


def test_every_attempt_has_noise_of_its_own(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference of two sums must never show a hospital without its noise."""
    spare = study.revised(privacy__spare_attempts=1)
    seen: list[np.ndarray] = []
    real = aggregation._vector
    monkeypatch.setattr(
        aggregation,
        "_vector",
        lambda *these: (
            seen.append(real(*these).numpy().copy()) or torch.from_numpy(seen[-1].copy())
        ),
    )
    for attempt in (0, 1):
        _, hospitals = opened(spare)
        task = replace(task_of(spare), attempt=attempt)
        link = Direct(hospitals)
        monkeypatch.setattr(
            "server.aggregate.replace",
            lambda task, attempt, now=attempt: replace(task, attempt=now),
        )
        panel_of(spare, link).update(task, size_of(spare))
    first, second = seen[0].astype(float), seen[HOSPITALS].astype(float)
    encoding = encoding_of(spare, "finetune", len(first))
    share_std = (encoding.variance / 4) ** 0.5  # threshold 5 less one colluder
    assert (first - second).std() > 0.5 * share_std


def test_an_attempt_that_is_run_again_gets_no_second_vector(study: Study) -> None:
    """A hospital whose memory of its protocol steps is lost still has its gate."""
    _, hospitals = opened(study)
    update_through(study, Direct(hospitals))
    for one in hospitals:
        assert one.aggregator is not None
        one.aggregator.attempts = MemoryAttempts()
    with pytest.raises(RunError, match="no secure sum"):
        update_through(study, Direct(hospitals))


def test_single_updates_are_refused(study: Study) -> None:
    _, hospitals = opened(study)
    with pytest.raises(RefusalError, match="inside a secure sum only"):
        rounds.train(hospitals[0], task_of(study))


def test_a_hospital_that_was_sent_another_model_ends_the_attempt(study: Study) -> None:
    _, hospitals = opened(study)
    link = Direct(hospitals)
    real = link.ask_each

    def other_model(action: str, tasks: dict[str, object], kind: type) -> Iterator[AggregateReply]:
        if action == "aggregate.begin":
            name = hospitals[0].name
            task = tasks[name]
            assert isinstance(task, AggregateTask)
            tasks = tasks | {name: replace(task, scaling=task.scaling * 1.5)}
        return real(action, tasks, kind)

    link.ask_each = other_model  # type: ignore[method-assign]
    _, count = update_through(study, link)
    assert count == HOSPITALS - 1


def test_a_whole_study_resumes_to_the_same_bytes(study: Study, tmp_path: Path) -> None:
    key = b"k" * 32

    def attempt(path: Path, stop_at: int | None) -> None:
        world = build_world(study, Path())
        hospitals = open_world(world, secret_noise(key, [one.name for one in world.sites]))
        run = RunFolder(path) if (path / "study.toml").exists() else RunFolder.create(path, study)

        def watch(progress: object) -> None:
            if (progress.stage, progress.round) == ("finetune", stop_at):  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        run_in_process(study, run, hospitals, world.corpus, watch, debug=True)

    attempt(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "cut", 2)
    attempt(tmp_path / "cut", None)
    for name in ("teacher.safetensors", "student.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    text = (tmp_path / "whole" / "PRIVACY.md").read_text()
    assert "together with any 1 of the 6 hospitals" in text
    assert "at least 4 others" in text


def test_the_ledger_charges_a_sum_and_the_policy_may_forbid_it(
    study: Study, tmp_path: Path
) -> None:
    create_safe(tmp_path / "safe", {})
    with open_safe(tmp_path / "safe", {}) as safe:
        _, hospitals = opened(study)
        forbidding = replace(hospitals[0], guard=LedgerGuard(safe, safe.noise()))
        link = Direct([forbidding, *hospitals[1:]])
        _, count = update_through(study, link)
        assert count == HOSPITALS - 1  # the default policy does not fit this study
        assert safe.ledger.entries() == []
        policy = safe.folder.policy.read_text()
        relaxed = {
            "smallest_cohort": "smallest_cohort = 5",
            "fewest_peers": "fewest_peers = 1",
            "smallest_noise_multiplier": "smallest_noise_multiplier = 0.1",
            "largest_delta_times_cohort": "largest_delta_times_cohort = 0.5",
            "epsilon_lifetime": "epsilon_lifetime = 50.0",
            "epsilon_per_year": "epsilon_per_year = 50.0",
            "trust": 'trust = ["distributed"]',
            "quiet": "quiet = []",
        }
        lines = [relaxed.get(line.split("=")[0].strip(), line) for line in policy.splitlines()]
        safe.folder.policy.write_text("\n".join(lines) + "\n")
        sign_policy(safe.folder.policy, safe.identity, safe.log)
        _, hospitals = opened(study)
        permitting = replace(hospitals[0], guard=LedgerGuard(safe, safe.noise()))
        _, count = update_through(study, Direct([permitting, *hospitals[1:]]))
        assert count == HOSPITALS
        (entry,) = safe.ledger.entries()
        assert entry.state == "committed"
        assert entry.declared == budget_of(study).charge("finetune").events(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation__hospitals": None}, "needs federation.hospitals"),
        ({"finetune__local_steps": 2}, "local_steps = 1"),
        ({"finetune__optimiser": {"kind": "adam", "learning_rate": 0.1}}, "'sgd'"),
        ({"federation__weighting": "uniform"}, "single updates"),
        ({"federation__rule": "fedprox", "federation__proximal_mu": 0.1}, "single updates"),
        ({"federation__tolerated_dropouts": 3}, "too many"),
        ({"federation__tolerated_colluders": 5}, "too many"),
    ],
)
def test_what_needs_single_updates_is_refused_in_the_study(
    study: Study, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(StudyError, match=words):
        study.revised(**changes)


def test_a_dead_hospital_does_not_stop_a_study(study: Study, tmp_path: Path) -> None:
    """Through the whole apps: one hospital answers every message with an error."""
    from flwr.app import Context, RecordDict

    from client.app import build_client_app
    from server.app import Job, build_server_app
    from simulations.grid import InProcessGrid, one_by_one

    world, hospitals = opened(study)
    from contextlib import nullcontext

    app = build_client_app(lambda context, _: nullcontext(hospitals[context.node_id - 1]))

    def handle(message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node == 3 and message.metadata.message_type != "query.hello":
            return Message(Error(code=1, reason="gone"), reply_to=message)
        return app(message, Context(1, node, {}, RecordDict(), {}))

    run = RunFolder.create(tmp_path / "run", study)
    server = build_server_app(lambda _: Job(study, run, world.corpus, lambda _: None))
    server(InProcessGrid(HOSPITALS, one_by_one(handle)), Context(1, 0, {}, RecordDict(), {}))
    assert {line["hospitals"] for line in run.metrics() if line["stage"] == "finetune"} == {
        HOSPITALS - 1
    }
