"""The command line's side of the admin interface, on this machine only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from common.errors import RunError
from common.secretfiles import check_private
from server.settings import CoordinatorFolder

TOKEN_VARIABLE = "CONSILIUM_TOKEN"  # noqa: S105 - the name of a variable

_API = "/api/v1/"
_TIMEOUT_S = 60.0


class AdminClient:
    """Talks to a running coordinator. Every error is a RunError of one line."""

    def __init__(
        self,
        folder: CoordinatorFolder,
        environ: Mapping[str, str] = os.environ,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """With the token of CONSILIUM_TOKEN, or else of ``folder/admin.token``."""
        self._folder = folder
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{folder.load_settings().admin_port}{_API}",
            headers={"Authorization": f"Bearer {_token(folder, environ)}"},
            timeout=_TIMEOUT_S,
            trust_env=False,  # no proxy sits between a machine and itself
            transport=transport,
        )

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self._client.close()

    def get(self, path: str) -> dict[str, Any]:
        """The object at ``path``."""
        return self._object(self._ask("GET", path))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What comes of ``body``."""
        return self._object(self._ask("POST", path, body))

    def delete(self, path: str) -> dict[str, Any]:
        """What comes of taking ``path`` away; empty if nothing is said."""
        reply = self._ask("DELETE", path)
        return self._object(reply) if reply.content else {}

    def download(self, path: str) -> bytes:
        """A file."""
        return self._ask("GET", path).content

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            reply = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise RunError(
                f"{self._folder.path}: its service does not answer ({type(error).__name__}); "
                f"start it with `consilium coordinator start`"
            ) from None
        if reply.is_success:
            return reply
        try:
            message = str(reply.json()["error"])
        except (ValueError, KeyError, TypeError):
            message = f"the service answered HTTP {reply.status_code}; is it another program's?"
        raise RunError(message)

    def _object(self, reply: httpx.Response) -> dict[str, Any]:
        try:
            found = reply.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RunError("service: expected a JSON object, found something else")
        return found


def _token(folder: CoordinatorFolder, environ: Mapping[str, str]) -> str:
    if environ.get(TOKEN_VARIABLE):
        return environ[TOKEN_VARIABLE]
    check_private(folder.admin_token)
    return _text(folder.admin_token)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
