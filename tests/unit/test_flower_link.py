"""The link to enrolled hospitals: who is asked, who is believed, what is sent again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from common.errors import RunError
from common.flower import NODE_UNAVAILABLE, pack
from common.wire import Hello, HelloReply, TrainReply, TrainTask
from server import flower_link
from server.flower_link import Enrolled, GridLink
from simulations.grid import InProcessGrid

NAMES = {1: "north", 2: "south", 3: "east"}
TASK = TrainTask(
    study_digest="d",
    stage="finetune",
    round=0,
    attempt=0,
    teacher={},
    student={},
    scaling=torch.zeros(0, 2),
)
HELLO = Hello(study_digest="d")
Answer = Callable[[int], Any]


def greeting(node: int, name: str | None = None) -> HelloReply:
    return HelloReply(
        hospital=name or NAMES[node],
        study_digest="d",
        declared_patients=10,
        secret_noise=True,
        identity="",
    )


def update(node: int) -> TrainReply:
    return TrainReply(
        hospital=NAMES[node], stage="finetune", round=0, update=torch.full((2,), float(node))
    )


class World(InProcessGrid):
    """Hospitals that can be away, lose what they were sent, or start anew."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(len(NAMES), lambda messages: iter(self.act(messages)))
        self.answer = answer
        self.now = datetime.now(UTC)
        self.since = dict.fromkeys(NAMES, self.now - timedelta(hours=1))
        self.loses: set[int] = set()
        self.received: list[int] = []
        self.most_pulled = 0

    def act(self, messages: list[Message]) -> Iterable[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            self.received.append(node)
            if node in self.loses:
                self.loses.discard(node)
                continue
            given = self.answer(node)
            yield Message(given if isinstance(given, Error) else pack(given), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        self.most_pulled = max(self.most_pulled, len(ids))
        return super().pull_messages(ids)

    def link(self, *, timeout_s: float = 5.0, minimum: int = 2) -> GridLink:
        return GridLink(
            self,
            minimum_nodes=minimum,
            timeout_s=timeout_s,
            enrolled=Enrolled(NAMES, lambda: dict(self.since)),
        )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_link, "_RESEND_CHECK_S", 0.05)
    monkeypatch.setattr(flower_link, "_ASSEMBLY_S", 0.2)
    monkeypatch.setattr(flower_link, "_LONGEST_POLL_S", 0.05)


def test_only_hospitals_of_the_study_that_are_there_are_asked() -> None:
    world = World(update)
    link = world.link()
    world.since = {node: since for node, since in world.since.items() if node != 2} | {
        99: world.now
    }
    assert {one.hospital for one in link.ask("train", TASK, TrainReply)} == {"north", "east"}
    assert sorted(world.received) == [1, 3]


def test_who_calls_itself_by_anothers_name_is_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    world = World(lambda node: greeting(node, "north" if node == 2 else None))
    found = [one.hospital for one in world.link().greet(HELLO)]
    assert sorted(found) == ["east", "north"]
    assert "south calls itself 'north'" in caplog.text


def test_what_a_restarted_hospital_lost_is_sent_again() -> None:
    world = World(update)
    link = world.link()
    world.loses = {3}
    replies = []
    for one in link.ask("train", TASK, TrainReply):
        replies.append(one.hospital)
        if len(replies) == 2:  # the SuperNode of "east" comes back with an empty memory
            world.since[3] = datetime.now(UTC) + timedelta(seconds=2)
    assert sorted(replies) == ["east", "north", "south"]
    assert world.received.count(3) == 2


def test_two_replies_to_a_message_sent_twice_may_arrive_together() -> None:
    class Together(World):
        """Keeps every message to hospital 3 until there are two, and then answers both at once."""

        kept: list[Message] = []

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            sent = list(messages)
            ids = list(
                super().push_messages([one for one in sent if one.metadata.dst_node_id != 3])
            )
            for place, message in enumerate(sent):
                if message.metadata.dst_node_id == 3:
                    message.metadata.__dict__["_message_id"] = f"kept {len(self.kept)}"
                    self.kept.append(message)
                    ids.insert(place, message.metadata.message_id)
                    self.since[3] = datetime.now(UTC) + timedelta(seconds=2)  # it starts anew
            return ids

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            ids = list(message_ids)
            mine = [one for one in self.kept if one.metadata.message_id in ids]
            if len(mine) < 2:
                return super().pull_messages(ids)
            return [Message(pack(update(3)), reply_to=one) for one in mine]

    replies = [one.hospital for one in Together(update).link().ask("train", TASK, TrainReply)]
    assert sorted(replies) == ["east", "north", "south"]


def test_one_that_is_only_slow_is_not_asked_twice() -> None:
    world = World(update)
    link = world.link(timeout_s=0.5)
    world.loses = {3}
    assert {one.hospital for one in link.ask("train", TASK, TrainReply)} == {"north", "south"}
    assert world.received.count(3) == 1


def test_one_that_went_away_is_waited_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Error(code=NODE_UNAVAILABLE, reason="no heartbeat")
    first = {3}

    def answer(node: int) -> Any:
        if node in first:
            first.discard(node)
            world.since[node] = datetime.now(UTC) + timedelta(seconds=2)  # it is back at once
            return away
        return update(node)

    world = World(answer)
    found = [one.hospital for one in world.link().ask("train", TASK, TrainReply)]
    assert sorted(found) == ["east", "north", "south"]


def test_one_that_stays_away_is_given_up_before_the_round_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flower_link, "_RETURN_S", 0.2)
    away = Error(code=NODE_UNAVAILABLE, reason="no heartbeat")
    world = World(lambda node: away if node == 3 else update(node))
    begun = time.monotonic()
    found = [one.hospital for one in world.link(timeout_s=30).ask("train", TASK, TrainReply)]
    assert sorted(found) == ["north", "south"]
    assert time.monotonic() - begun < 10
    assert "train: east is away" in caplog.text


def test_failures_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    refusal = Error(code=1, reason="refused by rule budget.epsilon_lifetime")
    world = World(lambda node: refusal if node == 1 else update(node))
    found = [one.hospital for one in world.link().ask("train", TASK, TrainReply)]
    assert sorted(found) == ["east", "south"]
    assert "north: refused by rule budget.epsilon_lifetime" in caplog.text


def test_few_replies_are_held_at_once() -> None:
    world = World(update)
    list(world.link().ask("train", TASK, TrainReply))
    assert world.most_pulled <= 4


def test_newcomers_are_greeted_once_and_again_after_a_restart() -> None:
    world = World(greeting)
    del world.since[3]
    link = world.link()
    assert {one.hospital for one in link.greet(HELLO)} == {"north", "south"}
    assert list(link.greet(HELLO)) == []
    world.since[3] = world.now
    assert {one.hospital for one in link.greet(HELLO)} == {"east"}
    world.since[1] = world.now + timedelta(minutes=1)
    assert {one.hospital for one in link.greet(HELLO)} == {"north"}


def test_one_that_was_silent_is_greeted_again() -> None:
    world = World(greeting)
    link = world.link(timeout_s=0.5)
    world.loses = {2}
    assert {one.hospital for one in link.greet(HELLO)} == {"north", "east"}
    assert {one.hospital for one in link.greet(HELLO)} == {"south"}
    assert list(link.greet(HELLO)) == []


def test_a_study_waits_for_all_and_goes_on_with_enough() -> None:
    world = World(greeting)
    del world.since[3]
    assert len(list(world.link(minimum=2).greet(HELLO))) == 2
    with pytest.raises(RunError, match="at least 3 hospitals to connect.*found 2"):
        world.link(minimum=3)
