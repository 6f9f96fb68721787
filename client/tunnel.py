"""From this machine to the coordinator: what goes in by loopback TLS leaves by mutual TLS.

Flower's SuperNode cannot present a client certificate. It speaks to this tunnel, under a
certificate that is good for this machine alone; the tunnel presents the hospital's. Bytes are
passed on as they are, never read and never logged.

A side that ends cleanly (TLS close_notify) may still be answered. A side that ends without was cut
off, and then the other is cut off too: nobody mistakes half a message for a whole one.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from client.linkfolder import LinkFolder, mutual_context
from common.errors import ConsiliumError
from common.secretfiles import WrappingKey

CHUNK = 64 * 1024
_RECORDS = 256 * 1024  # encrypted bytes held for one side at most, roughly

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TunnelLimits:
    """``idle_s``: a connection without a byte either way for so long is closed."""

    connections: int = 64
    idle_s: float = 900.0
    handshake_s: float = 15.0


class CutOffError(ConnectionError):
    """The connection ended without the other side saying so."""


class TlsStream:
    """TLS over an asyncio connection, each direction ended on its own."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None,
    ) -> None:
        """``server_hostname``: of the other side; None makes this side the server."""
        self._reader, self._writer = reader, writer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ahead: deque[bytes] = deque()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_hostname is None,
            server_hostname=server_hostname,
        )

    async def handshake(self) -> None:
        """Raises ssl.SSLError or CutOffError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError:
                with suppress(ConnectionError):
                    await self._flush()  # the alert tells the other side why
                raise
            else:
                await self._flush()
                return

    async def read(self) -> bytes:
        """The next bytes; none at the other side's clean end. Raises CutOffError without one."""
        if self._ahead:
            return self._ahead.popleft()
        while True:
            try:
                found = self._tls.read(CHUNK)
            except ssl.SSLWantReadError:
                # A key update may want an answer. Reading never waits for the network to take
                # something: with both directions full, neither would move again.
                self._put()
                await self._fill()
            except ssl.SSLZeroReturnError:
                return b""
            else:
                return bytes(found)

    async def write(self, data: bytes) -> None:
        """Returns when the network has taken most of it."""
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
            await self._flush()

    async def end(self) -> None:
        """Say that nothing more will come; reading goes on."""
        # OpenSSL then looks for the other side's close_notify, and takes offence at data that came
        # before it: so they are read first.
        with suppress(ssl.SSLError):
            while found := self._tls.read(CHUNK):
                self._ahead.append(bytes(found))
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()
        if self._writer.can_write_eof():
            self._writer.write_eof()

    def abort(self) -> None:
        """Drop the connection, unsent bytes included."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close it once what was written is sent."""
        self._writer.close()
        await self._writer.wait_closed()

    async def _fill(self) -> None:
        data = await self._reader.read(CHUNK)
        if not data:
            raise CutOffError("ended without close_notify")
        self._incoming.write(data)

    def _put(self) -> None:
        if self._outgoing.pending:
            self._writer.write(self._outgoing.read())

    async def _flush(self) -> None:
        self._put()
        await self._writer.drain()


@dataclass
class Tunnel:
    """``accepts``: the loopback side's TLS. ``context``: the outer side's, asked for each time, so
    that a renewed certificate is used from the next connection on.
    """

    accepts: ssl.SSLContext
    context: Callable[[], ssl.SSLContext]
    host: str
    port: int
    limits: TunnelLimits = TunnelLimits()
    _open: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, listening: socket.socket) -> None:
        """Serve connections until cancelled; those that are open end with it."""
        server = await asyncio.start_server(self._accept, sock=listening, limit=_RECORDS)
        try:
            async with server:
                await server.serve_forever()
        finally:
            for one in list(self._open):
                one.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        if len(self._open) >= self.limits.connections:
            _logger.warning("more than %d connections; one was closed", self.limits.connections)
            writer.transport.abort()
            return
        self._open.add(task)
        try:
            await self._join(reader, writer)
        except (OSError, ssl.SSLError, ConsiliumError, TimeoutError) as error:
            _logger.warning("a connection ended early: %s", _told(error))
        except asyncio.CancelledError:
            pass  # the tunnel is closing; a finished handler must not look like a failure
        finally:
            writer.transport.abort()
            self._open.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect the two sides and pass bytes until both have ended."""
        inner = TlsStream(reader, writer, self.accepts, server_hostname=None)
        async with asyncio.timeout(self.limits.handshake_s):
            await inner.handshake()
        outer: TlsStream | None = None
        try:
            async with asyncio.timeout(self.limits.handshake_s):
                far_reader, far_writer = await asyncio.open_connection(
                    self.host, self.port, limit=_RECORDS
                )
                outer = TlsStream(far_reader, far_writer, self.context(), server_hostname=self.host)
                await outer.handshake()
            await self._pump_both(inner, outer)
            async with asyncio.timeout(self.limits.handshake_s):
                await inner.close()
                await outer.close()
        except BaseException:
            inner.abort()
            if outer is not None:
                outer.abort()
            raise

    async def _pump_both(self, inner: TlsStream, outer: TlsStream) -> None:
        moved = _Counter()
        running = {
            asyncio.create_task(_pump(inner, outer, moved)),
            asyncio.create_task(_pump(outer, inner, moved)),
        }
        try:
            while running:
                before = moved.chunks
                done, running = await asyncio.wait(
                    running, timeout=self.limits.idle_s, return_when=asyncio.FIRST_COMPLETED
                )
                for one in done:
                    one.result()
                if not done and moved.chunks == before:
                    raise TimeoutError
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)


@dataclass
class _Counter:
    chunks: int = 0


async def _pump(source: TlsStream, target: TlsStream, moved: _Counter) -> None:
    while data := await source.read():
        moved.chunks += 1
        await target.write(data)
        moved.chunks += 1
    await target.end()


def _told(error: BaseException) -> str:
    """Why, without a word of what was carried."""
    if isinstance(error, ConsiliumError):
        return str(error)
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or type(error).__name__}"
    return type(error).__name__


class RenewingContext:
    """The hospital's side of mutual TLS, made anew when its certificate has changed on disk."""

    def __init__(self, link: LinkFolder, wrapping: WrappingKey) -> None:
        """``wrapping`` opens the key, in memory only."""
        self._link, self._wrapping = link, wrapping
        self._made: tuple[tuple[int, int], ssl.SSLContext] | None = None

    def __call__(self) -> ssl.SSLContext:
        """The context for the next connection."""
        status = self._link.certificate.stat()
        stamp = (status.st_mtime_ns, status.st_ino)
        if self._made is None or self._made[0] != stamp:
            self._made = (stamp, mutual_context(self._link, self._wrapping))
        return self._made[1]


def loopback_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The side that this machine's own programs connect to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    return context


def listen(port: int = 0) -> socket.socket:
    """A socket on this machine's loopback; port 0 takes a free one."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(128)
    return listening


def main() -> None:
    """``python -m client.tunnel FOLDER``, started by `consilium hospital start`."""
    parser = argparse.ArgumentParser(prog="client.tunnel", description=__doc__)
    parser.add_argument("folder", type=Path, help="the hospital's folder")
    parser.add_argument("--port", type=int, default=0, help="of the loopback side")
    parser.add_argument("--descriptor", type=int, help="an inherited listening socket instead")
    given = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        folder: Path = given.folder
        link, run = LinkFolder(folder), folder / "run"
        facts = link.facts()
        context = RenewingContext(link, WrappingKey.of_folder(folder, os.environ))
        context()  # a key that does not open should stop us here
        accepts = loopback_context(run / "loopback.pem", run / "loopback.key")
        tunnel = Tunnel(accepts, context, facts.host, facts.port)
        taken = given.descriptor
        asyncio.run(_until_told(tunnel, listen(given.port) if taken is None else _own(taken)))
    except ConsiliumError as error:
        print(f"tunnel: {error}", file=sys.stderr)
        sys.exit(2)


def _own(descriptor: int) -> socket.socket:
    # A copy: the supervisor keeps the socket, and clients wait in it while a tunnel restarts.
    return socket.socket(fileno=os.dup(descriptor))


async def _until_told(tunnel: Tunnel, listening: socket.socket) -> None:
    serving = asyncio.ensure_future(tunnel.serve(listening))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    _logger.info("listening on 127.0.0.1:%d", listening.getsockname()[1])
    with suppress(asyncio.CancelledError):
        await serving


if __name__ == "__main__":
    main()
