"""A Flower grid without a network: a round's messages go straight to the hospitals in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from copy import deepcopy
from itertools import count

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Backend = Callable[[list[Message]], Iterator[Message]]
"""Runs a whole round: messages in, a reply to each out, in any order."""

_CLIENT_FAILED = 1


class InProcessGrid(Grid):
    """Hands each batch of messages to ``backend`` at once and gives back its replies."""

    def __init__(self, nodes: int, backend: Backend) -> None:
        self._nodes = list(range(1, nodes + 1))
        self._backend = backend
        self._run = Run.create_empty(run_id=1)
        self._numbers = count(1)
        self._replies: dict[str, Iterator[Message]] = {}
        self._ready: dict[str, Message] = {}
        # Flower stamps messages with the identity of the process's task; this process is it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self._run.run_id, 0, 1

    def set_run(self, run: Run) -> None:
        """Set the run, as Flower's own grids do."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message; Flower prefers the constructor itself."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All hospitals, numbered from 1."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue one batch; it runs while its replies are pulled."""
        batch = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
            batch.append(message)
        ids = [message.metadata.message_id for message in batch]
        replies = self._backend(batch)
        self._replies.update(dict.fromkeys(ids, replies))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The next reply to any of ``message_ids``; one at a time, so that sums stream.

        A set or a dictionary's keys are taken as they are, so that a pull costs the same however
        many are waited for.
        """
        wanted = message_ids if isinstance(message_ids, Set) else dict.fromkeys(message_ids).keys()
        ready = next((one for one in self._ready if one in wanted), None)
        if ready is not None:
            return [self._ready.pop(ready)]
        for one in wanted:
            for reply in self._replies.get(one, iter(())):
                answered = reply.metadata.reply_to_message_id
                self._replies.pop(answered, None)
                if answered in wanted:
                    return [reply]
                self._ready[answered] = reply
        return []

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002
    ) -> Iterable[Message]:
        """All replies at once."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting and (arrived := list(self.pull_messages(waiting))):
            waiting -= {one.metadata.reply_to_message_id for one in arrived}
            replies += arrived
        return replies


def one_by_one(handle: Callable[[Message], Message], *, debug: bool = False) -> Backend:
    """The plain backend: each hospital in turn; a failing one answers with an error, by name.

    Every hospital gets a copy of its own, as over a network: one that changes what it was sent
    changes nobody else's. (Arrays travel as immutable bytes, so a copy is cheap.) ``debug`` lets
    the first failure through instead.
    """

    def run(messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            try:
                reply = handle(deepcopy(message))
            except Exception as error:
                if debug:
                    raise
                reason = f"{type(error).__name__}: {error}"
                reply = Message(Error(code=_CLIENT_FAILED, reason=reason), reply_to=message)
            yield reply

    return run
