"""The tunnel: every byte, both ways, and each end told apart from a cut."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from client.tunnel import (
    CutOffError,
    TlsStream,
    Tunnel,
    TunnelLimits,
    listen,
    loopback_context,
)
from common.loopback import LoopbackCertificate, make_loopback_certificate
from tests.coordinators import Pki

Handler = Callable[[TlsStream], Awaitable[None]]
MEBI = 2**20


@pytest.fixture
def loopback(tmp_path: Path) -> LoopbackCertificate:
    return make_loopback_certificate(tmp_path)


@pytest.fixture
def pki() -> Pki:
    return Pki()


@asynccontextmanager
async def coordinator(pki: Pki, handler: Handler) -> AsyncIterator[int]:
    """A server over mutual TLS; its port."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        stream = TlsStream(reader, writer, pki.server_context(), server_hostname=None)
        try:
            await stream.handshake()
            await handler(stream)
            await stream.close()
        except (OSError, ssl.SSLError):
            writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])
        await drop(writers)


async def drop(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def tunnelled(
    pki: Pki,
    loopback: LoopbackCertificate,
    handler: Handler,
    *,
    context: ssl.SSLContext | None = None,
    limits: TunnelLimits | None = None,
    host: str = "localhost",
) -> AsyncIterator[Callable[[], Awaitable[TlsStream]]]:
    """A tunnel to such a server; opens connections into it."""
    async with coordinator(pki, handler) as port:
        made = context or pki.client_context("north")
        tunnel = Tunnel(
            loopback_context(loopback.certificate, loopback.key),
            lambda: made,
            host,
            port,
            limits or TunnelLimits(),
        )
        listening = listen()
        serving = asyncio.create_task(tunnel.serve(listening))
        inner = ssl.create_default_context(cafile=str(loopback.ca))
        writers: list[asyncio.StreamWriter] = []

        async def dial() -> TlsStream:
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writers.append(writer)
            stream = TlsStream(reader, writer, inner, server_hostname="localhost")
            await stream.handshake()
            return stream

        try:
            yield dial
        finally:
            await drop(writers)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def drain(stream: TlsStream) -> bytes:
    found = bytearray()
    while data := await stream.read():
        found += data
    return bytes(found)


def bounded(action: Awaitable[None]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            await action

    asyncio.run(run())


def test_much_is_carried_both_ways_at_once(pki: Pki, loopback: LoopbackCertificate) -> None:
    there, back = os.urandom(24 * MEBI), os.urandom(24 * MEBI)
    seen: list[str] = []

    async def handler(stream: TlsStream) -> None:
        async def send() -> None:
            await stream.write(back)
            await stream.end()

        _, found = await asyncio.gather(send(), drain(stream))
        seen.append(hashlib.sha256(found).hexdigest())

    async def action() -> None:
        async with tunnelled(pki, loopback, handler) as dial:
            stream = await dial()

            async def send() -> None:
                await stream.write(there)
                await stream.end()

            _, found = await asyncio.gather(send(), drain(stream))
            assert found == back
            await stream.close()

    bounded(action())
    assert seen == [hashlib.sha256(there).hexdigest()]


def test_a_side_that_has_ended_is_still_answered(pki: Pki, loopback: LoopbackCertificate) -> None:
    async def handler(stream: TlsStream) -> None:
        asked = await drain(stream)  # to its end
        await stream.write(asked[::-1] * 1000)
        await stream.end()

    async def action() -> None:
        async with tunnelled(pki, loopback, handler) as dial:
            for _ in range(3):
                stream = await dial()
                await stream.write(b"question")
                await stream.end()
                assert await drain(stream) == b"noitseuq" * 1000
                await stream.close()

    bounded(action())


def test_ending_while_much_is_still_coming(pki: Pki, loopback: LoopbackCertificate) -> None:
    """close_notify goes out in the middle of the other direction's data, and harms none of it."""
    much = os.urandom(8 * MEBI)

    async def handler(stream: TlsStream) -> None:
        async def send() -> None:
            await stream.write(much)
            await stream.end()

        await asyncio.gather(send(), drain(stream))

    async def action() -> None:
        async with tunnelled(pki, loopback, handler) as dial:
            stream = await dial()
            first = await stream.read()
            await stream.end()
            assert first + await drain(stream) == much

    bounded(action())


def test_a_cut_connection_is_cut_on_the_other_side_too(
    pki: Pki, loopback: LoopbackCertificate
) -> None:
    ends: list[str] = []
    met = asyncio.Event()

    async def handler(stream: TlsStream) -> None:
        await stream.write(b"half")
        try:
            await drain(stream)
            ends.append("clean")
        except (OSError, ssl.SSLError):
            ends.append("cut")
        met.set()

    async def cut_off(stream: TlsStream) -> None:
        await stream.write(b"half")
        stream.abort()

    async def action() -> None:
        async with tunnelled(pki, loopback, handler) as dial:
            stream = await dial()
            assert await stream.read() == b"half"
            stream.abort()
            await met.wait()
        async with tunnelled(pki, loopback, cut_off) as dial:
            stream = await dial()
            with pytest.raises((CutOffError, ConnectionError, ssl.SSLError)):
                while await stream.read():
                    pass
                pytest.fail("took half a message for a whole one")

    bounded(action())
    assert ends == ["cut"]


def test_a_slow_reader_holds_the_sender_back(pki: Pki, loopback: LoopbackCertificate) -> None:
    """What is in between is bounded: the sender cannot run far ahead."""
    sent = 0

    async def handler(stream: TlsStream) -> None:
        nonlocal sent
        chunk = bytes(MEBI)
        for _ in range(256):
            await stream.write(chunk)
            sent += 1

    async def action() -> None:
        async with tunnelled(pki, loopback, handler) as dial:
            stream = await dial()
            await stream.read()
            before = -1
            while before != sent:  # until it is held back
                before = sent
                await asyncio.sleep(0.5)
            assert sent < 64
            stream.abort()

    bounded(action())


def test_strangers_are_shown_the_door(
    pki: Pki, loopback: LoopbackCertificate, caplog: pytest.LogCaptureFixture
) -> None:
    """Another coordinator, a certificate by another authority, another host name."""
    caplog.set_level(logging.INFO, logger="client.tunnel")

    async def handler(stream: TlsStream) -> None:
        await stream.write(b"CANARY")

    async def action() -> None:
        for context, host in (
            (Pki().client_context("north"), "localhost"),
            (pki.client_context("north", trusting=Pki()), "localhost"),
            (pki.client_context("north", signed_by=Pki()), "localhost"),
            (pki.client_context("north"), "127.0.0.1"),
        ):
            async with tunnelled(pki, loopback, handler, context=context, host=host) as dial:
                stream = await dial()
                with pytest.raises((OSError, ssl.SSLError)):
                    assert await stream.read() == b""

    bounded(action())
    assert len(caplog.messages) == 4
    assert all("TLS: " in one and "CANARY" not in one for one in caplog.messages)


def test_idle_and_too_many_connections_are_closed(pki: Pki, loopback: LoopbackCertificate) -> None:
    async def handler(stream: TlsStream) -> None:
        while data := await stream.read():
            await stream.write(data)

    async def action() -> None:
        few = TunnelLimits(connections=2, idle_s=0.3)
        async with tunnelled(pki, loopback, handler, limits=few) as dial:
            first, second = await dial(), await dial()
            with pytest.raises((OSError, ssl.SSLError)):
                await dial()
            for _ in range(5):
                await first.write(b"x")
                assert await first.read() == b"x"
                await asyncio.sleep(0.1)
            for stream in (first, second):
                with pytest.raises((OSError, ssl.SSLError)):
                    await stream.read()
            third = await dial()
            await third.write(b"y")
            assert await third.read() == b"y"

    bounded(action())
