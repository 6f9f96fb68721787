"""A copy of a coordinator in one file, made while it runs, and a folder made of it again.

What opens the copy is not in it: the wrapping key, the coordinator's TLS key, this machine's token.
A restored folder needs the wrapping key beside it; a new TLS certificate is made at its first
start, Flower's nodes are registered anew, and studies that ran are continued from the last round
that is in the copy. Hospitals need do nothing.

::

    manifest.json     version, time, SHA-256 of every file
    coordinator.toml, identity, identity.pub, audit.log, checkpoints/, pki/, public/
    store.db          a consistent copy (SQLite; PostgreSQL has `pg_dump`)
    runs/STUDY-ID/    each as of a finished round
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from common.errors import RunError, SecretError
from common.files import sync_folder
from common.secretfiles import replace_file
from server.database import open_engine
from server.migrations import migrate
from server.registry import Registry
from server.settings import CoordinatorFolder
from server.tokens import LOCAL_TOKEN, make_token

_MANIFEST = "manifest.json"
_VERSION = 1
_LARGEST_MANIFEST = 64 * 2**20
_TRIES = 5
_FILES = ("coordinator.toml", "identity", "identity.pub")
_FOLDERS = ("checkpoints", "pki")
_SECRET = frozenset({"pki/server.key", "pki/server.pem"})
_SQLITE = "sqlite:///"


@dataclass(frozen=True, kw_only=True)
class Backup:
    """What was written: its digest, how many files, and whether the database is in it."""

    sha256: str
    files: int
    has_database: bool


def back_up(
    path: Path, target: Path, now: datetime, environ: Mapping[str, str] = os.environ
) -> Backup:
    """Write the copy of folder ``path`` to ``target`` (mode 0600). Raises RunError."""
    folder = CoordinatorFolder(path)
    settings = folder.load_settings()
    url = folder.database_url(settings, environ)
    has_database = url.startswith(_SQLITE)
    if target.exists():
        raise RunError(f"{target}: expected a new file, found one; choose another name")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".backup-") as scratch:
            written = Path(scratch) / "archive"
            hashes: dict[str, str] = {}
            with open(written, "xb", opener=_private) as file:
                with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
                    if has_database:
                        copy = Path(scratch) / "store.db"
                        _copy_database(Path(url.removeprefix(_SQLITE)), copy)
                        _add(archive, hashes, "store.db", copy.read_bytes())
                    for name, data in _contents(folder, settings.public_folder):
                        _add(archive, hashes, name, data)
                    manifest = {"version": _VERSION, "made_at": now.isoformat(), "files": hashes}
                    _add(archive, {}, _MANIFEST, json.dumps(manifest, indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            written.replace(target)
        sync_folder(target.parent.resolve())
    except OSError as error:
        raise RunError(f"{target}: cannot be written ({error.strerror or error})") from None
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Backup(sha256=digest, files=len(hashes), has_database=has_database)


def restore(source: Path, path: Path, now: datetime) -> CoordinatorFolder:
    """Make folder ``path`` of a backup; a new local token is in it, the old one counts no longer.

    Raises RunError for a damaged or foreign file, with the folder left as it was, and for a folder
    that is not empty.
    """
    folder = CoordinatorFolder(path)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        if any(one.name != "key" for one in path.iterdir()):
            raise RunError(f"{path}: expected an empty folder (or only its key), found files in it")
        with tempfile.TemporaryDirectory(dir=path.parent.resolve(), prefix=".restore-") as scratch:
            with tarfile.open(source, mode="r:gz") as archive:
                _extract(archive, Path(scratch))
            for one in Path(scratch).iterdir():  # all of it is what was backed up
                one.replace(path / one.name)
        sync_folder(path)
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError) as error:
        raise RunError(f"{source}: cannot be restored ({error})") from None
    for one in (folder.runs, folder.run, folder.logs):
        one.mkdir(mode=0o700, exist_ok=True)
    if (path / "store.db").exists():
        _renew_local_token(folder, now)
    return folder


def _contents(folder: CoordinatorFolder, public: str) -> Iterator[tuple[str, bytes]]:
    for name in _FILES:
        yield name, (folder.path / name).read_bytes()
    log = folder.audit_log.read_bytes()
    yield "audit.log", log[: log.rfind(b"\n") + 1]  # a line being written was never acknowledged
    for name in (*_FOLDERS, *([public] if not Path(public).is_absolute() else [])):
        for one in _files_below(folder.path / name):
            inside = one.relative_to(folder.path).as_posix()
            if inside not in _SECRET:
                yield inside, one.read_bytes()
    for run in sorted(folder.runs.iterdir()) if folder.runs.is_dir() else ():
        if run.is_dir():
            yield from ((f"runs/{run.name}/{name}", data) for name, data in _run_contents(run))


def _run_contents(run: Path) -> list[tuple[str, bytes]]:
    """A run folder as of one finished round: the named tensors are there, metrics reach as far."""
    for _ in range(_TRIES):
        named = run / "checkpoint.json"
        before = named.read_bytes() if named.exists() else b""
        found: dict[str, bytes] = {}
        try:
            for one in _files_below(run):
                found[one.relative_to(run).as_posix()] = one.read_bytes()
        except FileNotFoundError:
            continue  # a round was finished meanwhile and its predecessor's tensors removed
        if before:
            found["checkpoint.json"] = before
        if not before or str(json.loads(before)["tensors"]) in found:
            return list(found.items())
    raise RunError(f"{run}: changes faster than it can be copied; try again")


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        one
        for one in folder.rglob("*")
        if one.is_file() and not one.is_symlink() and not one.name.startswith(".")
    )


def _copy_database(source: Path, target: Path) -> None:
    target.touch(mode=0o600)
    reading, writing = sqlite3.connect(f"file:{source}?mode=ro", uri=True), sqlite3.connect(target)
    try:
        reading.backup(writing)
    except sqlite3.Error as error:
        raise RunError(f"{source}: cannot be copied ({error})") from None
    finally:
        reading.close()
        writing.close()


def _add(archive: tarfile.TarFile, hashes: dict[str, str], name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    archive.addfile(entry, io.BytesIO(data))
    hashes[name] = hashlib.sha256(data).hexdigest()


def _extract(archive: tarfile.TarFile, path: Path) -> None:
    """Write what the manifest lists; it is read first, so that nothing unlisted is written."""
    listed = archive.getmember(_MANIFEST)
    if not listed.isfile() or listed.size > _LARGEST_MANIFEST:
        raise ValueError("its manifest is not one of ours")
    manifest = json.loads(_content(archive, listed))
    if manifest["version"] != _VERSION:
        raise ValueError(f"expected version {_VERSION}, found {manifest['version']}")
    wanted: dict[str, str] = dict(manifest["files"])
    for entry in archive:
        if entry.name == _MANIFEST:
            continue
        inside = PurePosixPath(entry.name)
        if entry.name not in wanted or not entry.isfile():
            raise ValueError(f"{entry.name}: is not in the manifest")
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"{entry.name}: leads out of the folder")
        data = _content(archive, entry)
        if hashlib.sha256(data).hexdigest() != wanted.pop(entry.name):
            raise ValueError(f"{entry.name}: is not what was backed up")
        for parent in reversed(inside.parents[:-1]):
            (path / parent).mkdir(mode=0o700, exist_ok=True)
        replace_file(path / inside, data)
    if wanted:
        raise ValueError(f"{next(iter(wanted))}: is missing")


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    reader = archive.extractfile(entry)
    if reader is None:
        raise ValueError(f"{entry.name}: is not a file")
    return reader.read()


def _renew_local_token(folder: CoordinatorFolder, now: datetime) -> None:
    url = _SQLITE + str(folder.path.resolve() / "store.db")
    engine = open_engine(url)
    migrate(engine)
    registry = Registry(engine)
    try:
        registry.remove_token(LOCAL_TOKEN)
        secret = make_token(registry, LOCAL_TOKEN, "admin", now)
        registry.add_event("restored", folder.path.name, "restore", now)
    finally:
        registry.close()
    try:
        replace_file(folder.admin_token, f"{secret}\n".encode())
    except SecretError as error:
        raise RunError(str(error)) from None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
