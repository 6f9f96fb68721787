"""A coordinator in memory for tests: its folder is real, Flower and nginx are not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI

from common.enrolment import Answer, JoinCode, JoinReply, JoinRequest, Offered
from common.flower_tasks import RunState
from common.identity import Identity
from server.desk import UnavailableError, create_desk, open_desk
from server.service import Service
from server.settings import CoordinatorSettings

START = datetime(2030, 1, 1, tzinfo=UTC)


class FakeClock:
    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def pass_by(self, **length: float) -> None:
        self.now += timedelta(**length)


@dataclass
class FakeFederation:
    """Flower's SuperLink as a dictionary. ``is_away``: it cannot be asked."""

    keys: dict[int, str] = field(default_factory=dict)
    runs: dict[int, RunState] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    is_away: bool = False
    # Above what a signed 64-bit column could hold.
    next_id: int = 2**63 + 1

    def register_node(self, public_key_pem: str, name: str) -> int:
        self._asked()
        for node, key in self.keys.items():
            if key == public_key_pem:
                return node
        self.keys[self._id()] = public_key_pem
        return max(self.keys)

    def unregister_node(self, node_id: int) -> None:
        self._asked()
        self.keys.pop(node_id, None)

    def nodes(self) -> Mapping[int, bool]:
        self._asked()
        return dict.fromkeys(self.keys, True)

    def start_run(self, study_id: str) -> int:
        self._asked()
        self.started.append(study_id)
        run = self._id()
        self.runs[run] = "running"
        return run

    def stop_run(self, run_id: int) -> None:
        self._asked()
        if self.runs.get(run_id) == "running":
            self.runs[run_id] = "failed"

    def run_status(self, run_id: int) -> RunState:
        self._asked()
        return self.runs.get(run_id, "unknown")

    def _asked(self) -> None:
        if self.is_away:
            raise UnavailableError("the SuperLink could not be asked")

    def _id(self) -> int:
        self.next_id += 1
        return self.next_id


@dataclass
class FakeEdge:
    keys: dict[str, str] = field(default_factory=dict)
    published: int = 0

    def publish(self, keys: Mapping[str, str]) -> None:
        self.keys = dict(keys)
        self.published += 1


@dataclass
class FakeHospital:
    """A hospital's keys, and what it would send."""

    name: str
    identity: Identity = field(default_factory=Identity.generate)
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP384R1())
    )
    reply: JoinReply | None = None

    def request(self, name: str = "whatever it likes") -> str:
        return certificate_request(self.key, name)

    def join_request(self, code: JoinCode) -> JoinRequest:
        return JoinRequest.make(code, self.request(), self.identity)

    @property
    def public_pem(self) -> str:
        return (
            self.key.public_key()
            .public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            .decode()
        )

    @property
    def certificate(self) -> x509.Certificate:
        assert self.reply
        return x509.load_pem_x509_certificate(self.reply.certificate.encode())

    @property
    def serial(self) -> str:
        return f"{self.certificate.serial_number:x}"

    def answer(self, offered: Offered, decision: str = "approve", at: datetime = START) -> Answer:
        return Answer.make(
            offered.offer,
            hospital=self.name,
            decision=decision,  # type: ignore[arg-type]
            answered_at=at,
            identity=self.identity,
        )


def certificate_request(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


class AppTransport(httpx.BaseTransport):
    """Requests answered by an application in memory."""

    def __init__(self, app: FastAPI) -> None:
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run(self._answer(request))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        reply = await self._transport.handle_async_request(request)
        content = await reply.aread()
        return httpx.Response(reply.status_code, headers=reply.headers, content=content)


def client_of(app: FastAPI, token: str = "") -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(transport=AppTransport(app), base_url="http://localhost", headers=headers)


@dataclass
class World:
    """A coordinator's service over fakes."""

    service: Service
    federation: FakeFederation
    edge: FakeEdge
    clock: FakeClock

    def join(self, name: str) -> FakeHospital:
        hospital = FakeHospital(name)
        code = self.service.admission.enroll(name, actor="local")
        hospital.reply = self.service.admission.join(hospital.join_request(code))
        return hospital

    def agree(self, *hospitals: FakeHospital, decision: str = "approve") -> None:
        """All answer their newest offer."""
        for one in hospitals:
            known = self.service.admission.active(one.name)
            newest = self.service.studies.offered_to(one.name)[0]
            self.service.studies.answer(known, one.answer(newest, decision))


def settings(**changes: object) -> CoordinatorSettings:
    return CoordinatorSettings.model_validate(
        {"host": ("coordinator.example", "127.0.0.1"), **changes}
    )


@contextmanager
def world_at(
    path: Path,
    clock: FakeClock,
    federation: FakeFederation | None = None,
    edge: FakeEdge | None = None,
) -> Iterator[World]:
    """Open the coordinator at ``path``, made if there is none."""
    if not (path / "coordinator.toml").exists():
        create_desk(path, settings(), {}, clock)
    federation, edge = federation or FakeFederation(), edge or FakeEdge()
    with open_desk(path, {}, clock) as desk:
        yield World(Service.over(desk, federation, edge), federation, edge, clock)
