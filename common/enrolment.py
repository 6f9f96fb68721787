"""What coordinator and hospital say to each other outside of rounds: joining, offers, answers.

Small JSON messages over HTTPS. Whatever a person will rely on later is signed: a request to join by
the hospital's identity, an offer by the coordinator's, an answer by the hospital's. Verification
raises; it never returns a bool.

::

    hospital                                   coordinator
      GET  ca            (pinned by the code)    its CA certificate
      POST join          JoinRequest             JoinReply          (no certificate yet)
      ---- from here on over mutual TLS, the hospital known by its certificate ----
      GET  studies                               [Offered, …]
      POST answers       Answer                  {}
      POST renew         RenewRequest            JoinReply
      POST checkpoints   a checkpoint's line     the same, countersigned
      GET  studies/DIGEST/files/NAME             a finished study's public files
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from common.auditlog import canonical
from common.errors import MessageError, SignatureError
from common.identity import Identity, PublicIdentity
from common.strict import Strict

PREFIX = "/hospital/v1"
FINISHED_FILES = ("student.safetensors", "result.json", "privacy.json", "PRIVACY.md", "study.toml")

HospitalName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Pem = Annotated[str, Field(min_length=1, max_length=20_000)]

_CODE_PREFIX = "consilium-join:"
_SECRET_BYTES = 20
_CHECK_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class JoinCode:
    """What a coordinator hands to one hospital, once, by a channel of their own.

    ``address``: host:port of the coordinator. ``ca_sha256``: hexadecimal digest of its CA
    certificate (DER), so that the first connection cannot be intercepted. ``secret``: used up by
    the first successful join.
    """

    address: str
    ca_sha256: str
    name: str
    secret: bytes

    def __repr__(self) -> str:
        """Never the secret: representations end up in logs."""
        return f"JoinCode({self.name!r} at {self.address})"

    def text(self) -> str:
        """One word, safe to paste; a lost character is noticed.

        >>> code = JoinCode(address="c:8443", ca_sha256="00" * 32, name="north", secret=b"s" * 20)
        >>> JoinCode.from_text(code.text()) == code
        True
        """
        secret = base64.b64encode(self.secret).decode()
        body = canonical([self.address, self.ca_sha256, self.name, secret])
        return _CODE_PREFIX + base64.urlsafe_b64encode(_check(body) + body).decode().rstrip("=")

    @classmethod
    def from_text(cls, text: str) -> JoinCode:
        """The code of ``text``; raises MessageError when it is not whole."""
        encoded = "".join(text.split()).removeprefix(_CODE_PREFIX)
        try:
            data = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            check, body = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
            if check != _check(body):
                raise ValueError
            address, ca_sha256, name, secret = json.loads(body)
            return cls(
                address=address, ca_sha256=ca_sha256, name=name, secret=base64.b64decode(secret)
            )
        except (ValueError, binascii.Error):
            raise MessageError(
                f"join code: expected the whole word '{_CODE_PREFIX}…' of "
                f"`consilium coordinator enroll`, found {len(encoded)} characters that are not; "
                f"paste it again"
            ) from None


class JoinRequest(Strict):
    """A hospital asks to be let in. ``certificate_request``: PEM, of a key that stays with it."""

    name: HospitalName
    secret: str
    identity: str
    certificate_request: Pem
    signature: str

    @classmethod
    def make(cls, code: JoinCode, certificate_request: str, identity: Identity) -> JoinRequest:
        """Signed by ``identity``, which the coordinator will know the hospital by."""
        facts = {
            "name": code.name,
            "secret": base64.b64encode(code.secret).decode(),
            "identity": identity.public.text(),
            "certificate_request": certificate_request,
        }
        return cls(**facts, signature=_signed(identity, "join", facts))

    def verify(self) -> PublicIdentity:
        """The identity that signed it; raises SignatureError."""
        facts = self.model_dump(exclude={"signature"})
        return _verified(PublicIdentity.from_text(self.identity), "join", facts, self.signature)


class RenewRequest(Strict):
    """A hospital asks for a new certificate, for the same key or a new one."""

    certificate_request: Pem
    signature: str

    @classmethod
    def make(cls, certificate_request: str, identity: Identity) -> RenewRequest:
        """Signed by the hospital's identity."""
        facts = {"certificate_request": certificate_request}
        return cls(**facts, signature=_signed(identity, "renew", facts))

    def verify(self, identity: PublicIdentity) -> None:
        """Raise SignatureError unless ``identity`` signed it."""
        facts = self.model_dump(exclude={"signature"})
        _verified(identity, "renew", facts, self.signature)


class JoinReply(Strict):
    """The hospital's certificate, the CA's, and the identity that will sign offers."""

    certificate: Pem
    ca: Pem
    coordinator: str


class Offer(Strict):
    """A study the coordinator asks hospitals to take part in.

    ``study``: the study file's text; ``digest``: of the study it parses to; ``hospitals``: the
    identities of all who are asked, by name, which each pins when it approves.
    """

    study: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    hospitals: dict[HospitalName, str]
    submitted_at: datetime
    signature: str

    @classmethod
    def make(
        cls,
        *,
        study: str,
        digest: str,
        hospitals: dict[str, str],
        submitted_at: datetime,
        identity: Identity,
    ) -> Offer:
        """Signed by the coordinator's ``identity``."""
        unsigned = cls(
            study=study,
            digest=digest,
            hospitals=hospitals,
            submitted_at=submitted_at,
            signature="",
        )
        return unsigned.model_copy(
            update={"signature": _signed(identity, "offer", unsigned._facts())}
        )

    def verify(self, coordinator: PublicIdentity) -> None:
        """Raise SignatureError unless ``coordinator`` signed it."""
        _verified(coordinator, "offer", self._facts(), self.signature)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that was signed: what an answer refers to."""
        return hashlib.sha256(canonical(self._facts())).hexdigest()

    def _facts(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"signature"})


class Answer(Strict):
    """A hospital's word on an offer, signed by it. ``reason`` is public."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    offer: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    hospital: HospitalName
    decision: Literal["approve", "refuse"]
    reason: Annotated[str, Field(max_length=500)] = ""
    answered_at: datetime
    signature: str

    @classmethod
    def make(
        cls,
        offer: Offer,
        *,
        hospital: str,
        decision: Literal["approve", "refuse"],
        answered_at: datetime,
        identity: Identity,
        reason: str = "",
    ) -> Answer:
        """Signed by the hospital's ``identity``."""
        unsigned = cls(
            digest=offer.digest,
            offer=offer.fingerprint,
            hospital=hospital,
            decision=decision,
            reason=reason,
            answered_at=answered_at,
            signature="",
        )
        signature = _signed(identity, "answer", unsigned._facts())
        return unsigned.model_copy(update={"signature": signature})

    def verify(self, hospital: PublicIdentity, offer: Offer) -> None:
        """Raise SignatureError unless ``hospital`` gave this answer to this very ``offer``."""
        if (self.digest, self.offer) != (offer.digest, offer.fingerprint):
            raise SignatureError(
                f"answer: expected one to offer {offer.fingerprint[:16]}…, "
                f"found one to {self.offer[:16]}…"
            )
        _verified(hospital, "answer", self._facts(), self.signature)

    def _facts(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"signature"})


class Offered(Strict):
    """An offer as the hospital finds it: how it stands with the coordinator."""

    offer: Offer
    state: Literal["offered", "running", "finished", "failed", "stopped"]
    answer: Answer | None = None


Model = TypeVar("Model", bound=Strict)


def parse_message(kind: type[Model], data: bytes | str) -> Model:
    """The message of ``kind`` in JSON ``data``; raises MessageError."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or kind.__name__
        raise MessageError(f"{kind.__name__}: {place}: {first['msg']}") from None


def _signed(identity: Identity, purpose: str, facts: dict[str, Any]) -> str:
    return base64.b64encode(identity.sign(canonical(facts), purpose=purpose)).decode()


def _verified(
    identity: PublicIdentity, purpose: str, facts: dict[str, Any], signature: str
) -> PublicIdentity:
    try:
        decoded = base64.b64decode(signature, validate=True)
    except binascii.Error:
        decoded = b""
    identity.verify(canonical(facts), decoded, purpose=purpose)
    return identity


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECK_BYTES]
