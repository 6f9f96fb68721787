"""Flower's task queues and control interface: the one file that knows Flower's internals.

Flower runs an app by starting a program of its own, which unpacks the code shipped with the run and
imports it. Consilium takes the same tasks from the same queues and runs the app that is *installed*
here; what was shipped is never unpacked. ``tests/contracts/test_flower_internals.py`` holds what
this relies on against the installed version of Flower.

::

    SuperNode / SuperLink ◀─acquire── TaskQueue        one token a task
                          ◀─pull, push── ClientTask, run_server_task   (in a process each)
    SuperLink             ◀── Control                  nodes and runs
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import httpx
import tomli_w
from flwr.app import Context, Error, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.clientapp import ClientApp
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    fab_to_proto,
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.serverapp import ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from common.errors import RunError

__all__ = [
    "ClientTask",
    "Control",
    "Endpoint",
    "NodeState",
    "RunNotRunningException",
    "RunState",
    "TaskQueue",
    "node_activations",
    "run_server_task",
]

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_KINDS = {"client": TaskType.CLIENT_APP, "server": TaskType.SERVER_APP}
# Between looks for a task: a busy study has the next one soon, an idle federation costs little. A
# look costs the SuperLink's database about fifteen milliseconds, a SuperNode in memory hardly any.
_LEAST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = {"client": 0.5, "server": 2.0}
_LOST = 2  # the code client.app gives to failures that are no refusals

RunState = Literal["running", "finished", "failed", "unknown"]


@dataclass(frozen=True)
class Endpoint:
    """A Flower HTTP interface on this machine: host:port, and the certificate that verifies it."""

    address: str
    root_certificates: bytes


class TaskQueue:
    """Tasks waiting at a SuperNode or SuperLink."""

    def __init__(self, endpoint: Endpoint, secret: bytes, kind: Literal["client", "server"]):
        """``secret``: what both sides read from the SuperExec secret file."""
        self._kind, self._longest_pause_s = _KINDS[kind], _LONGEST_PAUSE_S[kind]
        self._client = RuntimeHttpClient.from_server_address(
            endpoint.address,
            insecure=False,
            root_certificates=endpoint.root_certificates,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE}),
            ],
        )
        self._pause_s = _LEAST_PAUSE_S

    def take(self) -> str | None:
        """The token of the next task; None, after a pause that grows while none comes."""
        token = self.acquire()
        if token is None:
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
        else:
            self._pause_s = _LEAST_PAUSE_S
        return token

    def acquire(self) -> str | None:
        """The token of the next task; None when none waits or the other side is away."""
        request = AcquireTaskRequest(supported_task_types=[self._kind], agentapp_fab_hashes=[])
        try:
            found = self._client.AcquireTask(request)
        except httpx.HTTPError:
            return None
        return found.token if found.HasField("task") and found.token else None

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class ClientTask:
    """One message for this hospital, pulled from the SuperNode; ``pull`` starts no thread.

    A process that forks after ``pull`` gives its child the message for nothing, and keeps it: a
    child that dies is answered for.
    """

    def __init__(self, endpoint: Endpoint, token: str, message: Message, context: Context) -> None:
        """From ``pull``."""
        self._endpoint, self._token = endpoint, token
        self._message, self._context = message, context

    @classmethod
    def pull(cls, endpoint: Endpoint, token: str) -> ClientTask:
        """The task behind ``token``. The code that was shipped with it is dropped unread."""
        client = _runtime_client(endpoint, token)
        try:
            message, context, _run, _shipped = pull_task_input(client)
        finally:
            client.close()
        return cls(endpoint, token, message, context)

    def answer(self, app: ClientApp, on_answer: Callable[[], None] = lambda: None) -> None:
        """Send what the installed ``app`` answers. Raises what the transport raises.

        ``on_answer`` is called when the answer is there and before any of it is sent.
        """
        reply = app(message=self._message, context=self._context)
        on_answer()
        self._send(reply, SubStatus.COMPLETED, "")

    def fail(self, reason: str) -> None:
        """Answer in place of a process that died: the coordinator learns ``reason``, no more."""
        error = Error(code=_LOST, reason=reason)
        self._send(Message(error, reply_to=self._message), SubStatus.FAILED, reason)

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Heartbeats while the task is worked on."""
        client = _runtime_client(self._endpoint, self._token)
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        try:
            yield
        finally:
            heartbeat.stop()
            client.close()

    def _send(self, reply: Message, outcome: str, details: str) -> None:
        client = _runtime_client(self._endpoint, self._token)
        try:
            push_message(client, reply, self._context)
            push_task_output(client, self._context, outcome, details)
        finally:
            client.close()


def run_server_task(
    endpoint: Endpoint, token: str, app_of: Callable[[Context, HttpGrid], ServerApp]
) -> None:
    """Conduct one run with the installed app. A failure is reported to Flower and raised."""
    grid = HttpGrid(
        runtime_api_address=endpoint.address,
        insecure=False,
        root_certificates=endpoint.root_certificates,
        token=token,
    )
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    outcome, details = SubStatus.FAILED, "the run ended with an error; see the coordinator's log"
    context: Context | None = None
    try:
        pulled = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = pulled.task_id
        TaskIdentity.run_id = pulled.run.run_id
        TaskIdentity.node_id = pulled.context.node_id
        context, run = context_from_proto(pulled.context), run_from_proto(pulled.run)
        context.run_config = dict(run.override_config)
        grid.set_run(run)
        app_of(context, grid)(grid, context)
        outcome, details = SubStatus.COMPLETED, ""
    finally:
        grid._retry_invoker.max_tries = 1
        if context is not None:
            context.state = RecordDict()
        proto = context_to_proto(context) if context else None
        try:
            client.PushTaskOutput(
                PushTaskOutputRequest(context=proto, sub_status=outcome, details=details)
            )
        finally:
            heartbeat.stop()
            grid.close()


def node_activations(grid: HttpGrid) -> dict[int, datetime]:
    """Of each node that is online: when its SuperNode started last."""
    return {
        node.node_id: datetime.fromisoformat(node.last_activated_at)
        for node in grid.get_nodes()
        if node.last_activated_at
    }


@dataclass(frozen=True)
class NodeState:
    """A registered node as the SuperLink sees it."""

    node_id: int
    name: str
    is_online: bool


class Control:
    """Nodes and runs of a SuperLink. Raises RunError when it is away or declines."""

    def __init__(self, endpoint: Endpoint) -> None:
        """``endpoint``: the SuperLink on this machine."""
        self._client = ControlHttpClient.from_server_address(
            endpoint.address,
            insecure=False,
            root_certificates=endpoint.root_certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def register_node(self, public_key_pem: bytes, name: str) -> int:
        """Let the SuperNode with this key connect; its node id, the same when repeated."""
        with _spoken("register a node"):
            known = self._nodes()
            if public_key_pem in known:
                return int(known[public_key_pem].node_id)
            request = RegisterNodeRequest(public_key=public_key_pem, name=name)
            return int(self._client.RegisterNode(request).node_id)

    def unregister_node(self, node_id: int) -> None:
        """Shut a node out; one that is not registered is left alone."""
        with _spoken("unregister a node"):
            if any(one.node_id == node_id for one in self._nodes().values()):
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> list[NodeState]:
        """All registered nodes."""
        with _spoken("list the nodes"):
            return [
                NodeState(int(one.node_id), str(one.name), one.status == "online")
                for one in self._nodes().values()
            ]

    def start_run(self, settings: Mapping[str, str]) -> int:
        """Start a run whose apps will read ``settings``; its id."""
        bundle = _empty_bundle(settings)
        request = StartRunRequest(
            fab=fab_to_proto(bundle), override_config=user_config_to_proto(dict(settings))
        )
        with _spoken("start a run"):
            started = self._client.StartRun(request)
        if not started.HasField("run_id"):
            raise RunError("the SuperLink did not start the run; see its log")
        return int(started.run_id)

    def stop_run(self, run_id: int) -> None:
        """Stop a run; one that has ended is left alone."""
        if self.run_state(run_id) == "running":
            with _spoken("stop a run"):
                self._client.StopRun(StopRunRequest(run_id=run_id))

    def run_state(self, run_id: int) -> RunState:
        """How a run stands; ``unknown`` when the SuperLink never heard of it."""
        try:
            with _spoken("look up a run"):
                found = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        except RunError as error:
            if isinstance(error.__cause__, httpx.HTTPStatusError):
                return "unknown"
            raise
        if run_id not in found:
            return "unknown"
        status = found[run_id].status
        if status.status != Status.FINISHED:
            return "running"
        return "finished" if status.sub_status == SubStatus.COMPLETED else "failed"

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _nodes(self) -> dict[bytes, NodeInfo]:
        listed = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {bytes(one.public_key): one for one in listed if one.status != "unregistered"}


def _runtime_client(endpoint: Endpoint, token: str) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        endpoint.address,
        insecure=False,
        root_certificates=endpoint.root_certificates,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(token),
        ],
        retry_invoker=make_simple_http_retry_invoker(),
    )


@contextmanager
def _spoken(wish: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        raise RunError(f"the SuperLink declined to {wish} (HTTP {status}); see its log") from error
    except httpx.HTTPError as error:
        raise RunError(
            f"the SuperLink could not be asked to {wish} ({type(error).__name__}); is it running?"
        ) from error


def _empty_bundle(settings: Mapping[str, str]) -> Fab:
    """What Flower demands of a run: a bundle. Ours names two apps and holds no code."""
    project = {
        "project": {"name": "consilium", "version": "0.0.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "consilium",
                    "components": {
                        "serverapp": "server.app:app",
                        "clientapp": "client.app:app",
                    },
                    "config": dict.fromkeys(settings, ""),
                }
            }
        },
    }
    data, _ = build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode()})
    return Fab(hashlib.sha256(data).hexdigest(), data, {})
