"""Runs that are stopped on their way, as by Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from server.conduct import Progress
from simulations.arms import CompareProgress


class Interrupted(BaseException):
    """As Ctrl-C, not an ordinary error."""


def stopping_at(count: int) -> Callable[[Progress], None]:
    """Watches a run, and stops it at its ``count``-th step."""
    seen = 0

    def watch(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            raise Interrupted

    return watch


def stop_in_the_third_run(begin: Callable[[Callable[[CompareProgress], None]], Any]) -> None:
    """``begin`` a series of runs with a watch that stops it in the middle of a round."""

    def stop(step: CompareProgress) -> None:
        if step.number == 3 and step.progress and step.progress.stage == "finetune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(stop)
