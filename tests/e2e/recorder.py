"""A tap between a hospital and the coordinator that can read what it passes on.

It stands in the coordinator's place with the coordinator's own certificate, and in the hospital's
with the hospital's: only a test has both. ``python -m tests.e2e.recorder PLAN.json``.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path


async def pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: Callable[[bytes], None]
) -> None:
    try:
        while data := await reader.read(65536):
            keep(data)
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except (OSError, ssl.SSLError):
        pass
    finally:
        writer.close()


def handler(
    target: tuple[str, int], outward: ssl.SSLContext, kept: Path
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    number = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        number += 1
        mine = number
        up, down = await asyncio.open_connection(*target, ssl=outward, server_hostname=target[0])
        with (
            (kept / f"{mine:05d}.sent").open("ab") as sent,
            (kept / f"{mine:05d}.received").open("ab") as received,
        ):
            await asyncio.gather(pump(reader, down, sent.write), pump(up, writer, received.write))

    return handle


async def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    inward = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inward.load_cert_chain(plan["server_certificate"], plan["server_key"])
    outward = ssl.create_default_context(cafile=plan["ca"])
    outward.load_cert_chain(plan["client_certificate"], plan["client_key"])
    handle = handler((plan["host"], plan["port"]), outward, Path(plan["kept"]))
    server = await asyncio.start_server(handle, plan["listen"], plan["listen_port"], ssl=inward)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
