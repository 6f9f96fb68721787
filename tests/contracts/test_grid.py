"""The in-process grid keeps the promises of Flower's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from simulations.grid import InProcessGrid, one_by_one


def content(value: float = 1.0) -> RecordDict:
    return RecordDict(
        {
            "values": ConfigRecord({"x": value}),
            "arrays": ArrayRecord({"w": Array(np.full(3, value, np.float32))}),
        }
    )


def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def batch(grid: Grid, shared: RecordDict | None = None) -> list[Message]:
    return [
        Message(shared or content(), dst_node_id=node, message_type="train")
        for node in grid.get_node_ids()
    ]


def collect(grid: Grid, ids: set[str]) -> list[Message]:
    replies: list[Message] = []
    while ids and (arrived := list(grid.pull_messages(ids))):
        ids -= {one.metadata.reply_to_message_id for one in arrived}
        replies += arrived
    return replies


def test_it_is_a_grid_with_nothing_left_abstract() -> None:
    grid = InProcessGrid(3, one_by_one(echo))
    assert isinstance(grid, Grid)
    assert not inspect.isabstract(InProcessGrid)
    for name, member in inspect.getmembers(Grid):
        if getattr(member, "__isabstractmethod__", False):
            assert getattr(InProcessGrid, name) is not member, name
            if callable(member):
                ours = inspect.signature(getattr(InProcessGrid, name)).parameters
                for parameter in inspect.signature(member).parameters:
                    assert parameter in ours, f"{name}({parameter})"
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert grid.run.run_id == 1


def test_every_message_gets_its_reply() -> None:
    grid = InProcessGrid(4, one_by_one(echo))
    ids = list(grid.push_messages(batch(grid)))
    assert len(set(ids)) == 4
    replies = collect(grid, set(ids))
    assert {one.metadata.reply_to_message_id for one in replies} == set(ids)
    assert {one.metadata.src_node_id for one in replies} == {1, 2, 3, 4}
    assert list(grid.pull_messages(ids)) == []  # each reply is given once


def test_replies_stream_one_by_one() -> None:
    """A round's replies are never all held: the second is made after the first was taken."""
    made: list[int] = []

    def backend(messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            made.append(message.metadata.dst_node_id)
            yield echo(message)

    grid = InProcessGrid(3, backend)
    ids = set(grid.push_messages(batch(grid)))
    for count in (1, 2, 3):
        arrived = list(grid.pull_messages(ids))
        assert len(arrived) == 1
        assert len(made) == count


def test_replies_may_come_in_any_order_and_be_asked_for_in_any() -> None:
    def backwards(messages: list[Message]) -> Iterator[Message]:
        yield from (echo(message) for message in reversed(messages))

    grid = InProcessGrid(3, backwards)
    first, second, third = grid.push_messages(batch(grid))
    assert [one.metadata.reply_to_message_id for one in grid.pull_messages([second])] == [second]
    assert {one.metadata.reply_to_message_id for one in collect(grid, {first, third})} == {
        first,
        third,
    }


def test_two_batches_do_not_mix() -> None:
    grid = InProcessGrid(2, one_by_one(echo))
    first = set(grid.push_messages(batch(grid)))
    second = set(grid.push_messages(batch(grid)))
    assert not first & second
    assert {one.metadata.reply_to_message_id for one in collect(grid, set(second))} == second
    assert {one.metadata.reply_to_message_id for one in collect(grid, set(first))} == first


def test_a_failing_hospital_answers_with_its_error() -> None:
    def handle(message: Message) -> Message:
        if message.metadata.dst_node_id == 2:
            raise ValueError("the disk is full")
        return echo(message)

    grid = InProcessGrid(3, one_by_one(handle))
    replies = {one.metadata.src_node_id: one for one in grid.send_and_receive(batch(grid))}
    assert replies[2].has_error()
    assert replies[2].error.reason == "ValueError: the disk is full"
    assert not replies[1].has_error()
    assert not replies[3].has_error()
    loud = InProcessGrid(3, one_by_one(handle, debug=True))
    with pytest.raises(ValueError, match="disk is full"):
        list(loud.send_and_receive(batch(loud)))


def test_a_hospital_that_changes_its_message_changes_no_other() -> None:
    seen: list[float] = []

    def vandal(message: Message) -> Message:
        values = message.content["values"]
        assert isinstance(values, ConfigRecord)
        seen.append(float(values["x"]))  # type: ignore[arg-type]
        values["x"] = 666.0
        message.content["arrays"] = ArrayRecord()
        return Message(content(2.0), reply_to=message)

    grid = InProcessGrid(3, one_by_one(vandal))
    shared = content(1.0)
    replies = list(grid.send_and_receive(batch(grid, shared)))
    assert len(replies) == 3
    assert seen == [1.0, 1.0, 1.0]
    assert shared["values"]["x"] == 1.0  # type: ignore[index]
    assert "w" in shared["arrays"]  # type: ignore[operator]
