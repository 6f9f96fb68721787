"""A PostgreSQL server for the tests that need one."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import create_engine, text


def _postgres_program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server of our own on a Unix socket; a function that makes databases."""
    initdb, server = _postgres_program("initdb"), _postgres_program("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL's server is not installed")
    pytest.importorskip("psycopg", reason="psycopg is not installed (consilium[postgres])")
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:  # short: sockets' paths are
        root = Path(folder)
        user: dict[str, object] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to be root
            nobody = pwd.getpwnam("nobody")
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(root, nobody.pw_uid, nobody.pw_gid)
        data = root / "data"
        made = subprocess.run(
            [initdb, "-D", str(data), "-U", "consilium", "-A", "trust", "-E", "UTF8", "-N"],
            capture_output=True,
            text=True,
            timeout=90,
            cwd=root,
            check=False,
            **user,  # type: ignore[call-overload]
        )
        assert made.returncode == 0, made.stderr
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={root}"]
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                [server, "-D", str(data), *options],
                stdout=log,
                stderr=log,
                cwd=root,
                **user,  # type: ignore[call-overload]
            )
        admin = f"postgresql+psycopg://consilium@/postgres?host={quote(str(root))}"
        try:
            _wait(admin, process, root / "log")

            def make(name: str) -> str:
                engine = create_engine(admin, isolation_level="AUTOCOMMIT")
                with engine.connect() as connection:
                    connection.execute(text(f"CREATE DATABASE {name}"))
                engine.dispose()
                return admin.replace("/postgres?", f"/{name}?")

            yield make
        finally:
            process.send_signal(signal.SIGINT)  # without waiting for clients
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    engine = create_engine(url)
    deadline = time.monotonic() + 60
    while True:
        try:
            with engine.connect():
                break
        except Exception:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    engine.dispose()
