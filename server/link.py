"""The coordinator's one way to the hospitals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

from common.wire import Hello, HelloReply

Reply = TypeVar("Reply")


class Link(Protocol):
    """The coordinator's only way to the hospitals; Flower's grid behind it, or a test's."""

    def greet(self, task: Hello) -> Iterator[HelloReply]:
        """Hello to every hospital that is there and was not greeted yet; their replies."""
        ...

    def ask(self, action: str, task: Any, kind: type[Reply]) -> Iterator[Reply]:
        """Send ``task`` to every hospital; their replies, as they come. Failures are left out."""
        ...

    def ask_each(self, action: str, tasks: Mapping[str, Any], kind: type[Reply]) -> Iterator[Reply]:
        """The same with a task of its own for each hospital named, known since its Hello."""
        ...
