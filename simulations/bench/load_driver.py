"""Many light hospitals in one process, over the SuperLink's real Fleet interface.

Each has its own key, connection and node. It fetches every byte of what it is sent, as a SuperNode
does, and answers with random numbers of the right shape: what is measured is the coordinator.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from numpy.typing import NDArray

from common.flower import pack, unpack
from common.wire import Hello, HelloReply, TrainReply

HEARTBEAT_S = 60.0
_WORKERS = 2
_IDLE_S = 1.0  # a SuperNode asks every three seconds


@dataclass
class LightHospital:
    """One node. ``poll`` answers at most one message."""

    name: str
    client: FleetHttpClient
    key: bytes
    update: NDArray[np.float32]
    node: Node = field(default_factory=Node)
    next_poll: float = 0.0
    next_heartbeat: float = 0.0

    def activate(self) -> None:
        """Connect."""
        answer = self.client.ActivateNode(
            ActivateNodeRequest(public_key=self.key, heartbeat_interval=HEARTBEAT_S)
        )
        self.node = Node(node_id=answer.node_id)
        self.next_heartbeat = time.monotonic() + HEARTBEAT_S / 3

    def poll(self) -> None:
        """One turn: a heartbeat when due, and a message when one waits."""
        now = time.monotonic()
        if now > self.next_heartbeat:
            self.client.SendNodeHeartbeat(
                SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_S)
            )
            self.next_heartbeat = now + HEARTBEAT_S / 3
        pulled = self.client.PullMessages(PullMessagesRequest(node=self.node))
        if not pulled.messages_list:
            self.next_poll = now + _IDLE_S
            return
        run_id = message_from_proto(pulled.messages_list[0]).metadata.run_id
        tree = pulled.message_object_trees[0]
        message: Message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self.client.PullObject, self.node, run_id),
            make_confirm_message_received_fn_protobuf(
                self.client.ConfirmMessageReceived, self.node, run_id
            ),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        self._push(Message(pack(self._answer(message)), reply_to=message), run_id)

    def _answer(self, message: Message) -> Any:
        if message.metadata.message_type == "query.hello":
            asked = unpack(Hello, message.content)
            return HelloReply(
                hospital=self.name,
                study_digest=asked.study_digest,
                declared_patients=100,
                secret_noise=False,
                identity="",
            )
        asked_for: Any = message.content["values"]
        # Another update each time, or Flower would store equal ones once.
        self.update[0] = np.float32(time.monotonic() % 1)
        return TrainReply(
            hospital=self.name,
            stage=str(asked_for["stage"]),
            round=asked_for["round"],
            update=torch.from_numpy(self.update),
        )

    def _push(self, reply: Message, run_id: int) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            answer = self.client.PushMessages(
                PushMessagesRequest(
                    node=self.node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[0.0],
                )
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(
                    self.client.PushObject, self.node, run_id, answer.session_id
                ),
                object_ids_to_push=set(answer.objects_to_push),
            )


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key as Flower's header and registry know it."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def drive(hospitals: list[LightHospital], stop: threading.Event) -> None:
    """Let all take turns until told to stop; a turn that fails is taken again."""
    busy: set[str] = set()
    lock = threading.Lock()

    def turn() -> None:
        while not stop.is_set():
            now = time.monotonic()
            with lock:
                due = [one for one in hospitals if one.name not in busy and one.next_poll <= now]
                chosen = min(due, key=lambda one: one.next_poll, default=None)
                if chosen:
                    busy.add(chosen.name)
            if chosen is None:
                time.sleep(0.02)
                continue
            try:
                chosen.poll()
            except (httpx.HTTPError, RuntimeError):
                chosen.next_poll = now + _IDLE_S
            finally:
                with lock:
                    busy.discard(chosen.name)

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in range(_WORKERS):
            pool.submit(turn)


def main() -> None:
    """``python -m simulations.bench.load_driver PLAN.json``; ends when its input closes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    plan = json.loads(parser.parse_args().plan.read_text())
    hospitals: list[LightHospital] = []
    for name, path in plan["hospitals"].items():
        key = serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101
        client = FleetHttpClient.from_server_address(
            plan["address"],
            insecure=False,
            root_certificates=plan["root_certificates"],
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        update = np.random.default_rng(len(hospitals)).normal(0, 1e-6, plan["size"])
        hospitals.append(LightHospital(name, client, public_pem(key), update.astype(np.float32)))
    for one in hospitals:
        one.activate()
    print("ready", flush=True)
    stop = threading.Event()
    driver = threading.Thread(target=drive, args=(hospitals, stop))
    driver.start()
    sys.stdin.read()
    stop.set()
    driver.join()


if __name__ == "__main__":
    main()
