"""What a failing round leaves in the hospital's log, and what it tells the coordinator."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.metadata import Metadata

from client.app import build_client_app
from client.hospital import Hospital
from common.errors import DataError, RefusalError
from common.flower import pack
from common.wire import Hello

CELL = "CANARY-CELL-77"


def ask(error: Exception, asked: list[str]) -> Message:
    @contextmanager
    def opened(_context: Context, digest: str) -> Iterator[Hospital]:
        asked.append(digest)
        raise error
        yield  # pragma: no cover

    metadata = Metadata(1, "m", 0, 1, "", "", 0.0, 60.0, "query.hello")
    message = Message(content=pack(Hello(study_digest="d" * 64)), metadata=metadata)
    reply = build_client_app(opened)(message, Context(1, 1, {}, RecordDict(), {}))
    assert isinstance(reply, Message)
    return reply


@pytest.mark.parametrize(
    ("error", "logged", "told"),
    [
        (DataError(f"row 3: {CELL}"), "DataError", "failed (DataError); see the hospital's log"),
        (ValueError(CELL), "ValueError", "failed (ValueError); see the hospital's log"),
        (
            RefusalError("budget.delta: expected 1, found 2", rule="budget.delta"),
            "budget.delta: expected 1, found 2",
            "refused by rule budget.delta",
        ),
    ],
)
def test_a_cell_is_in_no_log_and_no_answer(
    error: Exception, logged: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked: list[str] = []
    reply = ask(error, asked)
    assert asked == ["d" * 64]  # the message says which study to open
    assert reply.error.reason == told
    assert caplog.messages == [f"query.hello: {logged}"]
    assert CELL not in caplog.text


def test_a_message_that_cannot_be_read_opens_no_hospital() -> None:
    asked: list[str] = []
    app = build_client_app(lambda _, digest: asked.append(digest))  # type: ignore[arg-type,return-value,func-returns-value]
    metadata = Metadata(1, "m", 0, 1, "", "", 0.0, 60.0, "query.hello")
    reply = app(
        Message(content=RecordDict(), metadata=metadata), Context(1, 1, {}, RecordDict(), {})
    )
    assert reply.error.reason == "failed (MessageError); see the hospital's log"
    assert asked == []
