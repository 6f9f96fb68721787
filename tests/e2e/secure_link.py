"""Hospitals in memory behind a coordinator's panel, whose answers a test may lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from client import rounds
from client.hospital import Hospital
from common.errors import RefusalError
from common.study import Study
from common.wire import AggregateReply, AggregateStep, AggregateTask, Hello
from server.panel import Panel
from simulations.hospitals import World, build_world, open_world, seeded_noise


class Direct:
    """The link to hospitals in memory; ``lose`` says which replies never arrive."""

    def __init__(
        self, hospitals: list[Hospital], lose: Callable[[str, str, int], bool] = lambda *_: False
    ) -> None:
        self.hospitals = {one.name: one for one in hospitals}
        self.lose = lose
        self.step = 0
        self.seen: list[bytes] = []

    def ask(self, action: str, task: object, kind: type) -> Iterator[AggregateReply]:
        self.step = 0
        return self.ask_each(action, dict.fromkeys(self.hospitals, task), kind)

    def ask_each(
        self, action: str, tasks: dict[str, object], kind: type
    ) -> Iterator[AggregateReply]:
        for name, task in tasks.items():
            hospital = self.hospitals[name]
            assert hospital.aggregator is not None
            if self.lose(name, action, self.step):
                continue
            try:
                if isinstance(task, AggregateTask):
                    reply = hospital.aggregator.begin(hospital, task)
                else:
                    assert isinstance(task, AggregateStep)
                    reply = hospital.aggregator.step(hospital, task)
            except RefusalError:
                continue
            self.seen.append(reply.message)
            yield reply
        self.step += 1


def opened(study: Study, seed: int = 1) -> tuple[World, list[Hospital]]:
    world = build_world(study, Path())
    return world, open_world(world, seeded_noise(seed, [one.name for one in world.sites]))


def panel_of(study: Study, link: Direct) -> Panel:
    """The coordinator's panel over all hospitals behind ``link``."""
    members = {
        name: rounds.hello(one, Hello(study_digest=study.digest()))
        for name, one in link.hospitals.items()
    }
    return Panel(study, link, members)
