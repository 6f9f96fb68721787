"""What both HTTP interfaces share: errors in one line, limits, security headers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import (
    AuditError,
    ConsiliumError,
    MessageError,
    RefusalError,
    RunError,
    SecretError,
    SignatureError,
    StudyError,
)
from server.desk import NotFoundError, UnavailableError

_logger = logging.getLogger(__name__)

# The first that fits counts.
_STATUS: tuple[tuple[type[ConsiliumError], int], ...] = (
    (NotFoundError, 404),
    (UnavailableError, 503),
    (RefusalError, 403),
    (SignatureError, 403),
    (MessageError, 400),
    (SecretError, 400),
    (StudyError, 400),
    (AuditError, 409),
    (RunError, 409),
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error with its status and ``{"error": "one line"}``."""

    @app.exception_handler(ConsiliumError)
    def _known(_: Request, error: ConsiliumError) -> JSONResponse:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        return error_response(status, str(error))

    @app.exception_handler(HTTPException)
    def _http(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return error_response(422, f"{place}: {first['msg']}")

    @app.exception_handler(Exception)
    def _unknown(_: Request, error: Exception) -> JSONResponse:
        _logger.error("unexpected %s", type(error).__name__)
        return error_response(500, "service: an unexpected error; see its log")


def error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """``message`` as JSON, on one line."""
    return JSONResponse({"error": " ".join(message.split())}, status, headers)


class BodyLimit:
    """Refuses bodies above ``limit`` bytes, whatever they announce; takes them in whole."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                found = f"body: expected at most {self._limit} bytes, found more"
                await error_response(413, found)(scope, receive, send)
                return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


class Headers:
    """Adds security headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._raw = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._raw]
            await send(message)

        await self._app(scope, receive, with_headers)


class Throttle:
    """At most ``limit`` calls a window for each caller; remembers few of them."""

    def __init__(
        self, limit: int, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._window_s, self._clock = limit, window_s, clock
        self._lock = threading.Lock()
        self._calls: dict[str, list[float]] = {}

    def admit(self, caller: str) -> bool:
        """Whether this call is within the limit."""
        now = self._clock()
        with self._lock:
            self._calls = {
                one: recent
                for one, calls in self._calls.items()
                if (recent := [at for at in calls if now - at < self._window_s])
            }
            calls = self._calls.setdefault(caller, [])
            if len(calls) >= self._limit:
                return False
            calls.append(now)
            return True
