"""``python -m server.api FOLDER``: both interfaces and the driver, in one process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from common.errors import ConsiliumError
from server.api.admin import admin_app
from server.api.hospital import hospital_app
from server.api.metrics import Metrics
from server.service import Service, open_service

_GRACE_S = 5


class _Server(uvicorn.Server):
    """One of two in a process: signals are the process's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


async def serve(service: Service) -> None:
    """Serve until SIGTERM or SIGINT; requests in hand are answered."""
    metrics, folder = Metrics(service), service.desk.folder
    folder.hospital_socket.unlink(missing_ok=True)  # nobody else serves: the desk is locked
    servers = [
        _server(hospital_app(service, metrics), uds=str(folder.hospital_socket)),
        _server(
            admin_app(service, metrics), host="127.0.0.1", port=service.desk.settings.admin_port
        ),
    ]
    stopping = threading.Event()

    def stop() -> None:
        stopping.set()
        for one in servers:
            one.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    driver = threading.Thread(target=service.driver.run, args=(stopping,), name="driver")
    driver.start()
    try:
        await asyncio.gather(*(one.serve() for one in servers))
    finally:
        stopping.set()
        await asyncio.to_thread(driver.join)


def _server(
    app: FastAPI, *, uds: str | None = None, host: str = "127.0.0.1", port: int = 0
) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            uds=uds,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_GRACE_S,
            limit_concurrency=200,
            h11_max_incomplete_event_size=32 * 1024,
        )
    )


def main() -> None:
    """Serve the folder named on the command line."""
    parser = argparse.ArgumentParser(prog="server.api", description=__doc__)
    parser.add_argument("folder", type=Path, help="the coordinator's folder")
    given = parser.parse_args()
    os.umask(0o077)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with open_service(given.folder) as service:
            asyncio.run(serve(service))
    except ConsiliumError as error:
        print(f"server.api: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
