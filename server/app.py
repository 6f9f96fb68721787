"""The coordinator's Flower app: a link over Flower's grid, and the study conducted through it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.errors import MessageError, RunError
from common.flower import pack, unpack
from common.study import Study, load_study
from common.tables import Table, read_table
from common.wire import HelloReply
from server.conduct import Progress, conduct
from server.finish import finish
from server.store import RunFolder

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
_POLL_S = 0.05
_HELLO_WAIT_S = 60.0


@dataclass(frozen=True)
class Job:
    """One study to conduct: where its results go, its public records, and who watches."""

    study: Study
    run: RunFolder
    corpus: Table | None
    watch: Callable[[Progress], None]


class GridLink:
    """Asks all nodes of a Flower grid and gives their replies as they come."""

    def __init__(self, grid: Grid, *, minimum_nodes: int, timeout_s: float) -> None:
        self._grid = grid
        self._timeout_s = timeout_s
        self._nodes = self._wait_for_nodes(minimum_nodes)
        self._node_of: dict[str, int] = {}

    def ask(self, action: str, task: Any, kind: type[Reply]) -> Iterator[Reply]:
        """Replies of every node that answers in time; failures are logged and left out."""
        content = pack(task)
        for node, reply in self._exchange(action, dict.fromkeys(self._nodes, content), kind):
            if isinstance(reply, HelloReply):
                self._node_of[reply.hospital] = node
            yield reply

    def ask_each(self, action: str, tasks: Mapping[str, Any], kind: type[Reply]) -> Iterator[Reply]:
        """The same, each hospital with a task of its own; it is known by the node of its Hello."""
        contents = {self._node_of[name]: pack(task) for name, task in tasks.items()}
        for _, reply in self._exchange(action, contents, kind):
            yield reply

    def _exchange(
        self, action: str, contents: Mapping[int, RecordDict], kind: type[Reply]
    ) -> Iterator[tuple[int, Reply]]:
        messages = [
            Message(content=content, dst_node_id=node, message_type=_MESSAGE_TYPES[action])
            for node, content in contents.items()
        ]
        waiting = set(self._grid.push_messages(messages))
        deadline = time.monotonic() + self._timeout_s
        while waiting and time.monotonic() < deadline:
            arrived = list(self._grid.pull_messages(waiting))
            for message in arrived:
                waiting.discard(message.metadata.reply_to_message_id)
                reply = _read(message, kind)
                if reply is not None:
                    yield message.metadata.src_node_id, reply
            if not arrived:
                time.sleep(_POLL_S)
        if waiting:
            _logger.warning("%s: %d hospitals did not answer in time", action, len(waiting))

    def _wait_for_nodes(self, minimum: int) -> list[int]:
        deadline = time.monotonic() + _HELLO_WAIT_S
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= minimum:
                return nodes
            if time.monotonic() > deadline:
                raise RunError(
                    f"expected at least {minimum} hospitals to connect within "
                    f"{_HELLO_WAIT_S:.0f} s, found {len(nodes)}"
                )
            time.sleep(_POLL_S)


def build_server_app(job_of: Callable[[Context], Job]) -> ServerApp:
    """A ServerApp that conducts the study ``job_of`` gives for a context."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        job = job_of(context)
        link = GridLink(
            grid,
            minimum_nodes=job.study.federation.minimum_hospitals,
            timeout_s=job.study.federation.round_timeout_s,
        )
        outcome = conduct(job.study, link, job.run, job.corpus, job.watch)
        finish(job.study, job.run, outcome)

    return app


def read_corpus(study: Study, folder: Path) -> Table | None:
    """The public corpus below ``folder``; None when the study draws it from its dictionary."""
    source = study.public.source
    if study.public.kind == "dictionary":
        return None
    if source is None:
        raise RunError("a held-apart corpus is made by the simulation, or by `consilium split`")
    return read_table(source, study.dictionary, folder, labelled=False)


def _read(message: Message, kind: type[Reply]) -> Reply | None:
    node = message.metadata.src_node_id
    if message.has_error():
        _logger.warning("hospital at node %d failed: %s", node, message.error.reason)
        return None
    try:
        return unpack(kind, message.content)
    except MessageError as error:
        _logger.warning("hospital at node %d sent an unusable reply: %s", node, error)
        return None


def _job_from_context(context: Context) -> Job:
    """The job named by the run's configuration: a folder made by ``consilium split``."""
    folder = Path(str(context.run_config["folder"]))
    study = load_study(folder / "study.toml")
    run = RunFolder.create(Path(str(context.run_config["run-folder"])), study)

    def watch(progress: Progress) -> None:
        _logger.info(
            "%s: round %d of %d, ε %s",
            progress.stage,
            progress.round,
            progress.rounds,
            progress.epsilon,
        )

    return Job(study, run, read_corpus(study, folder / "public"), watch)


app = build_server_app(_job_from_context)
