"""A slow line with gaps: passes bytes on late, few at a time, and now and then not at all.

``python -m tests.e2e.slowline LISTEN PORT TARGET_PORT``, between two ports of one address.
"""

from __future__ import annotations

import asyncio
import random
import sys

DELAY_S, GAP_S, GAP_CHANCE = 0.08, 1.5, 0.03
CHUNK = 16_384  # with the delay: about 200 kB a second each way


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    chance = random.Random(0)  # noqa: S311 (the same gaps each time)
    try:
        while data := await reader.read(CHUNK):
            await asyncio.sleep(GAP_S if chance.random() < GAP_CHANCE else DELAY_S)
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        pass
    finally:
        writer.close()


async def main() -> None:
    listen, port, target = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up, down = await asyncio.open_connection(listen, target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, down), pump(up, writer))

    server = await asyncio.start_server(handle, listen, port)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
