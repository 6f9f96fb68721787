"""The coordinator's Flower app: a study conducted over a Flower grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import RunError
from common.study import Study, load_study
from common.tables import Table, read_table
from server.conduct import Progress, conduct
from server.finish import finish
from server.flower_link import Enrolled, GridLink
from server.store import RunFolder

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One study to conduct: where its results go, its public records, and who watches.

    ``enrolled``: its hospitals in a deployment; None in a simulation. ``facts``: asked at the end
    for what else belongs into the result.
    """

    study: Study
    run: RunFolder
    corpus: Table | None
    watch: Callable[[Progress], None]
    enrolled: Enrolled | None = None
    facts: Callable[[], Mapping[str, Any]] = dict


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
            enrolled=job.enrolled,
        )
        outcome = conduct(job.study, link, job.run, job.corpus, job.watch)
        finish(job.study, job.run, replace(outcome, facts={**outcome.facts, **job.facts()}))

    return app


def read_corpus(study: Study, folder: Path) -> Table | None:
    """The public corpus below ``folder``; None when the study draws it from its dictionary."""
    source = study.public.source
    if study.public.kind == "dictionary":
        return None
    if source is None:
        raise RunError("a held-apart corpus is made by the simulation, or by `consilium split`")
    return read_table(source, study.dictionary, folder, labelled=False)


def log_progress(progress: Progress) -> None:
    """One line of log a round."""
    _logger.info(
        "%s: round %d of %d, ε %s",
        progress.stage,
        progress.round,
        progress.rounds,
        progress.epsilon,
    )


def _job_from_context(context: Context) -> Job:
    """The job named by the run's configuration: a folder made by ``consilium split``."""
    folder = Path(str(context.run_config["folder"]))
    study = load_study(folder / "study.toml")
    run = RunFolder.create(Path(str(context.run_config["run-folder"])), study)

    return Job(study, run, read_corpus(study, folder / "public"), log_progress)


app = build_server_app(_job_from_context)
