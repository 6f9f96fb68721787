"""The coordinator's folder, created once and opened for each use: keys, registry, audit log."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.auditlog import AuditLog, Clock, Fact, utc_now
from common.errors import RunError, SecretError
from common.identity import Identity
from common.secretfiles import WrappingKey, replace_file
from server.notary import create_notary
from server.pki import Authority
from server.registry import Registry
from server.settings import CoordinatorFolder, CoordinatorSettings
from server.tokens import LOCAL_TOKEN, make_token


class NotFoundError(RunError):
    """There is no such hospital, study, file or token."""


class UnavailableError(RunError):
    """Flower's SuperLink cannot be asked at the moment."""


@dataclass(frozen=True)
class Desk:
    """An open coordinator's folder. ``lock`` is held by whatever changes more than one thing."""

    folder: CoordinatorFolder
    settings: CoordinatorSettings
    identity: Identity
    authority: Authority
    registry: Registry
    log: AuditLog
    clock: Clock
    lock: threading.RLock = field(default_factory=threading.RLock)

    def record(
        self, kind: str, subject: str, *, actor: str, facts: Mapping[str, Fact] | None = None
    ) -> None:
        """Say what is about to happen, in the signed log first; nothing happens unrecorded."""
        self.log.append(kind, {**(facts or {}), "actor": actor})
        self.registry.add_event(kind, subject, actor, self.clock())


def create_desk(
    path: Path,
    settings: CoordinatorSettings,
    environ: Mapping[str, str] = os.environ,
    clock: Clock = utc_now,
) -> CoordinatorFolder:
    """Make the folder: keys, authority, registry, log, and a token for this machine's commands.

    Raises SecretError when it is not empty or cannot be written.
    """
    create_notary(path, environ)
    folder = CoordinatorFolder(path)
    folder.save_settings(settings)
    key = WrappingKey.of_folder(path, environ)
    authority = Authority.create(folder.pki, key=key, now=clock())
    authority.renew_server(settings.host, now=clock())
    for one in (folder.runs, folder.run, folder.logs, path / settings.public_folder):
        try:
            one.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise SecretError(f"{one}: cannot be created ({error.strerror})") from None
    with open_desk(path, environ, clock) as desk:
        secret = make_token(desk.registry, LOCAL_TOKEN, "admin", clock())
        facts: dict[str, Fact] = {"name": LOCAL_TOKEN, "role": "admin"}
        desk.record("token_created", LOCAL_TOKEN, actor="init", facts=facts)
        replace_file(folder.admin_token, f"{secret}\n".encode())
    return folder


@contextmanager
def open_desk(
    path: Path, environ: Mapping[str, str] = os.environ, clock: Clock = utc_now
) -> Iterator[Desk]:
    """Open a folder by ``create_desk`` for this process alone.

    Raises ConsiliumError when something is missing, damaged, open to others or in use.
    """
    folder = CoordinatorFolder(path)
    settings = folder.load_settings()
    with _alone(folder):
        key = WrappingKey.of_folder(path, environ)
        identity = Identity.load(folder.identity, key=key)
        registry = Registry.open(folder.database_url(settings, environ))
        try:
            yield Desk(
                folder,
                settings,
                identity,
                Authority.load(folder.pki, key=key),
                registry,
                AuditLog(folder.audit_log, identity, clock),
                clock,
            )
        finally:
            registry.close()


@contextmanager
def _alone(folder: CoordinatorFolder) -> Iterator[None]:
    """One process at a time: what it has read stays true until it writes."""
    folder.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder.run / "desk.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(
            f"{folder.path}: expected a coordinator that is not running, found one that is; "
            f"use its commands, or stop it with `consilium coordinator stop`"
        ) from None
    finally:
        os.close(descriptor)
