"""Joining, renewing and talking to a coordinator over real TLS; every stranger is found out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from client import link as link_module
from client.link import Coordinator, connect, join, renew
from client.linkfolder import (
    LinkFolder,
    days_left,
    is_due,
    memory_file,
    mutual_context,
    node_key,
    write_memory_file,
)
from client.safe import create_safe
from common.enrolment import JoinReply
from common.errors import ConsiliumError, LinkError, SecretError
from common.identity import Identity
from common.secretfiles import WrappingKey
from tests.coordinators import FakeCoordinator, Pki, read_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_safe(tmp_path / "north", {})
    return tmp_path / "north"


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator().serving() as world:
        yield world


def keys(folder: Path) -> tuple[Identity, WrappingKey]:
    wrapping = WrappingKey.of_folder(folder, {})
    return Identity.load(folder / "identity", key=wrapping), wrapping


def enter(folder: Path, world: FakeCoordinator, **changes: object) -> None:
    join(folder, world.code(**changes), *keys(folder))


def test_joining_pins_the_coordinator_and_keeps_the_key(
    folder: Path, coordinator: FakeCoordinator
) -> None:
    enter(folder, coordinator)
    link = LinkFolder(folder)
    facts = link.facts()
    assert (facts.name, facts.host, facts.port) == ("north", "localhost", coordinator.port)
    assert facts.identity == coordinator.identity.public
    for path in link.path.iterdir():
        assert path.stat().st_mode & 0o077 == 0
    _, wrapping = keys(folder)
    key = link.read_key(wrapping)
    assert isinstance(key.curve, ec.SECP384R1)
    assert link.read_certificate().public_key() == key.public_key()
    with connect(folder, wrapping) as opened:
        assert opened.studies() == []
        assert abs(opened.clock_offset_s()) < 2


def test_no_key_is_ever_in_clear_on_disk(folder: Path, coordinator: FakeCoordinator) -> None:
    enter(folder, coordinator)
    _, wrapping = keys(folder)
    mutual_context(LinkFolder(folder), wrapping)
    key = LinkFolder(folder).read_key(wrapping)
    secret = key.private_numbers().private_value.to_bytes(48, "big")
    everything = read_all(folder)
    assert secret not in everything
    assert b"PRIVATE KEY" not in everything


def test_the_node_key_is_handed_over_in_memory() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with memory_file("node", node_key(key)) as descriptor:
        path = Path(f"/proc/self/fd/{descriptor}")
        for _ in range(2):  # a restarted program reads it again
            found = load_ssh_private_key(path.read_bytes(), None)
            assert found.private_numbers() == key.private_numbers()  # type: ignore[union-attr]
        write_memory_file(descriptor, b"short")
        assert path.read_bytes() == b"short"
        assert os.fstat(descriptor).st_nlink == 0  # no folder knows it


@pytest.mark.parametrize("path", ["/ca", "/join"])
def test_a_lost_connection_leaves_a_folder_that_can_join(
    folder: Path, coordinator: FakeCoordinator, path: str
) -> None:
    """The coordinator may have used the code up and its answer been lost: the key is the same."""

    def break_off(asked: str) -> None:
        if asked == path:
            coordinator.before_reply = lambda _: None
            if path == "/join":
                coordinator.join_reply = lambda _: (_ for _ in ()).throw(ConnectionError)  # type: ignore[assignment]
            else:
                raise ConnectionError

    coordinator.before_reply = break_off
    with pytest.raises(LinkError, match="broke off"):
        enter(folder, coordinator)
    assert not LinkFolder(folder).is_joined
    coordinator.join_reply = lambda reply: reply
    enter(folder, coordinator)
    enter(folder, coordinator)  # again, joined already
    assert LinkFolder(folder).is_joined


def test_a_crash_at_any_write_leaves_a_folder_that_can_join(
    folder: Path, coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import linkfolder
    from common import secretfiles

    real = secretfiles.replace_file
    for survivors in range(6):
        left = survivors

        def crashing(path: Path, data: bytes, *, mode: int = 0o600) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            real(path, data, mode=mode)

        with monkeypatch.context() as patched:
            for module in (linkfolder, link_module, secretfiles):
                patched.setattr(module, "replace_file", crashing)
            try:
                enter(folder, coordinator)
            except KeyboardInterrupt:
                assert survivors < 5
                continue
        break
    _, wrapping = keys(folder)
    with connect(folder, wrapping) as opened:
        assert opened.studies() == []
    assert not list(LinkFolder(folder).path.glob("*.new"))


def test_renewal_keeps_the_key_and_rotation_changes_it(
    folder: Path, coordinator: FakeCoordinator
) -> None:
    enter(folder, coordinator)
    identity, wrapping = keys(folder)
    link = LinkFolder(folder)
    first = link.read_certificate()
    now = datetime.now(UTC)
    assert not is_due(first, now)
    assert is_due(first, now + timedelta(days=21))
    assert 29 < days_left(first, now) < 30
    link.new_key(wrapping)  # left by a rotation that never got its answer
    with connect(folder, wrapping) as opened:
        second = renew(folder, opened, identity, wrapping)
        assert second.public_key() == first.public_key()
        assert second.serial_number != first.serial_number
        mutual_context(link, wrapping)
        third = renew(folder, opened, identity, wrapping, with_new_key=True)
    assert third.public_key() != first.public_key()
    assert link.read_key(wrapping).public_key() == third.public_key()
    with connect(folder, wrapping) as opened:
        assert opened.studies() == []


def test_a_rotation_cut_in_the_middle_is_finished(
    folder: Path, coordinator: FakeCoordinator
) -> None:
    enter(folder, coordinator)
    _, wrapping = keys(folder)
    link = LinkFolder(folder)
    key = link.new_key(wrapping)
    public = key.public_key()
    (link.path / "client.pem.new").write_text(coordinator.pki.issue("north", public))
    (link.path / "client.key.new").replace(link.key)  # the crash came right here
    with connect(folder, wrapping) as opened:
        assert opened.studies() == []
    assert link.read_certificate().public_key() == public


# Refusals


def test_a_code_of_another_coordinator_sends_nothing(
    folder: Path, coordinator: FakeCoordinator
) -> None:
    with pytest.raises(LinkError, match="nothing was sent"):
        enter(folder, coordinator, ca_sha256="0" * 64)
    assert coordinator.joined == {}


def test_a_used_up_code_is_refused_in_the_coordinators_words(
    folder: Path, coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    enter(folder, coordinator)
    create_safe(tmp_path / "thief", {})
    with pytest.raises(LinkError, match="declined: code: north joined with it already"):
        enter(tmp_path / "thief", coordinator)
    with pytest.raises(LinkError, match="not used up") as refused:
        enter(tmp_path / "thief", coordinator, secret=b"x" * 20)
    assert "\n" not in str(refused.value)
    assert not LinkFolder(tmp_path / "thief").is_joined


def test_a_second_coordinator_needs_the_first_moved_away(
    folder: Path, coordinator: FakeCoordinator
) -> None:
    enter(folder, coordinator)
    with FakeCoordinator().serving() as other, pytest.raises(LinkError, match="already joined"):
        enter(folder, other)


def _swapped_certificate(world: FakeCoordinator) -> None:
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    world.join_reply = lambda reply: reply.model_copy(
        update={"certificate": world.pki.issue("north", other)}
    )


def _foreign_certificate(world: FakeCoordinator) -> None:
    def forge(reply: JoinReply) -> JoinReply:
        from cryptography import x509

        key = x509.load_pem_x509_certificate(reply.certificate.encode()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return reply.model_copy(update={"certificate": Pki().issue("north", key)})

    world.join_reply = forge


def _other_name(world: FakeCoordinator) -> None:
    def rename(reply: JoinReply) -> JoinReply:
        from cryptography import x509

        key = x509.load_pem_x509_certificate(reply.certificate.encode()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return reply.model_copy(update={"certificate": world.pki.issue("south", key)})

    world.join_reply = rename


def _other_authority(world: FakeCoordinator) -> None:
    world.join_reply = lambda reply: reply.model_copy(update={"ca": Pki().pem})


def _no_certificate(world: FakeCoordinator) -> None:
    world.join_reply = lambda reply: reply.model_copy(update={"certificate": "hello"})


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (_swapped_certificate, "another key"),
        (_foreign_certificate, "by the coordinator's authority"),
        (_other_name, "found another name"),
        (_other_authority, "expected the authority that the code names"),
        (_no_certificate, "sent no certificate"),
    ],
)
def test_a_certificate_that_is_not_ours_is_not_taken(
    folder: Path, coordinator: FakeCoordinator, lie: object, words: str
) -> None:
    lie(coordinator)  # type: ignore[operator]
    with pytest.raises(LinkError, match=words):
        enter(folder, coordinator)
    assert not LinkFolder(folder).is_joined
    coordinator.join_reply = lambda reply: reply
    enter(folder, coordinator)


@contextmanager
def joined(folder: Path, **changes: object) -> Iterator[FakeCoordinator]:
    """A coordinator that was joined and has changed since."""
    with FakeCoordinator().serving() as world:
        enter(folder, world)
        changed = replace(world, **changes, port=0)  # type: ignore[arg-type]
    with changed.serving():
        link = LinkFolder(folder)
        link.write_facts(link.facts().model_copy(update={"address": f"localhost:{changed.port}"}))
        yield changed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pki": Pki()}, "not by the authority this hospital pinned"),
        ({"hosts": ("elsewhere.example",)}, "for another host name"),
        ({"started": datetime.now(UTC) - timedelta(days=60)}, "by this machine's clock"),
        ({"started": datetime.now(UTC) + timedelta(days=60)}, "correct the clock"),
        ({"revoked": True}, "was revoked or has expired"),
    ],
)
def test_what_is_wrong_with_a_connection_is_said_in_one_line(
    folder: Path, changes: dict[str, object], words: str
) -> None:
    with joined(folder, **changes), connect(folder, keys(folder)[1]) as opened:
        with pytest.raises(LinkError, match=words) as failure:
            opened.studies()
        assert "\n" not in str(failure.value)


def test_a_certificate_the_server_turns_away(folder: Path) -> None:
    """TLS 1.3 tells a client only when it reads."""
    with FakeCoordinator().serving() as world:
        enter(folder, world)
        stranger = Pki().client_context("north", trusting=world.pki)
        with (
            Coordinator(f"localhost:{world.port}", stranger) as opened,
            pytest.raises(LinkError, match="does not accept this hospital's certificate"),
        ):
            opened.studies()


def test_nobody_there_and_no_such_name(folder: Path) -> None:
    context = Pki().client_context("north")
    for address, words in (
        ("localhost:1", "cannot be reached"),
        ("no-such-host.invalid:8443", "unknown here|cannot be reached"),
    ):
        with Coordinator(address, context) as opened, pytest.raises(LinkError, match=words):
            opened.ca()
    with pytest.raises(LinkError, match="has not joined; ask the coordinator for a code"):
        connect(folder, keys(folder)[1])


def test_a_clock_that_is_off_is_measured(folder: Path) -> None:
    late = {"clock": lambda: datetime.now(UTC) - timedelta(seconds=300)}
    with joined(folder, **late), connect(folder, keys(folder)[1]) as opened:
        assert 297 < opened.clock_offset_s() < 303


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (500, b"", "answered HTTP 500"),
        (409, b'{"error": "study: gone\\u001b[31m\\nnext"}', "declined: study: gone"),
        (302, b"", "answered HTTP 302"),
        (200, b"[{}]", "expected offers, found something else"),
        (200, b"x" * (65 * 2**20), "too long"),
    ],
)
def test_odd_answers(status: int, content: bytes, words: str) -> None:
    headers = {"location": "https://elsewhere.example/"}
    transport = httpx.MockTransport(
        lambda _: httpx.Response(status, content=content, headers=headers)
    )
    context = Pki().client_context("north")
    with (
        Coordinator("c.example:8443", context, transport=transport) as opened,
        pytest.raises(ConsiliumError, match=words) as failure,
    ):
        opened.studies()
    assert str(failure.value).isprintable()


def test_a_timeout_is_said_so() -> None:
    def slow(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("", request=request)

    context = Pki().client_context("north")
    with (
        Coordinator("c.example:1", context, transport=httpx.MockTransport(slow)) as opened,
        pytest.raises(LinkError, match="expected an answer within 30 s"),
    ):
        opened.ca()


def test_a_certificate_of_another_key_is_found_when_it_is_loaded(
    folder: Path, coordinator: FakeCoordinator
) -> None:
    enter(folder, coordinator)
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    LinkFolder(folder).certificate.write_text(coordinator.pki.issue("north", other))
    with pytest.raises(SecretError, match="do not belong together"):
        mutual_context(LinkFolder(folder), keys(folder)[1])
