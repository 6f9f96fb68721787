"""A scenario around a backend: who is asked, who answers, when, and with what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from client.hospital import Hospital
from common.flower import pack, unpack
from common.scenario import NetworkSpec, StragglersSpec
from common.study import Study, parse_study
from common.wire import Hello, TrainReply, TrainTask
from server.store import RunFolder
from simulations.grid import InProcessGrid
from simulations.scenarios import Scene, open_scene
from simulations.traffic import Clock, Fate, Parcel, Traffic, forecast

HOSPITALS = 10


@pytest.fixture
def stage(
    tree: dict[str, Any], make_hospital: Callable[..., Hospital], tmp_path: Path
) -> Callable[..., Scene]:
    """``stage(dropouts={…}, …)``: ten hospitals under that scenario."""

    def make(folder: str = "run", seed: int = 1, rounds: int = 6, **scenario: Any) -> Scene:
        tree["seed"] = seed
        tree["finetune"]["rounds"] = rounds
        tree["simulation"] = {
            "source": {"kind": "csv", "path": "x"},
            "hospitals": HOSPITALS,
            "scenario": scenario,
        }
        study = parse_study(tree, origin="test")
        assert study.simulation is not None
        hospitals = [make_hospital(study, name, patients=8) for name in study.simulation.names]
        (tmp_path / folder).mkdir(exist_ok=True)
        return open_scene(study, RunFolder(tmp_path / folder), hospitals)

    return make


def slow(stage: Callable[..., Scene], **stragglers: Any) -> Scene:
    """Hospitals that take half a second, more or less."""
    return stage(
        network={"records_per_s": 20.0}, stragglers={"spread": 1.0, "jitter": 1.0, **stragglers}
    )


class Play:
    """Sends one round's questions through a scene to hospitals that answer with their number."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.worked: list[str] = []
        self.sent: list[Message] = []
        self.given: list[Message] = []
        self.backend = scene.over(self._work)

    def _work(self, messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            name = self.scene.hospitals[message.metadata.dst_node_id - 1].name
            self.worked.append(name)
            self.sent.append(message)
            task = unpack(TrainTask, message.content)
            update = torch.full((5,), float(message.metadata.dst_node_id))
            reply = TrainReply(hospital=name, stage=task.stage, round=task.round, update=update)
            self.given.append(Message(pack(reply), reply_to=message))
            yield self.given[-1]

    def round(self, number: int, *, shuffle: int | None = None) -> list[TrainReply]:
        """The replies that reach the coordinator, in their order."""
        task = TrainTask(
            study_digest=self.scene.study.digest(),
            stage="finetune",
            round=number,
            attempt=0,
            teacher={"w": torch.zeros(300)},
            student={},
            scaling=torch.zeros(2, 2),
        )
        return [
            unpack(TrainReply, one.content) for one in self._exchange(pack(task), "train", shuffle)
        ]

    def present(self) -> int:
        """How many hospitals are asked when all are greeted."""
        hello, asked = pack(Hello(study_digest="d")), []

        def answer(messages: list[Message]) -> Iterator[Message]:
            asked.extend(messages)
            return (Message(hello, reply_to=one) for one in messages)

        self.backend, kept = self.scene.over(answer), self.backend
        self._exchange(hello, "query.hello", None)
        self.backend = kept
        return len(asked)

    def _exchange(self, content: Any, kind: str, shuffle: int | None) -> list[Message]:
        grid = InProcessGrid(HOSPITALS, self.backend)
        messages = [
            Message(content, dst_node_id=node, message_type=kind) for node in grid.get_node_ids()
        ]
        if shuffle is not None:
            np.random.default_rng(shuffle).shuffle(messages)  # type: ignore[arg-type]
        replies = list(grid.send_and_receive(messages))
        assert len(replies) == HOSPITALS  # nobody is waited for
        return [one for one in replies if not one.has_error()]

    def fates(self, number: int) -> dict[str, Fate]:
        exchange = self.scene.traffic.exchanges["finetune", number + 1, 0, "train"]
        return {name: one.fate for name, one in exchange.visits.items()}


def test_without_a_scenario_all_answer_and_nothing_is_changed(stage: Callable[..., Scene]) -> None:
    play = Play(stage())
    replies = play.round(0)
    assert sorted(float(one.update[0]) for one in replies) == list(range(1, HOSPITALS + 1))
    assert set(play.fates(0).values()) == {Fate.ANSWERED}


def test_as_many_are_asked_as_said_and_others_each_round(stage: Callable[..., Scene]) -> None:
    play = Play(stage(participation={"fraction": 0.35}))
    asked = [frozenset(one.hospital for one in play.round(number)) for number in range(6)]
    assert {len(one) for one in asked} == {4}  # rounded up
    assert len(set(asked)) > 3
    assert len(play.worked) == 24  # the others do nothing


@pytest.mark.parametrize(
    "scenario",
    [
        {"participation": {"hospitals": 5}},
        {"dropouts": {"probability": 0.4}},
        {"dropouts": {"probability": 0.4, "when": "after"}},
        {"stragglers": {"spread": 2.0, "deadline_s": 0.6}, "network": {"records_per_s": 20.0}},
        {"attack": {"kind": "wrong_vector", "hospitals": 3}},
    ],
)
def test_what_happens_follows_from_the_seed_and_not_from_the_order(
    stage: Callable[..., Scene], scenario: dict[str, Any]
) -> None:
    def outcome(folder: str, seed: int, *, shuffle: int | None) -> list[Any]:
        play = Play(stage(folder, seed, **scenario))
        seen = []
        # Rounds out of order as well: none depends on another.
        for number in (0, 1, 2, 3) if shuffle is None else (3, 1, 0, 2):
            replies = {
                one.hospital: one.update.tolist() for one in play.round(number, shuffle=shuffle)
            }
            seen.append((number, replies, play.fates(number)))
        return sorted(seen, key=lambda one: one[0])

    first = outcome("a", 1, shuffle=None)
    assert outcome("b", 1, shuffle=5) == first
    assert outcome("c", 2, shuffle=None) != first


@pytest.mark.parametrize(("when", "fate"), [("before", Fate.SILENT), ("after", Fate.LOST)])
def test_dropouts_lose_the_reply_and_only_late_ones_the_work(
    stage: Callable[..., Scene], when: str, fate: Fate
) -> None:
    play = Play(stage(dropouts={"probability": 0.3, "when": when}, rounds=60))
    silent = 0
    for number in range(60):
        play.worked.clear()
        answered = {one.hospital for one in play.round(number)}
        gone = {name for name, one in play.fates(number).items() if one is fate}
        assert len(answered) + len(gone) == HOSPITALS
        assert len(play.worked) == (len(answered) if when == "before" else HOSPITALS)
        silent += len(gone)
    assert 0.25 < silent / 600 < 0.35  # five standard deviations are 0.09; the seed is fixed


def test_who_is_late_is_not_there_before_its_round(stage: Callable[..., Scene]) -> None:
    play = Play(stage(late={"hospitals": 3, "from_round": 3}))
    greeted, answered = [], []
    for number in range(4):
        greeted.append(play.present())  # as the coordinator does before each round
        answered.append(len(play.round(number)))
    assert answered == [7, 7, 10, 10]
    assert greeted == [7, 7, 10, 10]


def test_an_interrupted_scene_knows_which_round_comes_next(stage: Callable[..., Scene]) -> None:
    play = Play(stage(late={"hospitals": 3, "from_round": 3}))
    play.round(0)
    play.round(1)
    resumed = Play(stage(late={"hospitals": 3, "from_round": 3}))
    assert resumed.present() == 10
    # A crash before the checkpoint: the last round is asked again, and means the same.
    assert len(resumed.round(1)) == 7


def test_replies_come_in_the_order_of_the_virtual_clock_and_not_after_the_deadline(
    stage: Callable[..., Scene],
) -> None:
    play = Play(slow(stage, deadline_s=0.6))
    seen = set()
    for number in range(6):
        order = [one.hospital for one in play.round(number)]
        exchange = play.scene.traffic.exchanges["finetune", number + 1, 0, "train"]
        visits = exchange.visits
        arrivals = [visits[name].arrival_s or 0.0 for name in order]
        assert arrivals == sorted(arrivals)
        assert all(one <= 0.6 for one in arrivals)
        late = {name for name, one in visits.items() if one.fate is Fate.LATE}
        assert late == visits.keys() - set(order)
        assert all((visits[name].arrival_s or 0.0) > 0.6 for name in late)
        assert exchange.duration_s == (0.6 if late else pytest.approx(max(arrivals)))
        seen |= {len(late)}
    assert len(seen) > 1  # some rounds had late ones, and not the same number
    assert len(play.worked) == 60  # who is late has done its work


def test_time_is_latency_line_and_work() -> None:
    network = NetworkSpec(
        uplink_mbit_s=1.0, downlink_mbit_s=8.0, latency_ms=100.0, records_per_s=50.0
    )
    plain = Clock(0, network, None)
    down, up = Parcel(1_000_000, 5), Parcel(125_000, 3)
    # 8 requests of 0.1 s, 8 Mbit at 8, 1 Mbit at 1, 100 records at 50 a second.
    assert plain.arrival_s("north", "r", down, up, 100) == pytest.approx(0.8 + 1 + 1 + 2)
    slow = replace(plain, stragglers=StragglersSpec(spread=1.0))
    times = [slow.arrival_s(f"h{one}", "r", down, up, 100) - 2.8 for one in range(400)]
    assert sorted(times)[200] == pytest.approx(2.0, rel=0.2)  # the median hospital is as said
    assert slow.arrival_s("h1", "r", down, up, 100) == slow.arrival_s("h1", "q", down, up, 100)


def test_forecast_bytes_are_those_of_the_messages(stage: Callable[..., Scene]) -> None:
    play = Play(stage(participation={"hospitals": 6}))
    for number in range(3):
        play.round(number)

    def packed(messages: list[Message]) -> int:
        return sum(
            len(part.deflate())
            for one in messages
            for part in get_all_nested_objects(one.content).values()
        )

    found = play.scene.facts()["forecast"]
    assert len(play.sent) == 18
    assert found["bytes_down"] == packed(play.sent)
    assert found["bytes_up"] == packed(play.given)
    assert found["bytes_down"] > 18 * 4 * 300  # the model at least
    assert found["duration_s"] == pytest.approx(sum(one["duration_s"] for one in found["rounds"]))
    for key in ("bytes_down", "bytes_up"):
        assert found[key] == sum(one[key] for one in found["rounds"])
        assert found[key] == sum(one[key] for one in found["hospitals"].values())


def test_traffic_survives_a_cut_line_and_a_repeated_round(stage: Callable[..., Scene]) -> None:
    play = Play(stage())
    for number in range(3):
        play.round(number)
    path = play.scene.traffic.path
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:60])
    resumed = Play(stage())
    resumed.round(2)
    assert resumed.scene.facts() == play.scene.facts()
    assert path.read_bytes() == whole
    assert (
        forecast(Traffic.open(path).exchanges.values(), NetworkSpec())
        == play.scene.facts()["forecast"]
    )


@pytest.mark.parametrize(
    ("attack", "factor"),
    [
        ({"kind": "sign_flip"}, -1.0),
        ({"kind": "sign_flip", "factor": 3.0}, -3.0),
        ({"kind": "scale"}, 10.0),
    ],
)
def test_attackers_change_their_own_update_as_said(
    stage: Callable[..., Scene], attack: dict[str, Any], factor: float
) -> None:
    play = Play(stage(attack={**attack, "hospitals": ["hospital-03", "hospital-07"]}))
    for one in play.round(0):
        number = float(one.hospital.removeprefix("hospital-"))
        changed = factor if number in (3, 7) else 1.0
        assert one.update.tolist() == [changed * number] * 5


def test_a_wrong_vector_has_its_length_and_no_part_of_the_truth(
    stage: Callable[..., Scene],
) -> None:
    play = Play(stage(attack={"kind": "wrong_vector", "hospitals": 1, "factor": 4.0}))
    updates = {one.hospital: one.update for one in play.round(0)}
    wrong = {name: one for name, one in updates.items() if len(set(one.tolist())) > 1}
    assert len(wrong) == 1
    ((name, update),) = wrong.items()
    honest = float(name.removeprefix("hospital-")) * 5**0.5
    assert float(update.norm()) == pytest.approx(4 * honest, rel=1e-5)
    later = {one.hospital: one.update for one in play.round(1)}[name]
    assert not torch.equal(later, update)


def test_a_failing_hospital_is_told_from_one_that_is_away(stage: Callable[..., Scene]) -> None:
    scene = stage()

    def failing(messages: list[Message]) -> Iterator[Message]:
        from flwr.app import Error

        return (Message(Error(code=1, reason="failed"), reply_to=one) for one in messages)

    play = Play(scene)
    play.backend = scene.over(failing)
    assert play.round(0) == []
    assert set(play.fates(0).values()) == {Fate.FAILED}


def test_studies_alike_but_for_the_scenario_ask_the_same(stage: Callable[..., Scene]) -> None:
    def digest(study: Study) -> str:
        return study.digest()

    assert digest(stage("a").study) == digest(stage("b", dropouts={"probability": 0.2}).study)
