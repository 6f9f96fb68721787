"""Each message's answer leaves before the next message comes, whatever was left behind before."""

from __future__ import annotations

import inspect
import threading
import time
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as loop
from flwr.supernode.nodestate import NodeStateFactory

from client.supernode import Exchange


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 0, 1


def asked(number: int) -> Message:
    content = RecordDict({"values": ConfigRecord({"x": number})})
    message = Message(content, dst_node_id=5, message_type="train")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


class Node:
    """A SuperNode's state, and what it sent."""

    def __init__(self) -> None:
        self.store = ObjectStoreFactory()
        self.state = NodeStateFactory(objectstore_factory=self.store).state()
        self.sent: list[str] = []

    def answer(self, message: Message) -> None:
        reply = Message(RecordDict({"values": ConfigRecord({"y": 1})}), reply_to=message)
        loop._insert_message(reply, self.state, self.store.store())

    def send(self, message: Message, _tree: Any, _runtime: float) -> tuple[set[str], str]:
        self.sent.append(message.metadata.reply_to_message_id)
        return set(), ""

    def push(self, push: Any) -> None:
        push(
            state=self.state,
            object_store=self.store.store(),
            send=self.send,
            push_object=lambda *_: None,
        )


def late_answer(node: Node, message: Message) -> None:
    def act() -> None:
        time.sleep(1.2)
        node.answer(message)

    threading.Thread(target=act).start()


def pulled(message: Message) -> Any:
    return lambda receive, **_: receive() and 7


def test_the_wait_is_for_the_message_that_was_pulled() -> None:
    node, left_behind, now = Node(), asked(1), asked(2)
    node.answer(left_behind)
    exchange = Exchange(pulled(now), loop._push_messages)
    assert exchange.pull(receive=lambda: (now, get_object_tree(now))) == 7
    late_answer(node, now)
    node.push(exchange.push)
    assert node.sent == [left_behind.metadata.message_id, now.metadata.message_id]


class Clock:
    """Time that passes in sleep alone."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, [0.0]

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


def test_it_asks_often_while_a_study_is_under_way_and_ever_less_often_afterwards() -> None:
    clock, answers = Clock(), iter([None, 7])
    exchange = Exchange(
        lambda receive, **_: next(answers, None),
        loop._push_messages,
        clock=lambda: clock.now,
        sleep=clock.sleep,
    )
    assert exchange.pull(receive=lambda: None) is None  # idle from the start: Flower's own pace
    assert clock.slept == [0.0]
    assert exchange.pull(receive=lambda: None) == 7
    assert exchange.pull(receive=lambda: None) is None
    waits = clock.slept[1:]
    assert waits[:8] == [0.5] * 8  # a message that follows soon is met soon
    assert waits == sorted(waits)
    assert 2.5 < waits[-1] <= 3.0  # from here on every three seconds, as Flower does
    assert len(waits) < 25


def test_after_an_answer_it_asks_often_again_however_long_the_answer_took() -> None:
    clock, node, now = Clock(), Node(), asked(1)
    answers = iter([7])
    exchange = Exchange(
        lambda receive, **_: (receive(), next(answers, None))[1],
        loop._push_messages,
        clock=lambda: clock.now,
        sleep=clock.sleep,
    )
    assert exchange.pull(receive=lambda: (now, get_object_tree(now))) == 7
    clock.now += 600.0
    node.answer(now)
    node.push(exchange.push)
    assert exchange.pull(receive=lambda: None) is None
    assert clock.slept[1] == 0.5


def test_flowers_own_loop_would_not_have_waited() -> None:
    """When this fails, Flower has mended it, and ``client/supernode.py`` can go."""
    node, left_behind, now = Node(), asked(1), asked(2)
    node.answer(left_behind)
    late_answer(node, now)
    node.push(loop._push_messages)
    assert node.sent == [left_behind.metadata.message_id]
    time.sleep(1.5)


def test_the_loop_is_called_as_the_replacement_expects() -> None:
    text = inspect.getsource(loop.start_client_internal)
    for name, step in (
        ("_pull_and_store_message", loop._pull_and_store_message),
        ("_push_messages", loop._push_messages),
    ):
        call = text.split(f"{name}(")[1].split(")")[0]
        for parameter in inspect.signature(step).parameters:
            assert f"{parameter}={parameter}" in call or f"{parameter}=" in call, (name, parameter)
