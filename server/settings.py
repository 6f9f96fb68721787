"""The coordinator's folder and its `coordinator.toml`.

::

    FOLDER/              mode 700
      coordinator.toml   the settings below
      key                opens the secrets; better kept elsewhere (CONSILIUM_KEY_FILE)
      identity(.pub)     signs offers and hospitals' checkpoints
      checkpoints/       the newest countersigned checkpoint of each hospital
      audit.log          what happened, signed
      pki/               the federation's certificate authority (see ``server.pki``)
      store.db           hospitals, studies, answers, tokens (see ``server.registry``)
      admin.token        lets `consilium coordinator` in on this machine, mode 600
      runs/STUDY-ID/     each study's run folder (see ``server.store``)
      flower/            Flower's own database
      run/               mode 700, generated at each start: nginx.conf, sockets, pids
      logs/
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field, field_validator

from common.compute import ComputeSpec
from common.errors import RunError
from common.identity import PublicIdentity
from common.secretfiles import replace_file
from common.strict import Strict, parse_strict

DATABASE_VARIABLE = "CONSILIUM_DATABASE_URL"

Port = Annotated[int, Field(ge=1, le=65535)]

_DNS_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*")
_SQLITE = "sqlite:///"


class CoordinatorSettings(Strict):
    """How the coordinator is reached and where it keeps things.

    ``host``: names and addresses by which hospitals reach it, the first one in join codes.
    ``listen``: the address nginx binds; hospitals need more than the default, which is this machine
    alone. ``database``: relative SQLite paths are below the folder; a URL with a password belongs
    into the environment variable CONSILIUM_DATABASE_URL instead. ``compute``: where pre-training
    and distillation on public records run.
    """

    host: Annotated[tuple[str, ...], Field(min_length=1)]
    port: Port = 8443
    listen: str = "127.0.0.1"
    admin_port: Port = 8440
    superlink_port: Port = 8441
    database: str = "sqlite:///store.db"
    public_folder: str = "public"
    join_hours: Annotated[int, Field(ge=1, le=24 * 30)] = 72
    certificate_days: Annotated[int, Field(ge=1, le=825)] = 365
    compute: ComputeSpec = ComputeSpec()

    @field_validator("host")
    @classmethod
    def _reachable(cls, host: tuple[str, ...]) -> tuple[str, ...]:
        for one in host:
            if not (_is_address(one) or _DNS_NAME.fullmatch(one)):
                raise ValueError(f"expected DNS names or IP addresses, found {one!r}")
        return host

    @field_validator("listen")
    @classmethod
    def _bindable(cls, listen: str) -> str:
        if not _is_address(listen):
            raise ValueError(f"expected an IP address such as 0.0.0.0, found {listen!r}")
        return listen

    @property
    def address(self) -> str:
        """host:port as hospitals dial it."""
        first = self.host[0]
        return f"[{first}]:{self.port}" if ":" in first else f"{first}:{self.port}"


@dataclass(frozen=True)
class CoordinatorFolder:
    """Where everything is."""

    path: Path

    @property
    def settings(self) -> Path:
        """The settings."""
        return self.path / "coordinator.toml"

    @property
    def identity(self) -> Path:
        """The encrypted signing key."""
        return self.path / "identity"

    @property
    def audit_log(self) -> Path:
        """The audit log."""
        return self.path / "audit.log"

    @property
    def pki(self) -> Path:
        """The certificate authority's files."""
        return self.path / "pki"

    @property
    def admin_token(self) -> Path:
        """The token of this machine's commands."""
        return self.path / "admin.token"

    @property
    def runs(self) -> Path:
        """One run folder a study."""
        return self.path / "runs"

    @property
    def run(self) -> Path:
        """What each start generates anew."""
        return self.path / "run"

    @property
    def logs(self) -> Path:
        """What the services print."""
        return self.path / "logs"

    @property
    def hospital_socket(self) -> Path:
        """Where nginx reaches the hospital API."""
        return self.run / "hospital.sock"

    @property
    def superlink_ca(self) -> Path:
        """The certificate that verifies the SuperLink on loopback."""
        return self.run / "loopback-ca.pem"

    @property
    def nginx_conf(self) -> Path:
        """nginx's configuration."""
        return self.run / "nginx.conf"

    @property
    def nginx_pid(self) -> Path:
        """The process that reloads it."""
        return self.run / "nginx.pid"

    @property
    def pid(self) -> Path:
        """The process of `consilium coordinator start`."""
        return self.run / "coordinator.pid"

    @property
    def state(self) -> Path:
        """How its services stand."""
        return self.run / "state.json"

    def public(self) -> PublicIdentity:
        """The coordinator's public key; needs no secret."""
        return PublicIdentity.load(self.path / "identity.pub")

    def run_of(self, study_id: str) -> Path:
        """A study's run folder."""
        return self.runs / study_id

    def load_settings(self) -> CoordinatorSettings:
        """The settings; raises RunError or StudyError in one line."""
        try:
            tree = tomllib.loads(self.settings.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"{self.path}: expected a coordinator's folder with coordinator.toml, found none; "
                f"make one with `consilium coordinator init`"
            ) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RunError(f"{self.settings}: cannot be read as TOML ({error})") from None
        return parse_settings(tree, origin=str(self.settings))

    def save_settings(self, settings: CoordinatorSettings) -> None:
        """Write the settings, defaults spelled out."""
        replace_file(self.settings, tomli_w.dumps(settings.model_dump(mode="json")).encode())

    def database_url(self, settings: CoordinatorSettings, environ: Mapping[str, str]) -> str:
        """The database's URL, a relative SQLite path made absolute."""
        url = environ.get(DATABASE_VARIABLE) or settings.database
        if url.startswith(_SQLITE):
            return _SQLITE + str(self.path.resolve() / url.removeprefix(_SQLITE))
        if url.startswith("postgresql+psycopg://"):
            return url
        scheme = url.partition("://")[0]  # the rest may hold a password
        raise RunError(
            f"database: expected sqlite:///FILE or postgresql+psycopg://…, found {scheme!r}"
        )


def parse_settings(tree: dict[str, Any], *, origin: str) -> CoordinatorSettings:
    """Validate settings; raises StudyError in one line."""
    return parse_strict(CoordinatorSettings, tree, origin=origin)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
