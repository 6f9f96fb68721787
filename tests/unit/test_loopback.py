"""The certificate of a machine's own connections serves its loopback names and no others."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from common.loopback import LoopbackCertificate, make_loopback_certificate


def handshake(made: LoopbackCertificate, trusted: Path, name: str) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.certificate, made.key)
    client = ssl.create_default_context(cafile=str(trusted))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        theirs.settimeout(10)

        def serve() -> None:
            try:
                server.wrap_socket(theirs, server_side=True).close()
            except (ssl.SSLError, OSError):
                theirs.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with client.wrap_socket(ours, server_hostname=name):
                pass
        finally:
            thread.join()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_it_serves_loopback_names(tmp_path: Path, name: str) -> None:
    made = make_loopback_certificate(tmp_path)
    handshake(made, made.ca, name)


def test_no_other_name_and_no_other_authority(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    made, other = make_loopback_certificate(tmp_path), make_loopback_certificate(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname"):
        handshake(made, made.ca, "example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, other.ca, "localhost")


def test_its_files_are_private(tmp_path: Path) -> None:
    made = make_loopback_certificate(tmp_path)
    for path in (made.ca, made.certificate, made.key):
        assert path.stat().st_mode & 0o077 == 0
