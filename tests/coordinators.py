"""A coordinator's authority and its hospital API, small enough to lie in any way a test wants."""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.checkpoint import Checkpoint, countersign
from common.enrolment import (
    PREFIX,
    Answer,
    JoinCode,
    JoinReply,
    JoinRequest,
    Offered,
    RenewRequest,
    parse_message,
)
from common.identity import Identity, PublicIdentity

PEM = serialization.Encoding.PEM
SECRET = b"0123456789abcdefghij"


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


class Pki:
    """An authority of its own."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        identifier = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        self.ca = (
            self._builder("authority", self.key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(identifier, critical=False)
            .sign(self.key, hashes.SHA384())
        )

    def _builder(
        self, name: str, public: ec.EllipticCurvePublicKey, start: datetime | None = None
    ) -> x509.CertificateBuilder:
        start = start or datetime.now(UTC) - timedelta(minutes=5)
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name("authority"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=30))
        )

    @property
    def pem(self) -> str:
        return self.ca.public_bytes(PEM).decode()

    def issue(
        self,
        name: str,
        public: ec.EllipticCurvePublicKey,
        *,
        hosts: tuple[str, ...] = (),
        start: datetime | None = None,
    ) -> str:
        """A certificate for a hospital, or with ``hosts`` for the coordinator."""
        use = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = self._builder(name, public, start).add_extension(
            x509.ExtendedKeyUsage([use]), critical=False
        )
        if hosts:
            names: list[x509.GeneralName] = []
            for host in hosts:
                try:
                    names.append(x509.IPAddress(ip_address(host)))
                except ValueError:
                    names.append(x509.DNSName(host))
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA384()).public_bytes(PEM).decode()

    def server_context(
        self, *, hosts: tuple[str, ...] = ("localhost",), start: datetime | None = None
    ) -> ssl.SSLContext:
        """Demands a client certificate by this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.pem)
        key = ec.generate_private_key(ec.SECP256R1())
        _load(context, self.issue("server", key.public_key(), hosts=hosts, start=start), key)
        return context

    def client_context(
        self, name: str, *, trusting: Pki | None = None, signed_by: Pki | None = None
    ) -> ssl.SSLContext:
        """A hospital's side; ``trusting`` and ``signed_by`` make it a stranger's."""
        context = ssl.create_default_context(cadata=(trusting or self).pem)
        key = ec.generate_private_key(ec.SECP384R1())
        _load(context, (signed_by or self).issue(name, key.public_key()), key)
        return context


def _load(context: ssl.SSLContext, certificate: str, key: ec.EllipticCurvePrivateKey) -> None:
    plain = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with tempfile.NamedTemporaryFile() as both:
        both.write(certificate.encode() + plain)
        both.flush()
        context.load_cert_chain(both.name)


@dataclass
class FakeCoordinator:
    """Over real TLS on loopback. Change its fields to make it lie."""

    pki: Pki = field(default_factory=Pki)
    identity: Identity = field(default_factory=Identity.generate)
    hosts: tuple[str, ...] = ("localhost",)
    started: datetime | None = None
    offers: list[Offered] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    joined: dict[str, tuple[PublicIdentity, bytes]] = field(default_factory=dict)
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    revoked: bool = False
    join_reply: Callable[[JoinReply], JoinReply] = lambda reply: reply
    before_reply: Callable[[str], None] = lambda path: None
    port: int = 0

    def code(self, name: str = "north", **changes: object) -> JoinCode:
        facts: dict[str, object] = {
            "address": f"localhost:{self.port}",
            "ca_sha256": self.pki.ca.fingerprint(hashes.SHA256()).hex(),
            "name": name,
            "secret": SECRET,
        }
        return JoinCode(**(facts | changes))  # type: ignore[arg-type]

    @contextmanager
    def serving(self) -> Iterator[FakeCoordinator]:
        """Serves until the end of the block."""
        world = self

        class Handler(_Handler):
            coordinator = world

        server = _QuietServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        context = self.pki.server_context(hosts=self.hosts, start=self.started)
        context.verify_mode = ssl.CERT_OPTIONAL
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def handle(self, method: str, path: str, body: bytes, name: str) -> tuple[int, str]:
        """Status and text."""
        if (method, path) == ("GET", "/ca"):
            return 200, self.pki.pem
        if (method, path) == ("POST", "/join"):
            return self._join(parse_message(JoinRequest, body))
        if not name or self.revoked:
            return 400, "<html>The SSL certificate error</html>"
        who, _ = self.joined[name]
        acts: dict[tuple[str, str], Callable[[bytes, str, PublicIdentity], str]] = {
            ("GET", "/studies"): self._studies,
            ("POST", "/answers"): self._take,
            ("POST", "/renew"): self._renew,
            ("POST", "/checkpoints"): self._countersign,
        }
        return (200, acts[method, path](body, name, who)) if (method, path) in acts else (404, "")

    def _studies(self, _body: bytes, _name: str, _who: PublicIdentity) -> str:
        return "[" + ",".join(one.model_dump_json() for one in self.offers) + "]"

    def _take(self, body: bytes, _name: str, _who: PublicIdentity) -> str:
        answer = parse_message(Answer, body)
        self.answers.append(answer)
        self.offers = [
            one.model_copy(update={"answer": answer}) if one.offer.digest == answer.digest else one
            for one in self.offers
        ]
        return "{}"

    def _renew(self, body: bytes, name: str, who: PublicIdentity) -> str:
        renewal = parse_message(RenewRequest, body)
        renewal.verify(who)
        return self._reply(name, renewal.certificate_request).model_dump_json()

    def _countersign(self, body: bytes, name: str, who: PublicIdentity) -> str:
        self.checkpoints[name] = countersign(
            Checkpoint.from_text(body.decode()),
            coordinator=self.identity,
            hospital=who,
            previous=self.checkpoints.get(name),
        )
        return self.checkpoints[name].text()

    def _join(self, request: JoinRequest) -> tuple[int, str]:
        who = request.verify()
        key = x509.load_pem_x509_csr(request.certificate_request.encode()).public_key()
        spki = key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        known = self.joined.get(request.name)
        if request.secret != base64.b64encode(SECRET).decode():
            return 403, json.dumps(
                {"error": "code: expected one that is not used up, found another"}
            )
        if known is not None and known != (who, spki):
            return 403, json.dumps({"error": f"code: {request.name} joined with it already"})
        self.joined[request.name] = (who, spki)
        reply = self._reply(request.name, request.certificate_request)
        return 200, self.join_reply(reply).model_dump_json()

    def _reply(self, name: str, request: str) -> JoinReply:
        key = x509.load_pem_x509_csr(request.encode()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return JoinReply(
            certificate=self.pki.issue(name, key),
            ca=self.pki.pem,
            coordinator=self.identity.public.text(),
        )


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    coordinator: FakeCoordinator
    protocol_version = "HTTP/1.1"
    timeout = 10

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("content-length", 0))
        body = self.rfile.read(length)
        found = self.connection.getpeercert() or {}  # type: ignore[attr-defined]
        subject = {key: value for pair in found.get("subject", ()) for key, value in pair}
        path = self.path.removeprefix(PREFIX)
        self.coordinator.before_reply(path)
        status, text = self.coordinator.handle(method, path, body, subject.get("commonName", ""))
        data = text.encode()
        self.send_response_only(status)
        self.send_header("date", format_datetime(self.coordinator.clock(), usegmt=True))
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


def read_all(folder: Path) -> bytes:
    """Every byte of every file below ``folder``."""
    return b"".join(one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file())
