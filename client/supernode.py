"""Flower's SuperNode with one of its loops mended: each message waits for its own answer.

Flower's loop pulls a message, then waits for *an* answer and sends it. Where a run ends, or the
SuperLink goes away, while a message is being fetched, the task stays behind and is answered later:
from then on every answer leaves one message late, for ever. Here answers that nobody waits for are
sent as well, and the wait goes on until the message just pulled is answered.

A SuperNode that was killed still counts as online, and its successor is turned away for up to a
minute; here the successor signs its predecessor off first.

It also asks for messages more often than every three seconds as long as a study is under way (a
round of a secure sum is five messages), and ever less often the longer none has come.

``python -m client.supernode …`` takes what ``flower-supernode`` takes.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode import start_client_internal as loop
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

# The package of this name shows its function of the same name instead.
supernode_cli: Any = import_module("flwr.supernode.cli.flower_supernode")

Pull = Callable[..., int | None]
Push = Callable[..., None]


# Looks cost the SuperLink more than anything else: waits are an eighth of the silence so far.
_SHORTEST_WAIT_S, _LONGEST_WAIT_S, _SHARE = 0.5, 3.0, 8  # the longest is Flower's own


class Exchange:
    """The two steps of Flower's loop, in step with each other."""

    def __init__(
        self,
        pull: Pull,
        push: Push,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``pull``, ``push``: Flower's own steps."""
        self._pull, self._push, self._clock, self._sleep = pull, push, clock, sleep
        self._waiting = ""
        self._last = -math.inf

    def pull(self, *, receive: Callable[[], Any], **rest: Any) -> int | None:
        """Fetch a message, and note which; None when none came and none is likely soon."""

        def noted() -> Any:
            received = receive()
            if received is not None:
                self._waiting = received[0].metadata.message_id
            return received

        while True:
            run_id = self._pull(receive=noted, **rest)
            now = self._clock()
            if run_id is not None:
                self._last = now
                return run_id
            wait_s = (now - self._last) / _SHARE
            if wait_s > _LONGEST_WAIT_S:
                return None
            self._sleep(max(_SHORTEST_WAIT_S, wait_s))

    def push(self, *, state: Any, **rest: Any) -> None:
        """Send all answers there are until the noted message's is among them."""
        seen = _Seen(state)
        while self._waiting not in seen.answered:
            self._push(state=seen, **rest)
        self._last = self._clock()  # the next message follows an answer, however long that took


def sign_off(arguments: argparse.Namespace, remembered: Path) -> None:
    """End what is left of a predecessor's connection, as it would have done itself.

    Nothing depends on it: whatever goes wrong, the SuperLink forgets it after a minute.
    """
    try:
        node_id = int(remembered.read_text())
        keys = supernode_cli._try_setup_client_authentication(arguments)
        roots = Path(arguments.root_certificates).read_bytes()
        interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperNode")]
        with FleetHttpClient.from_server_address(
            arguments.superlink,
            insecure=False,
            root_certificates=roots,
            interceptors=[*interceptors, *([NodeAuthHttpInterceptor(*keys)] if keys else [])],
        ) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    except (OSError, ValueError, httpx.HTTPError, RuntimeError):
        return


class _Seen:
    """A node's state that remembers which messages' answers were taken out of it."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.answered: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_messages_legacy(self, **choice: Any) -> Sequence[Message]:
        """See Flower's ``NodeState``."""
        found: Sequence[Message] = self._state.get_messages_legacy(**choice)
        self.answered |= {one.metadata.reply_to_message_id for one in found}
        return found


def main() -> None:
    """Run the SuperNode. ``$FLWR_HOME/node-id`` remembers which node it was."""
    remembered = Path(os.environ["FLWR_HOME"]) / "node-id"
    sign_off(supernode_cli._parse_args_run_supernode().parse_args(), remembered)
    exchange = Exchange(loop._pull_and_store_message, loop._push_messages)
    begin = loop._init_connection

    @contextmanager
    def remembering(**settings: Any) -> Iterator[Any]:
        with begin(**settings) as connection:
            remembered.write_text(str(connection[0]))
            yield connection

    loop._init_connection = remembering  # type: ignore[assignment]
    loop._pull_and_store_message = exchange.pull  # type: ignore[assignment]
    loop._push_messages = exchange.push  # type: ignore[assignment]
    supernode_cli.flower_supernode()


if __name__ == "__main__":
    main()
