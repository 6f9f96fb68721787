"""Run a study with all its hospitals in this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from flwr.app import Context, Message, RecordDict

from client.app import build_client_app
from client.hospital import Hospital
from common.errors import RunError
from common.randomness import NoiseSource, SecretNoise
from common.study import Study
from common.tables import Table
from server.app import Job, build_server_app
from server.conduct import Progress
from server.store import RunFolder
from simulations.engine import StackedEngine
from simulations.grid import Backend, InProcessGrid, one_by_one
from simulations.hospitals import build_world, open_world, secret_noise, seeded_noise
from simulations.scenarios import open_scene

Watch = Callable[[Progress], None]
Engine = Literal["stacked", "one-by-one"]


def run_in_process(
    study: Study,
    run: RunFolder,
    hospitals: list[Hospital],
    corpus: Table | None,
    watch: Watch,
    *,
    engine: Engine = "stacked",
    memory_bytes: int | None = None,
    debug: bool = False,
) -> None:
    """Conduct ``study`` over ``hospitals`` through the same two apps a deployment runs.

    ``engine``: ``stacked`` trains many hospitals as one batch (see ``engine``), of at most
    ``memory_bytes``; ``one-by-one`` is its plain twin. Their results agree to rounding.
    """
    client_app = build_client_app(
        lambda context, _: nullcontext(hospitals[context.node_id - 1]), debug=debug
    )
    scene = open_scene(study, run, hospitals)
    server_app = build_server_app(lambda _: Job(study, run, corpus, watch, facts=scene.facts))

    def handle(message: Message) -> Message:
        return client_app(message, _context(message.metadata.dst_node_id))

    backend: Backend = one_by_one(handle, debug=debug)
    if engine == "stacked":
        backend = StackedEngine(hospitals, backend, memory_bytes=memory_bytes, debug=debug)
    server_app(InProcessGrid(len(hospitals), scene.over(backend)), _context(0))


def simulate(
    study: Study,
    path: Path,
    data_folder: Path,
    watch: Watch,
    *,
    noise_seed: int | None = None,
    engine: Engine = "stacked",
    memory_bytes: int | None = None,
    replace: bool = False,
    debug: bool = False,
) -> RunFolder:
    """A new run of ``study`` in the folder ``path``.

    ``noise_seed`` replaces every hospital's secret noise by repeatable test noise; the privacy
    statement then says that nothing is guaranteed.
    """
    world = build_world(study, data_folder)
    # A folder with a study file alone may be anything of the user's; a run has both.
    if replace and (path / "study.toml").is_file() and (path / "environment.json").is_file():
        shutil.rmtree(path)
    run = RunFolder.create(path, study)
    run.write_json(
        "simulation.json",
        {
            "data_folder": str(data_folder.resolve()),
            "noise_seed": noise_seed,
            "engine": engine,
            "memory_bytes": memory_bytes,
        },
    )
    noise = run_noise(run, [site.name for site in world.sites], noise_seed)
    run_in_process(
        study,
        run,
        open_world(world, noise),
        world.corpus,
        watch,
        engine=engine,
        memory_bytes=memory_bytes,
        debug=debug,
    )
    return run


def resume(path: Path, watch: Watch, *, debug: bool = False) -> RunFolder:
    """Continue an interrupted run to the result it would have had; a finished one is left alone."""
    run, study = RunFolder.open(path)
    if (path / "result.json").exists():
        return run
    settings = run.read_json("simulation.json")
    world = build_world(study, Path(settings["data_folder"]))
    noise = run_noise(run, [site.name for site in world.sites], settings["noise_seed"])
    run_in_process(
        study,
        run,
        open_world(world, noise),
        world.corpus,
        watch,
        engine=settings.get("engine", "one-by-one"),  # as runs were made before they said
        memory_bytes=settings.get("memory_bytes"),
        debug=debug,
    )
    return run


def load_hospitals(path: Path) -> tuple[Study, list[Hospital]]:
    """The hospitals of a run on disk, as they were when it ran."""
    run, study = RunFolder.open(path)
    settings = run.read_json("simulation.json")
    world = build_world(study, Path(settings["data_folder"]))
    return study, open_world(
        world, run_noise(run, [one.name for one in world.sites], settings["noise_seed"])
    )


def run_noise(run: RunFolder, names: list[str], noise_seed: int | None) -> dict[str, NoiseSource]:
    """Each hospital's noise in this run; secret noise is keyed by the run's own key file."""
    if noise_seed is not None:
        return seeded_noise(noise_seed, names)
    path = run.path / "simulation.key"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(SecretNoise.generate().key)
            handle.flush()
            os.fsync(handle.fileno())
    key = path.read_bytes()
    if len(key) != 32:
        raise RunError(f"{path}: expected 32 bytes, found {len(key)}; the run cannot be resumed")
    return secret_noise(key, names)


def _context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
