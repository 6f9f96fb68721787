"""The public entrance for real: nginx before a SuperLink and a hospital API that only echo."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.enrolment import PREFIX
from common.errors import RunError
from common.loopback import make_loopback_certificate
from common.secretfiles import WrappingKey
from server.desk import create_desk, open_desk
from server.nginx import (
    HOSPITAL_HEADER,
    SERIAL_HEADER,
    NginxEdge,
    check_config,
    header_of,
    nginx_argv,
    nginx_config,
)
from server.pki import Authority, Revoked
from server.settings import CoordinatorFolder, CoordinatorSettings
from tests.unit.coordinator import certificate_request

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


class Echo(BaseHTTPRequestHandler):
    """Answers with what arrived."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen = {"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}}
        body = json.dumps(seen).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass

    def address_string(self) -> str:
        return ""


class UnixServer(ThreadingHTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "api", 0

    def get_request(self) -> tuple[Any, Any]:
        request, _ = self.socket.accept()
        return request, ("unix", 0)


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Member:
    """A hospital's certificate and key as files."""

    name: str
    serial: str
    public_key: str
    files: tuple[Path, Path]


@dataclass
class Entrance:
    folder: CoordinatorFolder
    settings: CoordinatorSettings
    authority: Authority
    path: Path
    bound: dict[str, str] = field(default_factory=dict)

    def member(self, name: str, authority: Authority | None = None, *, days_ago: int = 0) -> Member:
        """With a certificate for one day, issued so many days ago."""
        key = ec.generate_private_key(ec.SECP384R1())
        issued = (authority or self.authority).issue(
            name,
            certificate_request(key, name),
            now=datetime.now(UTC) - timedelta(days=days_ago),
            days=1,
        )
        files = (self.path / f"{issued.serial}.pem", self.path / f"{issued.serial}.key")
        files[0].write_text(issued.certificate)
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return Member(name, issued.serial, issued.public_key, files)

    def connect(self, member: Member | None = None) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.folder.pki / "ca.pem"))
        if member:
            context.load_cert_chain(*member.files)
        return http.client.HTTPSConnection(
            "localhost", self.settings.port, context=context, timeout=10
        )

    def ask(
        self,
        path: str,
        member: Member | None = None,
        *,
        key: str = "",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        sent = dict(headers or {}) | ({"flwr-public-key": header_of(key)} if key else {})
        with closing(self.connect(member)) as connection:
            connection.request("POST" if body is not None else "GET", path, body, sent)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

    def edge(self) -> NginxEdge:
        return NginxEdge(self.folder, self.settings)


@contextmanager
def entrance(path: Path, spoil: Callable[[str], str] = lambda text: text) -> Iterator[Entrance]:
    """A folder, both upstreams and nginx, all on free ports of loopback."""
    port, superlink = free_ports(2)
    settings = CoordinatorSettings(
        host=("localhost", "127.0.0.1"), port=port, superlink_port=superlink
    )
    folder = create_desk(path / "desk", settings, {})
    loopback = make_loopback_certificate(folder.run)
    with open_desk(folder.path, {}) as desk:
        authority = desk.authority
    made = Entrance(folder, settings, authority, path)
    server = ThreadingHTTPServer(("127.0.0.1", superlink), Echo)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(loopback.certificate, loopback.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server), serving(UnixServer(str(folder.hospital_socket), Echo)):  # type: ignore[arg-type]
        north, south = made.member("north"), made.member("south")
        made.bound = {"north": north.public_key, "south": south.public_key}
        text = nginx_config(folder, settings, made.bound)
        folder.nginx_conf.write_text(spoil(text))
        check_config(folder)
        with (folder.logs / "nginx.log").open("wb") as log:
            process = subprocess.Popen(nginx_argv(folder), stdout=log, stderr=log)
        try:
            until(lambda: accepts(port), process)
            made.north, made.south = north, south  # type: ignore[attr-defined]
            yield made
        finally:
            process.terminate()
            process.wait(15)


def accepts(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(is_true: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with entrance(tmp_path_factory.mktemp("nginx")) as made:
        yield made


FLEET = "/v1/fleet/pull"


def test_a_hospital_reaches_flower_with_its_own_key(door: Any) -> None:
    status, seen = door.ask(FLEET, door.north, key=door.north.public_key, body=b"x" * 3_000_000)
    assert (status, seen["path"]) == (200, FLEET)
    assert seen["headers"]["flwr-public-key"] == header_of(door.north.public_key)


def test_a_stranger_reaches_neither(door: Any) -> None:
    for path in (FLEET, f"{PREFIX}/studies", f"{PREFIX}/renew"):
        status, answer = door.ask(path, key=door.north.public_key)
        assert status == 401, path
        assert "join first" in answer["error"]


@pytest.mark.parametrize("key", ["", "south", "unknown"])
def test_a_certificate_without_its_own_node_key_does_not_reach_flower(door: Any, key: str) -> None:
    sent = {"": "", "south": door.south.public_key, "unknown": "nonsense"}[key]
    assert door.ask(FLEET, door.north, key=sent)[0] == 401
    assert door.ask(f"{PREFIX}/studies", door.north, key=sent)[0] == 200


def test_a_certificate_of_an_enrolled_name_alone_is_not_enough(door: Any) -> None:
    status, _ = door.ask(FLEET, door.member("west"), key=door.north.public_key)
    assert status == 401
    assert door.ask(f"{PREFIX}/studies", door.member("west"))[0] == 401


def test_a_certificate_of_another_authority_is_refused(door: Any, tmp_path: Path) -> None:
    key = WrappingKey(key=b"k" * 32)
    other = Authority.create(tmp_path / "pki", key=key, now=datetime.now(UTC))
    false = door.member("north", other)
    for path in (FLEET, f"{PREFIX}/ca"):
        status, answer = door.ask(path, false, key=door.north.public_key)
        assert status == 403
        assert "revoked, expired or unknown" in answer["error"]


def test_an_expired_certificate_is_refused(door: Any) -> None:
    old = door.member("north", days_ago=3)
    for path in (FLEET, f"{PREFIX}/studies"):
        status, answer = door.ask(path, old, key=old.public_key)
        assert status == 403
        assert "expired" in answer["error"]


def test_the_hospital_api_is_told_who_calls_by_nginx_alone(door: Any) -> None:
    lies = {HOSPITAL_HEADER: "south", SERIAL_HEADER: "ff", "X_Consilium_Hospital": "south"}
    status, seen = door.ask(f"{PREFIX}/studies", door.north, headers=lies)
    assert status == 200
    assert seen["headers"][HOSPITAL_HEADER.lower()] == "north"
    assert int(seen["headers"][SERIAL_HEADER.lower()], 16) == int(door.north.serial, 16)
    assert "x_consilium_hospital" not in seen["headers"]
    for path in ("ca", "join"):
        body = b"{}" if path == "join" else None
        status, seen = door.ask(f"{PREFIX}/{path}", headers=lies, body=body)
        assert (status, seen["path"]) == (200, f"{PREFIX}/{path}")
        assert HOSPITAL_HEADER.lower() not in seen["headers"]
        assert SERIAL_HEADER.lower() not in seen["headers"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/control/StartRun",
        "/v1/runtime/AcquireTask",
        "/flwr.proto.Runtime/AcquireTask",
        "/v1/fleet",
        "/v1/fleet/../control/StartRun",
        "/v1/fleet/%2e%2e/control/StartRun",
        "/v1/fleet/..%2fcontrol/StartRun",
        "/v1/fleet/x/../../runtime/AcquireTask",
        "/V1/FLEET/pull",
        "/api/v1/status",
        "/metrics",
        "/hospital/v1",
        "/hospital/v1/../../api/v1/status",
    ],
)
def test_everything_else_is_not_there(door: Any, path: str) -> None:
    status, answer = door.ask(path, door.north, key=door.north.public_key)
    assert (status, list(answer)) == (404, ["error"])


def test_what_is_forwarded_is_the_path_nginx_decided_on(door: Any) -> None:
    status, seen = door.ask("//v1/control/../fleet//pull", door.north, key=door.north.public_key)
    assert (status, seen["path"]) == (200, FLEET)


def test_plain_http_old_tls_and_large_bodies_are_refused(door: Any) -> None:
    with closing(http.client.HTTPConnection("localhost", door.settings.port, timeout=10)) as plain:
        plain.request("GET", f"{PREFIX}/ca")
        assert plain.getresponse().status == 400
    assert door.ask(f"{PREFIX}/answers", door.north, body=b"x" * 2_200_000)[0] == 413
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("localhost", door.settings.port), timeout=10) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(raw)


def test_the_access_log_has_no_query_strings(door: Any) -> None:
    door.ask(f"{PREFIX}/studies?secret=hush", door.north)
    log = door.folder.logs / "access.log"
    until(lambda: f"{PREFIX}/studies" in log.read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(line["hospital"] == "north" for line in lines)
    assert "hush" not in log.read_text()


def test_revocation_reaches_open_connections_and_new_ones(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    with entrance(tmp_path) as door, closing(door.connect(door.north)) as open_before:  # type: ignore[attr-defined]
        north, south = door.north, door.south  # type: ignore[attr-defined]

        def on_open_connection() -> int:
            open_before.request("GET", f"{PREFIX}/studies")
            reply = open_before.getresponse()
            reply.read()
            return reply.status

        assert on_open_connection() == 200
        door.authority.write_crl(
            [Revoked(serial=north.serial, at=datetime.now(UTC))], now=datetime.now(UTC)
        )
        # Of the two locks, each alone: the revocation list here, the list of names below.
        door.edge().publish(door.bound)

        def is_shut() -> bool:
            try:
                return on_open_connection() != 200
            except (http.client.HTTPException, OSError):
                open_before.close()
                return door.ask(FLEET, north, key=north.public_key)[0] == 403

        until(is_shut)
        until(lambda: door.ask(f"{PREFIX}/studies", north)[0] == 403)
        assert door.ask(FLEET, south, key=south.public_key)[0] == 200
        door.edge().publish({"north": door.bound["north"]})
        until(lambda: door.ask(FLEET, south, key=south.public_key)[0] == 401)


def test_joining_is_limited_and_half_open_connections_are_closed(tmp_path: Path) -> None:
    def hurried(text: str) -> str:
        assert "client_header_timeout 15s" in text
        assert "client_body_timeout 30s" in text
        return text.replace("client_header_timeout 15s", "client_header_timeout 1s").replace(
            "client_body_timeout 30s", "client_body_timeout 1s"
        )

    with entrance(tmp_path, hurried) as door:
        found = [door.ask(f"{PREFIX}/join", body=b"{}")[0] for _ in range(9)]
        assert found.count(200) in (
            7,
            8,
        )  # one, a burst of six, and perhaps one that grew meanwhile
        assert found[-1] == 429
        port = door.settings.port
        with socket.create_connection(("localhost", port), timeout=10) as silent:
            assert silent.recv(1) == b""  # closed before any handshake
        connection = door.connect()
        connection.connect()
        connection.sock.sendall(b"GET / HT")
        with closing(connection):
            assert connection.sock.recv(1) == b""
        slow = door.connect()
        slow.connect()
        slow.sock.sendall(
            f"POST {PREFIX}/join HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx".encode()
        )
        with closing(slow):
            assert b"HTTP/1.1 200" not in slow.sock.recv(100)


def test_a_superlink_with_another_certificate_is_not_believed(tmp_path: Path) -> None:
    with entrance(tmp_path) as door:
        north = door.north  # type: ignore[attr-defined]
        assert door.ask(FLEET, north, key=north.public_key)[0] == 200
        make_loopback_certificate(door.folder.run)  # as after a restart that nginx missed
        door.edge().publish(door.bound)
        until(lambda: door.ask(FLEET, north, key=north.public_key)[0] == 502)


def test_a_configuration_nginx_refuses_is_an_error_and_not_loaded(tmp_path: Path) -> None:
    with entrance(tmp_path) as door:
        (door.folder.pki / "crl.pem").write_text("nonsense")
        with pytest.raises(RunError, match="nginx: refuses"):
            door.edge().publish(door.bound)
        assert door.ask(f"{PREFIX}/ca")[0] == 200


def test_paths_nginx_would_misread_are_refused(tmp_path: Path) -> None:
    odd = CoordinatorFolder(tmp_path / 'a"$b')
    with pytest.raises(RunError, match="expected a path"):
        nginx_config(odd, CoordinatorSettings(host=("localhost",)), {})
