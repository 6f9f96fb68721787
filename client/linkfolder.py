"""What binds a hospital to its coordinator, on disk: certificate, key, and whom to believe.

::

    FOLDER/link/       mode 700
      link.json        address, name, the coordinator's identity; written last: joined
      ca.pem           the coordinator's authority; nothing else is believed
      client.key       P-384, encrypted with the wrapping key; TLS client and Flower node key
      client.pem       the certificate over it
      checkpoint.json  the newest countersigned checkpoint of the audit log
      client.{key,pem}.new   a change under way: ``client.pem.new`` decides that it has happened

The key is opened in memory only.
"""

from __future__ import annotations

import os
import secrets
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.enrolment import HospitalName, JoinReply, parse_message
from common.errors import LinkError, SecretError
from common.files import sync_folder
from common.identity import PublicIdentity
from common.secretfiles import WrappingKey, read_secret, replace_file, write_secret
from common.strict import Strict

_PURPOSE = "link key"
_PEM = serialization.Encoding.PEM


class LinkFacts(Strict):
    """``link.json``: where the coordinator is, as whom it knows us, and who signs its offers."""

    address: str
    name: HospitalName
    coordinator: str

    @property
    def host(self) -> str:
        """The host name that its certificate must carry."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.address.rpartition(":")[2])

    @property
    def identity(self) -> PublicIdentity:
        """The key that signs offers and checkpoints."""
        return PublicIdentity.from_text(self.coordinator)


@dataclass(frozen=True)
class LinkFolder:
    """Where everything is, in the hospital's ``folder``."""

    folder: Path

    @property
    def path(self) -> Path:
        """The link's own folder."""
        return self.folder / "link"

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.path / "ca.pem"

    @property
    def certificate(self) -> Path:
        """This hospital's certificate."""
        return self.path / "client.pem"

    @property
    def key(self) -> Path:
        """Its key, encrypted."""
        return self.path / "client.key"

    @property
    def checkpoint(self) -> Path:
        """The newest countersigned checkpoint."""
        return self.path / "checkpoint.json"

    @property
    def is_joined(self) -> bool:
        """Whether a coordinator has let this hospital in."""
        return (self.path / "link.json").exists()

    def make(self) -> None:
        """The folder, where it is missing."""
        self.path.mkdir(mode=0o700, exist_ok=True)
        sync_folder(self.folder)

    def facts(self) -> LinkFacts:
        """Raises LinkError before `join`."""
        try:
            content = (self.path / "link.json").read_bytes()
        except OSError:
            raise LinkError(
                f"{self.path}: this hospital has not joined; ask the coordinator for a code, "
                f"then `consilium hospital join`"
            ) from None
        return parse_message(LinkFacts, content)

    def write_facts(self, facts: LinkFacts) -> None:
        """From now on the hospital has joined."""
        replace_file(self.path / "link.json", facts.model_dump_json(indent=1).encode())

    def read_key(self, wrapping: WrappingKey) -> ec.EllipticCurvePrivateKey:
        """The key in use; raises SecretError."""
        return _parsed_key(read_secret(self.key, key=wrapping, purpose=_PURPOSE), self.key)

    def new_key(self, wrapping: WrappingKey) -> ec.EllipticCurvePrivateKey:
        """A key for the next certificate: the one an interrupted change left, or a fresh one."""
        path = _new(self.key)
        if path.exists():
            return _parsed_key(read_secret(path, key=wrapping, purpose=_PURPOSE), path)
        key = ec.generate_private_key(ec.SECP384R1())
        plain = key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_secret(path, plain, key=wrapping, purpose=_PURPOSE)
        return key

    def install(self, certificate: str, *, with_new_key: bool) -> None:
        """Put a verified certificate in use, together with the key made for it; all or nothing."""
        if not with_new_key:
            replace_file(self.certificate, certificate.encode())
            return
        replace_file(_new(self.certificate), certificate.encode())
        self.settle()

    def settle(self) -> None:
        """Finish a change that a crash interrupted."""
        pending = _new(self.certificate)
        if not pending.exists():
            return
        with suppress(FileNotFoundError):
            _new(self.key).replace(self.key)
        # The key must be there for good before the word that it is.
        sync_folder(self.path)
        pending.replace(self.certificate)
        sync_folder(self.path)

    def read_certificate(self) -> x509.Certificate:
        """The certificate in use."""
        return load_certificate(self.certificate)


def load_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM; raises LinkError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LinkError(f"{path}: no certificate can be read ({error}); join again") from None


def parse_certificate(pem: str) -> x509.Certificate:
    """A certificate from a message; raises LinkError."""
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        raise LinkError(
            "the coordinator sent no certificate where one was expected; its version may differ"
        ) from None


def days_left(certificate: x509.Certificate, now: datetime) -> float:
    """Until it expires; negative afterwards."""
    return (certificate.not_valid_after_utc - now).total_seconds() / 86_400


def is_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether two thirds of its life have passed."""
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return now >= certificate.not_valid_before_utc + life * 2 / 3


def make_request(name: str, key: ec.EllipticCurvePrivateKey) -> str:
    """A certificate request (PEM), signed by its key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA384()).public_bytes(_PEM).decode()


def check_reply(
    reply: JoinReply,
    ca: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    name: str,
    now: datetime,
) -> PublicIdentity:
    """The coordinator's identity, if the certificate is ours: for this key and name, by ``ca``.

    Raises LinkError otherwise.
    """
    certificate = parse_certificate(reply.certificate)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if parse_certificate(reply.ca).fingerprint(hashes.SHA256()) != ca.fingerprint(hashes.SHA256()):
        raise LinkError(
            "reply to join: expected the authority that the code names, found another; "
            "ask the coordinator what changed"
        )
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise LinkError(
            "reply to join: expected a certificate by the coordinator's authority, found one that "
            "is not; do not use it, and tell the coordinator"
        ) from None
    if certificate.public_key() != key.public_key():
        raise LinkError(
            "reply to join: expected a certificate for the key made here, found another key; "
            "do not use it, and tell the coordinator"
        )
    if [one.value for one in names] != [name]:
        raise LinkError(f"reply to join: expected a certificate for {name!r}, found another name")
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise LinkError(
            f"reply to join: expected a certificate valid now, {now:%Y-%m-%d %H:%M} UTC by this "
            f"machine's clock, found {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M}; correct the clock"
        )
    return PublicIdentity.from_text(reply.coordinator)


def server_only_context(ca: x509.Certificate) -> ssl.SSLContext:
    """Believes ``ca`` alone and checks the host name; TLS 1.3."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca.public_bytes(_PEM).decode())
    return context


def mutual_context(link: LinkFolder, wrapping: WrappingKey) -> ssl.SSLContext:
    """The same, and presents this hospital's certificate; its key is opened in memory only."""
    context = server_only_context(load_certificate(link.ca))
    _load_chain(context, link.certificate.read_bytes(), link.read_key(wrapping))
    return context


def node_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The key as Flower's SuperNode reads it."""
    return key.private_bytes(
        _PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


@contextmanager
def memory_file(name: str, content: bytes) -> Iterator[int]:
    """The descriptor of a file that lives in memory and ends with its last user."""
    descriptor = os.memfd_create(name)
    try:
        write_memory_file(descriptor, content)
        yield descriptor
    finally:
        os.close(descriptor)


def write_memory_file(descriptor: int, content: bytes) -> None:
    """Replace what a memory file holds."""
    os.ftruncate(descriptor, 0)
    view, offset = memoryview(content), 0
    while offset < len(content):
        offset += os.pwrite(descriptor, view[offset:], offset)


def _load_chain(
    context: ssl.SSLContext, certificate: bytes, key: ec.EllipticCurvePrivateKey
) -> None:
    # OpenSSL reads keys from files only: one in memory, under a password that is used once.
    password = secrets.token_hex(32)
    sealed = key.private_bytes(
        _PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password.encode()),
    )
    with memory_file("link", certificate + sealed) as descriptor:
        try:
            context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=password)
        except ssl.SSLError as error:
            raise SecretError(
                f"client.pem and client.key do not belong together ({error.reason}); join again"
            ) from None


def _parsed_key(plain: bytes, path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_der_private_key(plain, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SecretError(f"{path}: expected an elliptic-curve key; join again")
    return key


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")
