"""Ray's workers, by `flwr run .` or `--engine ray`, give the result of the run in process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp.client_app import ClientAppException

from client.hospital import open_hospital
from client.rounds import train
from common.errors import RefusalError, RunError, StudyError
from common.features import FeatureMap, range_scaling, scaling_tensor
from common.models import build_student, build_teacher
from common.study import Study, load_study
from common.tensors import load_tensors
from common.wire import TrainTask
from server.app import read_corpus
from server.store import RunFolder
from simulations import ray_engine
from simulations.hospitals import (
    build_world,
    open_world,
    secret_noise,
    seeded_noise,
    write_world,
)
from simulations.ray_engine import lay_out
from simulations.simulate import run_in_process, simulate

pytest.importorskip("ray", reason="Flower's engine needs the extra: pip install 'consilium[ray]'")

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SEED = 3
HOSPITALS = 3


def _environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def superlink(home: Path, port: int) -> Iterator[None]:
    """Flower's link in simulation mode, on loopback only; it and all it started end with it."""
    with (home / "superlink.log").open("w") as log:
        process = subprocess.Popen(
            [
                BIN / "flower-superlink",
                *("--insecure", "--simulation", "--isolation", "subprocess"),
                *("--host", "127.0.0.1", "--port", str(port), "--database", home / "state.db"),
            ],
            env=_environment(home),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with suppress(ProcessLookupError):  # its own group: what it started and left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(15)


def flwr_run(home: Path, folder: Path, run: Path) -> str:
    """Submit the repository as it stands and follow its log to the end."""
    port = _free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n'
        f'[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with superlink(home, port):
        done = subprocess.run(
            [
                BIN / "flwr",
                *("run", ROOT, "test", "--stream"),
                *("--federation-config", f"num-supernodes={HOSPITALS}"),
                *("--run-config", f'folder="{folder}" run-folder="{run}"'),
            ],
            env=_environment(home),
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        return done.stdout + done.stderr + (home / "superlink.log").read_text()


def in_process(folder: Path, run: Path) -> None:
    study = load_study(folder / "study.toml")
    homes = sorted((folder / "hospitals").iterdir())
    with ExitStack() as stack:
        run_in_process(
            study,
            RunFolder.create(run, study),
            [stack.enter_context(open_hospital(home, study.digest())) for home in homes],
            read_corpus(study, folder / "public"),
            lambda _: None,
            debug=True,
        )


@pytest.mark.timeout(180)
def test_flower_engine_and_in_process_runs_are_equal(wisconsin: Study, tmp_path: Path) -> None:
    study = short(wisconsin)
    folder, theirs, ours = tmp_path / "split", tmp_path / "theirs", tmp_path / "ours"
    write_world(build_world(study, Path()), folder, noise_seed=SEED)
    home = tmp_path / "flwr"
    home.mkdir()
    log = flwr_run(home, folder, theirs)
    assert (theirs / "result.json").exists(), log[-5000:]
    in_process(folder, ours)
    for name in ("teacher.safetensors", "student.safetensors"):
        engine, twin = load_tensors(theirs / name), load_tensors(ours / name)
        assert engine.keys() == twin.keys()
        for key, tensor in engine.items():
            torch.testing.assert_close(tensor, twin[key], rtol=0, atol=1e-6)
    assert RunFolder(theirs).metrics() == RunFolder(ours).metrics()
    results = [json.loads((one / "result.json").read_text()) for one in (theirs, ours)]
    assert results[0]["hospitals"] == results[1]["hospitals"]
    assert len(results[0]["hospitals"]) == HOSPITALS
    statement = json.loads((theirs / "privacy.json").read_text())
    assert not statement["guaranteed"]  # a seed was used, and the statement says so


def short(wisconsin: Study, **changes: object) -> Study:
    return wisconsin.revised(
        finetune__rounds=2,
        finetune__sampling_rate=0.5,
        pretrain__steps=10,
        distill__on="patients",
        distill__rounds=1,
        simulation__hospitals=HOSPITALS,
        federation__minimum_hospitals=HOSPITALS,
        **changes,
    )


def consilium(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command in a process of its own, as Ray leaves children behind for its parent's end."""
    return subprocess.Popen(
        [sys.executable, "-m", "simulations.cli", *map(str, arguments)],
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(180)
def test_simulating_on_ray_gives_the_run_in_process_even_when_interrupted(
    wisconsin: Study, tmp_path: Path
) -> None:
    study, path = short(wisconsin).revised(finetune__rounds=40), tmp_path / "ray"
    twin = simulate(
        study, tmp_path / "twin", Path(), lambda _: None, noise_seed=SEED, engine="one-by-one"
    )
    (tmp_path / "study.toml").write_text(study.to_toml())
    asked = ("--run", path, "--engine", "ray", "--noise-seed", str(SEED))
    with consilium("simulate", tmp_path / "study.toml", *asked) as child:
        try:
            while not (path / "rounds" / "finetune-0003.safetensors").exists():
                assert child.poll() is None, child.stdout and child.stdout.read()
                time.sleep(0.02)
            child.send_signal(signal.SIGINT)
            said, _ = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130, said
    assert not (path / "result.json").exists()
    with consilium("resume", path, "--json") as child:
        said, _ = child.communicate(timeout=100)
    assert child.returncode == 0, said
    run = RunFolder(path)
    for name in ("teacher.safetensors", "student.safetensors"):
        theirs, ours = load_tensors(run.path / name), load_tensors(twin.path / name)
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(tensor, ours[key], rtol=0, atol=1e-6)
    assert run.metrics() == twin.metrics()
    theirs, ours = run.read_json("result.json"), twin.read_json("result.json")
    assert theirs["hospitals"] == ours["hospitals"] and len(ours["hospitals"]) == HOSPITALS
    assert run.read_json("privacy.json") == twin.read_json("privacy.json")
    assert not run.read_json("privacy.json")["guaranteed"]


def test_a_worker_remembers_what_its_hospital_charged(wisconsin: Study, tmp_path: Path) -> None:
    study = short(wisconsin)
    world = build_world(study, Path())
    noise = secret_noise(bytes(range(32)), [site.name for site in world.sites])
    home = lay_out(tmp_path / "world", world, noise)[0]
    assert (home / "noise.key").read_bytes() == noise[world.sites[0].name].key
    assert (home / "noise.key").stat().st_mode & 0o777 == 0o600
    again = lay_out(tmp_path / "world", world, noise)
    assert again[0] == home
    context = ray_engine._context(1, home)
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    teacher, student = build_teacher(study, features), build_student(study, features)

    def ask(attempt: int) -> torch.Tensor:
        task = TrainTask(
            study_digest=study.digest(),
            stage="finetune",
            round=0,
            attempt=attempt,
            teacher=dict(teacher.state_dict()),
            student=dict(student.state_dict()),
            scaling=scaling_tensor(study.dictionary, range_scaling(study.dictionary)),
        )
        with ray_engine._hospital(context, study.digest()) as hospital:
            assert hospital.guard.is_lasting
            return train(hospital, task).update

    first = ask(0)
    assert torch.equal(ask(0), first)  # the very same question: the very same answer
    spent = (home / "charged.json").read_text()
    with pytest.raises(RefusalError, match="study promised"):
        for attempt in range(1, 12):
            assert not torch.equal(ask(attempt), first)
    assert len(json.loads((home / "charged.json").read_text())) > len(json.loads(spent))


def test_a_worker_learns_from_the_records_that_the_scenario_poisons(
    wisconsin: Study, tmp_path: Path
) -> None:
    study = short(
        wisconsin,
        simulation__scenario={"attack": {"kind": "label_flip", "hospitals": HOSPITALS}},
    )
    world = build_world(study, Path())
    noise = seeded_noise(SEED, [site.name for site in world.sites])
    homes = lay_out(tmp_path / "world", world, noise)
    clean = open_world(build_world(short(wisconsin), Path()), noise)
    for node, (home, twin, honest) in enumerate(
        zip(homes, open_world(world, noise), clean, strict=True), start=1
    ):
        with ray_engine._hospital(ray_engine._context(node, home), study.digest()) as hospital:
            assert hospital.train.labels.tolist() == twin.train.labels.tolist()
            assert hospital.test.labels.tolist() == twin.test.labels.tolist()
            assert hospital.train.labels.tolist() != honest.train.labels.tolist()


def test_what_ray_cannot_run_is_refused_in_one_line(
    wisconsin: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(study: Study, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words) as refusal:
            simulate(study, tmp_path / "r", Path(), lambda _: None, engine="ray")
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "r").exists()

    sums = short(wisconsin).revised(
        distill__on="public", privacy__trust="distributed", federation__hospitals=HOSPITALS
    )
    refused(sums, StudyError, "--engine stacked")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{_free_port()}")
    refused(short(wisconsin), RunError, "no cluster answers")
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere")
    refused(short(wisconsin), RunError, "HOST:PORT")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    refused(short(wisconsin), RunError, re.escape("pip install 'consilium[ray]'"))


def test_a_lost_worker_ends_the_run_and_names_the_way_on() -> None:
    from ray.exceptions import ActorDiedError

    lost: Future[Message] = Future()
    lost.set_exception(ActorDiedError())
    message = Message(RecordDict(), 1, "train")
    with pytest.raises(RunError, match="consilium resume"):
        ray_engine._reply(message, lost, debug=False)
    failed: Future[Message] = Future()
    failed.set_exception(ClientAppException("broken"))
    assert ray_engine._reply(message, failed, debug=False).has_error()
