"""The simulation engine for more than one machine: Flower's Ray workers behind our own grid.

Flower's simulation runs client apps on a pool of Ray actors, one a CPU of the cluster
(``RayBackend``). That pool is what is used here. Flower's driver around it is not: it asks every
node for messages in turn, ten times a second, which is quadratic in the hospitals.

Hospitals reach the workers as folders on disk, laid out as `consilium split` does, below the run's
own folder: on several machines it must lie on storage that all of them share, under one path, and
so must the virtual environment. Replies are taken in the order of the hospitals, so that a sum of
floats does not depend on who was fastest.

Ray's own transport is neither authenticated nor encrypted, unpickles what it is sent, and listens
on all of a machine's addresses, even where there is one machine only: a cluster for this is one's
own, behind a firewall, and its data are public.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from client.app import build_client_app
from client.approvals import study_folder
from client.guard import MemoryGuard, Release
from client.hospital import Hospital, open_hospital
from common.errors import RunError, StudyError
from common.files import write_atomically
from common.privacy.accounting import GaussianEvent
from common.privacy.units import Trust
from common.randomness import NoiseSource, SecretNoise, SeededNoise, Stream
from common.study import Study
from server.store import RunFolder
from simulations.grid import Backend
from simulations.hospitals import World, write_world
from simulations.poison import poisoned

if TYPE_CHECKING:
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

_INSTALL = "pip install 'consilium[ray]'"
_READY, _CHARGED = "ready.json", "charged.json"
_KEEPS_DEVICES = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"  # else Ray warns of its own future
_LOOK_S = 5.0
_KEPT_OPEN = 1024
_AHEAD = 4  # messages a worker that are under way or answered, and not yet added up


def check_ray(study: Study) -> None:
    """Refuse, in one line, what this engine cannot run; before anything is written."""
    if importlib.util.find_spec("ray") is None:
        raise RunError(f"engine 'ray': Ray is not installed; {_INSTALL}")
    if study.privacy.trust is Trust.DISTRIBUTED:
        raise StudyError(
            "engine 'ray': with trust = 'distributed' a hospital keeps keys between two messages, "
            "which Ray may give to different workers; use --engine stacked"
        )
    if address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)


def _check_address(address: str) -> None:
    """Ray itself would try an address that does not answer for many minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not (host and port.isdigit()) or "/" in address:
        raise RunError(f"RAY_ADDRESS: expected HOST:PORT or auto, found {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_LOOK_S).close()
    except OSError as error:
        raise RunError(
            f"engine 'ray': no cluster answers at {address} ({error.strerror or error}); start one "
            f"with `ray start --head`, or unset RAY_ADDRESS"
        ) from None


@contextmanager
def ray_backend(
    run: RunFolder,
    world: World,
    noise_of: Mapping[str, NoiseSource],
    *,
    debug: bool = False,
) -> Iterator[Backend]:
    """A backend whose hospitals answer on Ray's workers: those at RAY_ADDRESS, or of this machine.

    Raises RunError when no cluster can be reached, or one of its workers is lost.
    """
    check_ray(world.study)
    homes = lay_out(run.path / "world", world, noise_of)
    contexts = {node: _context(node, home) for node, home in enumerate(homes, start=1)}
    with _workers(debug=debug) as workers:
        threads = ThreadPoolExecutor(workers.num_workers)
        try:
            yield _in_order(workers, threads, contexts, debug=debug)
        finally:
            threads.shutdown(cancel_futures=True)


def lay_out(folder: Path, world: World, noise_of: Mapping[str, NoiseSource]) -> list[Path]:
    """The hospitals' folders, as `consilium split` makes them, and the run's own study in each.

    Made once a run: what hospitals have charged lies there too.
    """
    homes = [folder / "hospitals" / site.name for site in world.sites]
    if (folder / _READY).is_file():
        return homes
    seeds = {one.seed for one in noise_of.values() if isinstance(one, SeededNoise)}
    write_world(world, folder, noise_seed=seeds.pop() if seeds else None)
    folder.chmod(0o700)
    # With its simulation section, which the digest leaves out: a scenario may poison records.
    study, text = world.study, world.study.to_toml()
    for site, home in zip(world.sites, homes, strict=True):
        place = study_folder(home, study.digest())
        place.path.mkdir(parents=True, exist_ok=True)
        place.study.write_text(text, encoding="utf-8")
        noise = noise_of[site.name]
        if isinstance(noise, SecretNoise):
            write_atomically(home / "noise.key", noise.key)
    write_atomically(folder / _READY, b"{}\n")
    return homes


@lru_cache(maxsize=2)
def worker_app(*, debug: bool) -> ClientApp:
    """The client app as a worker has it: any hospital, from its folder. Ray pickles its name."""
    return build_client_app(_hospital, debug=debug)


@contextmanager
def _hospital(context: Context, digest: str) -> Iterator[Hospital]:
    yield _opened(Path(str(context.node_config["hospital-folder"])), digest)


@lru_cache(maxsize=_KEPT_OPEN)
def _opened(home: Path, digest: str) -> Hospital:
    """The hospital of ``home``, read once by each worker; a run's folder does not change."""
    with open_hospital(home, digest) as hospital:
        return replace(
            hospital,
            train=poisoned(hospital.study, hospital.name, hospital.train),
            guard=_FolderGuard(hospital.guard.noise, home / _CHARGED),
        )


@dataclass(frozen=True)
class _FolderGuard:
    """A simulated hospital's gate, whose charges outlive the worker that answered for it."""

    noise: NoiseSource
    path: Path

    @property
    def is_lasting(self) -> bool:
        """True: for as long as the run's folder."""
        return True

    def admit(self, patients: Iterable[str], *, study: str, round_number: int) -> frozenset[str]:
        """See ``MemoryGuard``."""
        return self._memory({}).admit(patients, study=study, round_number=round_number)

    def release(self, asked: Release, compute: Callable[[Stream], Tensor]) -> Tensor:
        """See ``MemoryGuard``; the charge is on disk before anything is computed."""
        charged = self._read()

        def remembered(stream: Stream) -> Tensor:
            rows = [[*key, [asdict(one) for one in events]] for key, events in charged.items()]
            write_atomically(self.path, json.dumps(rows).encode())
            return compute(stream)

        return self._memory(charged).release(asked, remembered)

    def _memory(
        self, charged: dict[tuple[str, str, str], tuple[GaussianEvent, ...]]
    ) -> MemoryGuard:
        return MemoryGuard(self.noise, _charged=charged)

    def _read(self) -> dict[tuple[str, str, str], tuple[GaussianEvent, ...]]:
        if not self.path.exists():
            return {}
        return {
            (study, pool, request): tuple(GaussianEvent(**one) for one in events)
            for study, pool, request, events in json.loads(self.path.read_text(encoding="utf-8"))
        }


@contextmanager
def _workers(*, debug: bool) -> Iterator[RayBackend]:
    """Flower's pool of Ray actors; what this process started ends with it."""
    os.environ.setdefault(_KEEPS_DEVICES, "0")
    import ray  # noqa: PLC0415 (the extra)
    from flwr.server.superlink.fleet.vce.backend.raybackend import (  # noqa: PLC0415
        RayBackend,
    )

    logger = logging.getLogger("flwr")
    path, level = os.environ.get("PYTHONPATH"), logger.level
    logger.setLevel(logging.WARNING)
    workers: RayBackend | None = None
    try:
        workers = RayBackend(_settings())
        workers.build(partial(worker_app, debug=debug))
        yield workers
    except (ConnectionError, ValueError) as error:
        if workers is not None and workers.num_workers:
            raise
        raise RunError(
            f"engine 'ray': no free CPU in the cluster at "
            f"{os.environ.get('RAY_ADDRESS', 'this machine')} ({type(error).__name__}: {error}); "
            f"start one with `ray start --head`, or unset RAY_ADDRESS"
        ) from None
    finally:
        if workers is not None:
            workers.terminate()
        ray.shutdown()
        logger.setLevel(level)
        # Flower sets it for its workers, and leaves it.
        os.environ.pop("PYTHONPATH", None)
        if path is not None:
            os.environ["PYTHONPATH"] = path


def _settings() -> dict[str, Any]:
    """What Ray is started with: a cluster that is named, or one that ends with this process."""
    start: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if not os.environ.get("RAY_ADDRESS"):
        start["address"] = "local"  # else Ray joins whatever cluster it finds running
    return {"init_args": start, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}


def _context(node: int, home: Path) -> Context:
    return Context(
        run_id=1,
        node_id=node,
        node_config={"partition-id": node - 1, "hospital-folder": str(home.resolve())},
        state=RecordDict(),
        run_config={},
    )


def _in_order(
    workers: RayBackend,
    threads: ThreadPoolExecutor,
    contexts: Mapping[int, Context],
    *,
    debug: bool,
) -> Backend:
    """A backend that keeps all workers busy and gives replies in the order of the messages."""

    def answer(message: Message) -> Message:
        reply, _ = workers.process_message(message, contexts[message.metadata.dst_node_id])
        return reply

    def run(messages: list[Message]) -> Iterator[Message]:
        waiting: deque[tuple[Message, Future[Message]]] = deque()
        for message in messages:
            waiting.append((message, threads.submit(answer, message)))
            if len(waiting) >= _AHEAD * workers.num_workers:
                yield _reply(*waiting.popleft(), debug=debug)
        while waiting:
            yield _reply(*waiting.popleft(), debug=debug)

    return run


def _reply(message: Message, answered: Future[Message], *, debug: bool) -> Message:
    """The reply. A worker that is lost ends the run: no hospital goes missing for its sake."""
    from flwr.clientapp.client_app import ClientAppException  # noqa: PLC0415
    from ray.exceptions import RayError  # noqa: PLC0415 (the extra)

    try:
        return answered.result()
    except ClientAppException as error:
        if debug:
            raise
        return Message(Error(code=1, reason=str(error)), reply_to=message)
    except RayError as error:
        raise RunError(
            f"engine 'ray': a worker was lost ({type(error).__name__}); finished rounds are kept: "
            f"continue with `consilium resume`"
        ) from error
