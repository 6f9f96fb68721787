"""The coordinator's link to hospitals over a Flower grid: in memory, or a SuperLink's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import MessageError, RunError
from common.flower import NODE_UNAVAILABLE, pack, read
from common.wire import Hello, HelloReply

Reply = TypeVar("Reply")

_logger = logging.getLogger(__name__)

_MESSAGE_TYPES = {
    "hello": "query.hello",
    "statistics": "query.statistics",
    "train": "train",
    "evaluate": "evaluate",
    "aggregate.begin": "train.aggregate",
    "aggregate.step": "query.aggregate",
}
_POLL_S, _LONGEST_POLL_S = 0.02, 0.5
_ASSEMBLY_S = 60.0  # how long a study waits for all its hospitals before it goes on with enough
_GREETING_S = 20.0
_PULLED_AT_ONCE = 4  # replies held in memory together, whatever the number of hospitals
_RESEND_CHECK_S = 2.0
_RETURN_S = 20.0  # how long a hospital that went away is waited for: its software may be restarting
_SLACK = timedelta(seconds=1)


class Timer(Protocol):
    """How time passes for a link: the machine's, or a simulation's."""

    def now(self) -> datetime:
        """The time of day, in UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds since some moment; never set back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...


class WallTimer:
    """The machine's own time."""

    def now(self) -> datetime:
        """See ``Timer``."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """See ``Timer``."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See ``Timer``."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Enrolled:
    """The hospitals of a deployed study.

    ``names``: of each node, as enrolled: what a hospital calls itself must agree. ``activations``:
    of each node that is online, when its software started last; what was sent before is lost.
    """

    names: Mapping[int, str]
    activations: Callable[[], Mapping[int, datetime]]


@dataclass
class _Waiting:
    """What was sent to a node and not answered yet."""

    node: int
    content: RecordDict
    sent_at: datetime
    ids: set[str] = field(default_factory=set)
    away_until: float | None = None  # on the monotonic clock: then it is given up


class GridLink:
    """Asks hospitals over Flower's grid and gives their replies as they come (see ``Link``).

    ``enrolled``: None in a simulation, whose nodes are all there and name themselves.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        minimum_nodes: int,
        timeout_s: float,
        enrolled: Enrolled | None = None,
        timer: Timer | None = None,
    ) -> None:
        """Waits for the hospitals. Raises RunError when too few come."""
        self._grid = grid
        self._timer = timer or WallTimer()
        self._timeout_s = timeout_s
        self._enrolled = enrolled
        self._node_of: dict[str, int] = {}
        self._greeted: dict[int, datetime | None] = {}
        self._assemble(minimum_nodes)

    def greet(self, task: Hello) -> Iterator[HelloReply]:
        """Hello to hospitals not greeted since their software started; what they say of themselves.

        Cheap when nobody is new, so that it can come before every round.
        """
        new = {
            node: since
            for node, since in self._online().items()
            if node not in self._greeted or self._greeted[node] != since
        }
        # At the start everybody counts; later on, newcomers must not hold up the others' round.
        timeout_s = min(self._timeout_s, _GREETING_S) if self._node_of else self._timeout_s
        contents = dict.fromkeys(sorted(new), pack(task))
        for node, reply in self._exchange("hello", contents, HelloReply, timeout_s):
            self._node_of[reply.hospital] = node
            self._greeted[node] = new[node]  # one that was silent is greeted again
            yield reply

    def ask(self, action: str, task: Any, kind: type[Reply]) -> Iterator[Reply]:
        """Replies of every node that answers in time; failures are logged and left out."""
        contents = dict.fromkeys(sorted(self._online()), pack(task))
        for _, reply in self._exchange(action, contents, kind, self._timeout_s):
            yield reply

    def ask_each(self, action: str, tasks: Mapping[str, Any], kind: type[Reply]) -> Iterator[Reply]:
        """The same, each hospital with a task of its own; it is known by the node of its Hello."""
        contents = {self._node_of[name]: pack(task) for name, task in tasks.items()}
        for _, reply in self._exchange(action, contents, kind, self._timeout_s):
            yield reply

    def _exchange(
        self, action: str, contents: Mapping[int, RecordDict], kind: type[Reply], timeout_s: float
    ) -> Iterator[tuple[int, Reply]]:
        waiting = {
            node: _Waiting(node, content, self._timer.now()) for node, content in contents.items()
        }
        owner: dict[str, _Waiting] = {}
        self._send(action, waiting.values(), owner)
        deadline, check = (
            self._timer.monotonic() + timeout_s,
            self._timer.monotonic() + _RESEND_CHECK_S,
        )
        pause_s = _POLL_S
        while waiting and self._timer.monotonic() < deadline:
            arrived = self._arrived(owner)
            for message in arrived:
                answered = message.metadata.reply_to_message_id
                one = owner.pop(answered, None)
                if one is None:  # the other reply to a message sent twice came just before
                    continue
                if self._is_away(message):
                    one.ids.discard(answered)
                    one.away_until = one.away_until or self._timer.monotonic() + _RETURN_S
                elif waiting.pop(one.node, None):
                    for other in one.ids:
                        owner.pop(other, None)
                    reply = self._read(one.node, message, kind)
                    if reply is not None:
                        yield one.node, reply
            pause_s = _POLL_S if arrived else min(pause_s * 1.5, _LONGEST_POLL_S)
            if not arrived:
                self._timer.sleep(pause_s)
            if self._enrolled is None:
                continue
            if self._timer.monotonic() > check:
                self._send_again(action, waiting.values(), owner)
                check = self._timer.monotonic() + _RESEND_CHECK_S
            for one in [one for one in waiting.values() if self._is_given_up(action, one)]:
                del waiting[one.node]
        if waiting:
            nodes = ", ".join(self._called(node) for node in waiting)
            _logger.warning("%s: no answer in time from %s", action, nodes)

    def _arrived(self, owner: Mapping[str, _Waiting]) -> list[Message]:
        """Some replies that are there; few at a time, since each may hold a whole model."""
        if self._enrolled is None:
            return list(self._grid.pull_messages(owner.keys()))  # one at a time, by its nature
        ids = list(owner)
        for start in range(0, len(ids), _PULLED_AT_ONCE):
            if found := list(self._grid.pull_messages(ids[start : start + _PULLED_AT_ONCE])):
                return found
        return []

    def _send(self, action: str, waiting: Collection[_Waiting], owner: dict[str, _Waiting]) -> None:
        messages = [
            Message(content=one.content, dst_node_id=one.node, message_type=_MESSAGE_TYPES[action])
            for one in waiting
        ]
        for one, one_id in zip(waiting, self._grid.push_messages(messages), strict=True):
            one.sent_at = self._timer.now()
            if one_id:  # Flower gives none for a message it did not take
                one.ids.add(one_id)
                owner[one_id] = one

    def _send_again(
        self, action: str, waiting: Collection[_Waiting], owner: dict[str, _Waiting]
    ) -> None:
        """What a hospital's software lost by starting anew is sent again.

        That is safe: a hospital answers a repeated request from its store, or refuses it.
        """
        assert self._enrolled is not None  # noqa: S101  (a simulation's hospitals stay)
        since = self._enrolled.activations()
        lost = [
            one for one in waiting if one.node in since and since[one.node] > one.sent_at + _SLACK
        ]
        for one in lost:
            one.away_until = None
        if lost:
            _logger.info("%s: sent again to %d hospitals that started anew", action, len(lost))
            self._send(action, lost, owner)

    def _is_away(self, message: Message) -> bool:
        """Whether this is no answer, but the SuperLink's word that the hospital is away."""
        return (
            self._enrolled is not None
            and message.has_error()
            and message.error.code == NODE_UNAVAILABLE
        )

    def _is_given_up(self, action: str, one: _Waiting) -> bool:
        if one.away_until is None or self._timer.monotonic() < one.away_until:
            return False
        _logger.warning("%s: %s is away", action, self._called(one.node))
        return True

    def _read(self, node: int, message: Message, kind: type[Reply]) -> Reply | None:
        if message.has_error():
            # In a simulation a scenario says so itself, of many hospitals and rounds.
            away = message.error.code == NODE_UNAVAILABLE
            level = logging.INFO if away else logging.WARNING
            _logger.log(level, "%s: %s", self._called(node), message.error.reason)
            return None
        try:
            reply = read(kind, message)
        except MessageError as error:
            _logger.warning("%s sent an unusable reply: %s", self._called(node), error)
            return None
        claimed = reply.hospital  # type: ignore[attr-defined]
        if self._enrolled is not None and claimed != self._enrolled.names[node]:
            _logger.warning("%s calls itself %r; set aside", self._called(node), claimed)
            return None
        return reply

    def _called(self, node: int) -> str:
        name = self._enrolled.names.get(node) if self._enrolled else None
        return name or f"hospital at node {node}"

    def _online(self) -> dict[int, datetime | None]:
        """The study's hospitals that are there, and since when."""
        if self._enrolled is None:
            return dict.fromkeys(self._grid.get_node_ids())
        since = self._enrolled.activations()
        return {node: since[node] for node in self._enrolled.names if node in since}

    def _assemble(self, minimum: int) -> None:
        wanted = len(self._enrolled.names) if self._enrolled else minimum
        deadline = self._timer.monotonic() + _ASSEMBLY_S
        while (found := len(self._online())) < wanted:
            if self._timer.monotonic() > deadline:
                if found >= minimum:
                    return
                raise RunError(
                    f"expected at least {minimum} hospitals to connect within "
                    f"{_ASSEMBLY_S:.0f} s, found {found}"
                )
            self._timer.sleep(_LONGEST_POLL_S if self._enrolled else _POLL_S)
