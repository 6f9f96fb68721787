"""Run a study with all its hospitals in this process."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

from flwr.app import Context, Message, RecordDict

from client.app import build_client_app
from client.hospital import Hospital
from common.errors import RunError, StudyError, nearest
from common.plugins import OWN_CODE
from common.randomness import NoiseSource, SecretNoise
from common.study import Study
from common.tables import Table
from server.app import Job, build_server_app
from server.conduct import Progress
from server.store import RunFolder
from simulations.engine import StackedEngine
from simulations.grid import Backend, InProcessGrid, one_by_one
from simulations.hospitals import World, build_world, open_world, secret_noise, seeded_noise
from simulations.ray_engine import check_ray, ray_backend
from simulations.scenarios import open_scene

Watch = Callable[[Progress], None]
InProcess = Literal["stacked", "one-by-one"]
Engine = Literal["auto", "stacked", "one-by-one", "ray"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


def run_in_process(
    study: Study,
    run: RunFolder,
    hospitals: list[Hospital],
    corpus: Table | None,
    watch: Watch,
    *,
    engine: InProcess = "stacked",
    memory_bytes: int | None = None,
    debug: bool = False,
) -> None:
    """Conduct ``study`` over ``hospitals`` through the same two apps a deployment runs.

    ``engine``: ``stacked`` trains many hospitals as one batch (see ``engine``), of at most
    ``memory_bytes``; ``one-by-one`` is its plain twin. Their results agree to rounding.
    """
    backend: Backend = one_by_one(answering(hospitals, debug=debug), debug=debug)
    if engine == "stacked":
        backend = StackedEngine(hospitals, backend, memory_bytes=memory_bytes, debug=debug)
    conduct_over(study, run, hospitals, backend, corpus, watch)


def answering(hospitals: Sequence[Hospital], *, debug: bool) -> Callable[[Message], Message]:
    """What a deployment's client app answers, of the hospital that a message goes to."""
    client_app = build_client_app(
        lambda context, _: nullcontext(hospitals[context.node_id - 1]), debug=debug
    )
    return lambda message: client_app(message, node_context(message.metadata.dst_node_id))


def conduct_over(
    study: Study,
    run: RunFolder,
    hospitals: list[Hospital],
    backend: Backend,
    corpus: Table | None,
    watch: Watch,
) -> None:
    """Conduct ``study`` over a backend that answers for ``hospitals``, as its scenario says."""
    scene = open_scene(study, run, hospitals)
    server_app = build_server_app(lambda _: Job(study, run, corpus, watch, facts=scene.facts))
    grid = InProcessGrid(len(hospitals), scene.over(backend))
    gc.freeze()  # all hospitals live as long as the run: looking for garbage there is in vain
    try:
        server_app(grid, node_context(0))
    finally:
        gc.unfreeze()


def simulate(
    study: Study,
    path: Path,
    data_folder: Path,
    watch: Watch,
    *,
    noise_seed: int | None = None,
    engine: Engine = "auto",
    memory_bytes: int | None = None,
    replace: bool = False,
    debug: bool = False,
) -> RunFolder:
    """A new run of ``study`` in the folder ``path``.

    ``engine``: who answers for the hospitals; ``auto`` is ``stacked``. Results agree to rounding.
    ``noise_seed`` replaces every hospital's secret noise by repeatable test noise; the privacy
    statement then says that nothing is guaranteed.
    """
    check_engine(engine, study)
    world = build_world(study, data_folder)
    # A folder with a study file alone may be anything of the user's; a run has both.
    if replace and (path / "study.toml").is_file() and (path / "environment.json").is_file():
        shutil.rmtree(path)
    run = RunFolder.create(path, study)
    settings = {
        "data_folder": str(data_folder.resolve()),
        "noise_seed": noise_seed,
        "engine": "stacked" if engine == "auto" else engine,
        "memory_bytes": memory_bytes,
        "code_folder": os.environ.get(OWN_CODE, ""),
    }
    run.write_json("simulation.json", settings)
    _conduct(world, run, watch, settings, debug=debug)
    return run


def resume(path: Path, watch: Watch, *, debug: bool = False) -> RunFolder:
    """Continue an interrupted run to the result it would have had; a finished one is left alone."""
    run, study = RunFolder.open(path)
    if (path / "result.json").exists():
        return run
    # One by one, as runs were made before they said how.
    settings = {"engine": "one-by-one", "memory_bytes": None} | run.read_json("simulation.json")
    check_engine(parse_engine(settings["engine"]), study)
    world = build_world(study, Path(settings["data_folder"]))
    _conduct(world, run, watch, settings, debug=debug)
    return run


def parse_engine(name: str) -> Engine:
    """The engine of this name. Raises StudyError for another."""
    for one in ENGINES:
        if one == name:
            return one
    raise StudyError(
        f"engine: expected one of {', '.join(ENGINES)}, found {name!r}; {nearest(name, ENGINES)}"
    )


def check_engine(engine: Engine, study: Study) -> None:
    """Refuse an engine that is not installed, or cannot run ``study``."""
    if engine == "ray":
        check_ray(study)


def _conduct(
    world: World, run: RunFolder, watch: Watch, settings: Mapping[str, Any], *, debug: bool
) -> None:
    """Conduct the run as its ``simulation.json`` says."""
    noise = run_noise(run, [site.name for site in world.sites], settings["noise_seed"])
    hospitals = open_world(world, noise)
    if settings["engine"] == "ray":
        with ray_backend(run, world, noise, debug=debug) as backend:
            conduct_over(world.study, run, hospitals, backend, world.corpus, watch)
        return
    run_in_process(
        world.study,
        run,
        hospitals,
        world.corpus,
        watch,
        engine=settings["engine"],
        memory_bytes=settings["memory_bytes"],
        debug=debug,
    )


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


def node_context(node: int) -> Context:
    """What Flower gives the app of node ``node``; 0 is the coordinator."""
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
