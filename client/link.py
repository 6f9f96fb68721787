"""The hospital's word with its coordinator outside of rounds, over HTTPS.

The authority pinned by the join code is the only one believed; the host name is checked. What
comes back is verified by whoever uses it: here is only transport, joining and renewal.
"""

from __future__ import annotations

import email.utils
import hashlib
import re
import ssl
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from pydantic import TypeAdapter, ValidationError

from client.linkfolder import (
    LinkFacts,
    LinkFolder,
    check_reply,
    load_certificate,
    make_request,
    mutual_context,
    parse_certificate,
    server_only_context,
)
from common.auditlog import utc_now
from common.checkpoint import Checkpoint
from common.enrolment import (
    PREFIX,
    Answer,
    JoinCode,
    JoinReply,
    JoinRequest,
    Offered,
    RenewRequest,
    parse_message,
)
from common.errors import LinkError, MessageError
from common.identity import Identity
from common.secretfiles import WrappingKey, replace_file
from common.strict import Strict

CONNECT_S, ANSWER_S = 10.0, 30.0
_LARGEST_ANSWER = 64 * 2**20
_LONGEST_WORDS = 300
_UNACCEPTED = (400, 401, 403, 495, 496)

Reply = TypeVar("Reply", bound=Strict)
_OFFERS = TypeAdapter(list[Offered])


class Coordinator:
    """An HTTPS connection to one coordinator; close it, or use it in a ``with`` block."""

    def __init__(
        self,
        address: str,
        context: ssl.SSLContext,
        *,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """``address``: host:port. ``transport``: stands in for the network in tests."""
        self._address = address
        self._clock = clock
        self._client = httpx.Client(
            base_url=f"https://{address}{PREFIX}",
            verify=context,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            transport=transport,
            trust_env=False,
        )

    def __enter__(self) -> Coordinator:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def ca(self) -> x509.Certificate:
        """The certificate of its authority."""
        return parse_certificate(self._ask("GET", "ca").decode("ascii", "replace"))

    def join(self, request: JoinRequest) -> JoinReply:
        """Be let in."""
        return self._exchange("join", request, JoinReply)

    def renew(self, request: RenewRequest) -> JoinReply:
        """A new certificate."""
        return self._exchange("renew", request, JoinReply)

    def studies(self) -> list[Offered]:
        """All that this hospital was offered."""
        try:
            return _OFFERS.validate_json(self._ask("GET", "studies"))
        except ValidationError as error:
            raise MessageError(
                f"list of studies: expected offers, found something else "
                f"({error.error_count()} faults); coordinator and hospital may run different "
                f"versions"
            ) from None

    def answer(self, answer: Answer) -> None:
        """Hand in an answer; the same one again changes nothing."""
        self._ask("POST", "answers", answer.model_dump_json().encode())

    def countersign(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the coordinator's signature, unverified."""
        answer = self._ask("POST", "checkpoints", checkpoint.text().encode())
        return Checkpoint.from_text(answer.decode("utf-8", "replace"))

    def clock_offset_s(self) -> float:
        """By how many seconds this machine's clock is ahead of the coordinator's (± 1 s)."""
        before = self._clock()
        headers: dict[str, str] = {}
        self._ask("GET", "ca", seen=headers)
        middle = before + (self._clock() - before) / 2
        try:
            theirs = email.utils.parsedate_to_datetime(headers["date"])
        except (KeyError, ValueError):
            raise LinkError(f"{self._address}: its answer carries no date") from None
        # The header counts whole seconds: on average half of one has passed since.
        return (middle - theirs.astimezone(UTC)).total_seconds() - 0.5

    def _exchange(self, path: str, request: Strict, kind: type[Reply]) -> Reply:
        return parse_message(kind, self._ask("POST", path, request.model_dump_json().encode()))

    def _ask(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        *,
        seen: dict[str, str] | None = None,
    ) -> bytes:
        headers = {"content-type": "application/json"} if content is not None else {}
        try:
            with self._client.stream(method, f"/{path}", content=content, headers=headers) as reply:
                body = self._read(reply)
                if seen is not None:
                    seen.update(reply.headers)
                if reply.status_code != httpx.codes.OK:
                    raise self._declined(reply.status_code, body)
                return body
        except httpx.TimeoutException:
            raise LinkError(
                f"{self._address}: expected an answer within {ANSWER_S:.0f} s, found none; is the "
                f"coordinator running, and does a firewall let this machine through?"
            ) from None
        except (httpx.HTTPError, ssl.SSLError) as error:
            raise LinkError(f"{self._address}: {_explained(error, self._clock())}") from None

    def _read(self, reply: httpx.Response) -> bytes:
        body = bytearray()
        deadline = time.monotonic() + 10 * ANSWER_S
        for chunk in reply.iter_bytes():
            body += chunk
            if len(body) > _LARGEST_ANSWER or time.monotonic() > deadline:
                raise LinkError(
                    f"{self._address}: its answer is too long; nothing was taken from it"
                )
        return bytes(body)

    def _declined(self, status: int, body: bytes) -> LinkError:
        words = _words(body)
        if words:
            return LinkError(f"the coordinator declined: {words}")
        if status in _UNACCEPTED:
            return LinkError(f"{self._address}: {_CERTIFICATE} (HTTP {status})")
        return LinkError(
            f"{self._address}: answered HTTP {status}; is this the coordinator's address, and is "
            f"its program running?"
        )


def connect(
    folder: Path, wrapping: WrappingKey, *, transport: httpx.BaseTransport | None = None
) -> Coordinator:
    """The coordinator this hospital has joined, over mutual TLS."""
    link = LinkFolder(folder)
    facts = link.facts()
    link.settle()
    return Coordinator(facts.address, mutual_context(link, wrapping), transport=transport)


def join(
    folder: Path,
    code: JoinCode,
    identity: Identity,
    wrapping: WrappingKey,
    *,
    now: Callable[[], datetime] = utc_now,
) -> LinkFacts:
    """Be let in by the coordinator that gave the code. May be repeated after any interruption.

    Raises LinkError; then this hospital is as joined, or not, as it was.
    """
    link = LinkFolder(folder)
    link.make()
    if link.is_joined:
        known = link.facts()
        pinned = load_certificate(link.ca).fingerprint(hashes.SHA256()).hex()
        if (known.name, pinned) != (code.name, code.ca_sha256):
            raise LinkError(
                f"{link.path}: already joined {known.address} as {known.name!r}, and this code is "
                f"for {code.name!r} at another coordinator; move {link.path} away to join anew"
            )
    link.settle()
    ca = _pinned_ca(code)
    has_key = link.key.exists()
    key = link.read_key(wrapping) if has_key else link.new_key(wrapping)
    request = JoinRequest.make(code, make_request(code.name, key), identity)
    with Coordinator(code.address, server_only_context(ca)) as coordinator:
        reply = coordinator.join(request)
    signer = check_reply(reply, ca, key, code.name, now())
    replace_file(link.ca, ca.public_bytes(serialization.Encoding.PEM))
    link.install(reply.certificate, with_new_key=not has_key)
    facts = LinkFacts(address=code.address, name=code.name, coordinator=signer.text())
    link.write_facts(facts)
    return facts


def renew(
    folder: Path,
    coordinator: Coordinator,
    identity: Identity,
    wrapping: WrappingKey,
    *,
    with_new_key: bool = False,
    now: Callable[[], datetime] = utc_now,
) -> x509.Certificate:
    """A new certificate in use, for the same key or a new one. Raises LinkError; then the old."""
    link = LinkFolder(folder)
    facts = link.facts()
    key = link.new_key(wrapping) if with_new_key else link.read_key(wrapping)
    request = RenewRequest.make(make_request(facts.name, key), identity)
    reply = coordinator.renew(request)
    signer = check_reply(reply, load_certificate(link.ca), key, facts.name, now())
    if signer.text() != facts.coordinator:
        raise LinkError(
            f"renewal: expected the coordinator {facts.identity.fingerprint[:16]}…, found another "
            f"identity {signer.fingerprint[:16]}…; ask the coordinator, and join again if it "
            f"changed its keys"
        )
    link.install(reply.certificate, with_new_key=with_new_key)
    return link.read_certificate()


def _pinned_ca(code: JoinCode) -> x509.Certificate:
    """The authority's certificate, fetched from anybody and believed for its digest alone."""
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    with Coordinator(code.address, unverified) as stranger:
        ca = stranger.ca()
    found = hashlib.sha256(ca.public_bytes(serialization.Encoding.DER)).hexdigest()
    if found != code.ca_sha256:
        raise LinkError(
            f"{code.address}: expected the authority {code.ca_sha256[:16]}… of the code, found "
            f"{found[:16]}…: the code is another coordinator's, or somebody sits in between; "
            f"nothing was sent"
        )
    return ca


def _words(body: bytes) -> str:
    """The coordinator's own words, made harmless for a terminal."""
    try:
        found: Mapping[str, Any] = TypeAdapter(dict[str, Any]).validate_json(body)
    except ValidationError:
        return ""
    words = "".join(one for one in str(found.get("error", "")) if one.isprintable())
    return words[:_LONGEST_WORDS]


_CERTIFICATE = (
    "does not accept this hospital's certificate: it was revoked or has expired; ask the "
    "coordinator, and join again with a new code"
)
# What OpenSSL and the system say, and what a person can do about it; the first that fits.
_ADVICE = (
    (
        r"certificate (has expired|is not yet valid)",
        "its certificate is not valid at {now:%Y-%m-%d %H:%M} UTC, by this machine's clock; "
        "correct the clock, or tell the coordinator that its certificate has expired",
    ),
    (
        r"(hostname|ip address) mismatch",
        "its certificate is for another host name; ask the coordinator for its address",
    ),
    (
        r"certificate[ _]verify[ _]failed",
        "its certificate is not by the authority this hospital pinned; it is not the coordinator, "
        "or its authority was replaced: ask for a new code",
    ),
    (r"alert.*(certificate|unknown[ _]ca|decrypt[ _]error|access[ _]denied)", _CERTIFICATE),
    (
        r"getaddrinfo|name or service not known|name resolution",
        "this host name is unknown here; check the address in the join code, and the DNS",
    ),
)


def _explained(error: Exception, now: datetime) -> str:
    """What a person can do about a failed connection."""
    text = " ".join(str(error).split())
    for pattern, advice in _ADVICE:
        if re.search(pattern, text, re.IGNORECASE):
            return advice.format(now=now)
    if isinstance(error, httpx.ConnectError):
        return (
            f"cannot be reached ({text or type(error).__name__}); is the coordinator running, and "
            f"does a firewall let this machine through?"
        )
    return f"the connection broke off ({text or type(error).__name__}); it is tried again"
