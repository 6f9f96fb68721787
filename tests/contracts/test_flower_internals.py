"""What ``common/flower_tasks.py`` relies on in Flower, on a real SuperLink and SuperNode."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.errors import RunError
from common.flower_tasks import (
    ClientTask,
    Control,
    Endpoint,
    TaskQueue,
    node_activations,
    run_server_task,
)
from common.loopback import make_loopback_certificate
from common.supervise import Service, Supervisor

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Flower:
    link: Endpoint
    node: Endpoint
    secret: bytes
    control: Control
    node_id: int
    supernode: Supervisor


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def listening(port: int) -> Callable[[], bool]:
    def ready() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return ready


def wait_for(found: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("did not happen in time")


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    folder = tmp_path_factory.mktemp("flower")
    made = make_loopback_certificate(folder)
    secret = folder / "secret"
    secret.write_bytes(secrets.token_bytes(32))
    link, node = free_port(), free_port()
    (folder / "home").mkdir()
    root = str(Path(__file__).parents[2])
    environ = os.environ | {"FLWR_HOME": str(folder / "home"), "PYTHONPATH": root}
    tls = (
        *("--ssl-certfile", str(made.certificate), "--ssl-keyfile", str(made.key)),
        *("--ssl-ca-certfile", str(made.ca), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret), "--host", "127.0.0.1"),
    )
    superlink = Service(
        name="superlink",
        argv=(
            str(BIN / "flower-superlink"),
            *("--port", str(link), "--enable-supernode-auth", "--database", str(folder / "db")),
            *("--disable-runtime-dependency-installation", *tls),
        ),
        log=folder / "superlink.log",
        environ=environ,
        ready=listening(link),
        stop_s=3,
    )
    outer = Supervisor([superlink])
    outer.start()
    control = Control(Endpoint(f"127.0.0.1:{link}", made.ca.read_bytes()))
    try:
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        node_id = control.register_node(public, "north")
        assert control.register_node(public, "north") == node_id
        (folder / "node.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
        )
        supernode = Service(
            name="supernode",
            argv=(
                *(sys.executable, "-m", "client.supernode"),
                *("--superlink", f"127.0.0.1:{link}", "--root-certificates", str(made.ca)),
                *("--auth-supernode-private-key", str(folder / "node.key")),
                *("--port", str(node), *tls),
            ),
            log=folder / "supernode.log",
            environ=environ,
            ready=listening(node),
            stop_s=3,
        )
        inner = Supervisor([supernode])
        inner.start()
        try:
            wait_for(lambda: any(one.is_online for one in control.nodes()))
            yield Flower(
                Endpoint(f"127.0.0.1:{link}", made.ca.read_bytes()),
                Endpoint(f"127.0.0.1:{node}", made.ca.read_bytes()),
                secret.read_bytes(),
                control,
                node_id,
                inner,
            )
        finally:
            inner.stop()
    finally:
        control.close()
        outer.stop()


def next_task(endpoint: Endpoint, secret: bytes, kind: Literal["client", "server"]) -> str:
    with closing(TaskQueue(endpoint, secret, kind)) as queue:
        return str(wait_for(queue.acquire))


def in_process(action: Callable[[], None]) -> int:
    """Run ``action`` in a forked process; its pid. Exit code 0 when it returns."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def ask_once(found: Path) -> ServerApp:
    """A server app that asks every node once and writes what it got."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        (node,) = grid.get_node_ids()
        content = RecordDict({"values": ConfigRecord({"x": 1})})
        ids = list(
            grid.push_messages(
                [Message(content=content, dst_node_id=node, message_type="query.hello")]
            )
        )
        (reply,) = wait_for(lambda: list(grid.pull_messages(ids)))
        told = reply.error.reason if reply.has_error() else dict(reply.content["values"])
        found.write_text(f"{context.run_config['study']} {told}")

    return app


def answering() -> ClientApp:
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, _context: Context) -> Message:
        x = message.content["values"]["x"]
        return Message(RecordDict({"values": ConfigRecord({"x": x + 1})}), reply_to=message)

    return app


def conduct(flower: Flower, found: Path) -> tuple[int, int, str]:
    """Start a run and its server process; run id, pid, and the hospital's task's token."""
    run = flower.control.start_run({"study": "s1"})
    token = next_task(flower.link, flower.secret, "server")
    server = in_process(
        lambda: run_server_task(flower.link, token, lambda _context, _grid: ask_once(found))
    )
    return run, server, next_task(flower.node, flower.secret, "client")


def test_a_message_goes_there_and_back(flower: Flower, tmp_path: Path) -> None:
    run, server, token = conduct(flower, tmp_path / "found")
    task = ClientTask.pull(flower.node, token)
    child = in_process(lambda: task.answer(answering()))
    with task.kept_alive():
        assert os.waitpid(child, 0)[1] == 0
    assert os.waitpid(server, 0)[1] == 0
    assert (tmp_path / "found").read_text() == "s1 {'x': 2}"
    assert wait_for(lambda: flower.control.run_state(run) == "finished")


def test_a_process_that_dies_is_answered_for(flower: Flower, tmp_path: Path) -> None:
    _, server, token = conduct(flower, tmp_path / "found")
    task = ClientTask.pull(flower.node, token)
    child = in_process(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with task.kept_alive():
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    task.fail("ended early")
    assert os.waitpid(server, 0)[1] == 0
    assert (tmp_path / "found").read_text() == "s1 ended early"


def test_a_failing_server_app_fails_its_run(flower: Flower) -> None:
    def broken(_context: Context, grid: Any) -> ServerApp:
        assert set(node_activations(grid)) == {flower.node_id}
        raise RunError("no such study")

    run = flower.control.start_run({"study": "s1"})
    token = next_task(flower.link, flower.secret, "server")
    server = in_process(lambda: run_server_task(flower.link, token, broken))
    assert os.waitpid(server, 0)[1] != 0
    assert wait_for(lambda: flower.control.run_state(run) == "failed")


def test_runs_can_be_stopped_and_unknown_ones_are_known_as_such(flower: Flower) -> None:
    run = flower.control.start_run({"study": "s1"})
    flower.control.stop_run(run)
    assert flower.control.run_state(run) == "failed"
    assert flower.control.run_state(1) == "unknown"


def test_tasks_are_given_to_those_who_hold_the_secret(flower: Flower) -> None:
    run = flower.control.start_run({"study": "s1"})
    try:
        with closing(TaskQueue(flower.link, b"another secret", "server")) as queue:
            assert queue.acquire() is None
        assert next_task(flower.link, flower.secret, "server")
    finally:
        flower.control.stop_run(run)


def test_a_killed_supernode_is_back_before_its_heartbeats_are_missed(flower: Flower) -> None:
    """Flower's own would be turned away for up to a minute."""
    killed = flower.supernode.status()["supernode"]["pid"]
    assert isinstance(killed, int)
    os.kill(killed, signal.SIGKILL)
    begun = time.monotonic()

    def is_back() -> bool:
        flower.supernode.poll()
        found = flower.supernode.status()["supernode"]
        return bool(found["ready"]) and found["pid"] not in (None, killed)

    wait_for(is_back)
    log = flower.supernode._running[0].service.log  # the node was activated by the first try
    wait_for(lambda: log.read_text().count("SuperNode ID:") >= 2)
    assert time.monotonic() - begun < 25
    assert flower.supernode.status()["supernode"]["restarts"] == 1


def test_a_superlink_that_is_away_is_an_error_of_one_line(tmp_path: Path) -> None:
    made = make_loopback_certificate(tmp_path)
    control = Control(Endpoint(f"127.0.0.1:{free_port()}", made.ca.read_bytes()))
    with pytest.raises(RunError, match="could not be asked to list the nodes.*is it running"):
        control.nodes()
    control.close()
