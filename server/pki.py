"""The federation's certificate authority: who is let in, and who no longer is.

::

    pki/ca.pem      the authority's certificate (P-384), which join codes pin
    pki/ca.key      its key, encrypted with the wrapping key
    pki/server.pem  the coordinator's own certificate, for all names in ``host``
    pki/server.key  its key, mode 600: nginx reads it
    pki/crl.pem     revoked certificates (RFC 5280); nginx refuses every client once it expires

A hospital's certificate names it as the coordinator does; of its request only the key and the
proof of its possession count. One key is the TLS client's and Flower's node key.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import MessageError, SecretError
from common.secretfiles import WrappingKey, read_secret, replace_file, write_secret

CA_DAYS = 3650
CRL_DAYS = 7
SERVER_DAYS = 90

_KEY_PURPOSE = "certificate authority key"
_BACKDATED = timedelta(minutes=5)  # hospitals' clocks may be a little behind
_CURVES = (ec.SECP256R1, ec.SECP384R1)
_PEM = serialization.Encoding.PEM


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A hospital's new certificate. ``serial`` in hexadecimal, ``public_key`` as PEM."""

    serial: str
    not_after: datetime
    certificate: str
    public_key: str


@dataclass(frozen=True, kw_only=True)
class Revoked:
    """A certificate that no longer counts."""

    serial: str
    at: datetime


class Authority:
    """An open certificate authority. Get one from ``create`` or ``load``."""

    def __init__(
        self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        """``folder``: the files listed above."""
        self._folder = folder
        self._certificate = certificate
        self._key = key

    def __repr__(self) -> str:
        """The public fingerprint only."""
        return f"Authority({self.fingerprint[:16]}…)"

    @classmethod
    def create(cls, folder: Path, *, key: WrappingKey, now: datetime) -> Authority:
        """A new authority in ``folder``; raises SecretError when there is one."""
        if (folder / "ca.key").exists():
            raise SecretError(f"{folder}: holds an authority; its key is never overwritten")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = ec.generate_private_key(ec.SECP384R1())
        name = _common_name("Consilium federation")
        identifier = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
        certificate = (
            _builder(name, name, private.public_key(), now, timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(_usage(signs=True), critical=True)
            .sign(private, hashes.SHA384())
        )
        secret = private.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_secret(folder / "ca.key", secret, key=key, purpose=_KEY_PURPOSE)
        replace_file(folder / "ca.pem", certificate.public_bytes(_PEM))
        authority = cls(folder, certificate, private)
        authority.write_crl([], now=now)
        return authority

    @classmethod
    def load(cls, folder: Path, *, key: WrappingKey) -> Authority:
        """Open ``folder``; raises SecretError for a wrong key or certificate."""
        secret = read_secret(folder / "ca.key", key=key, purpose=_KEY_PURPOSE)
        private = serialization.load_der_private_key(secret, None)
        certificate = _load(folder / "ca.pem")
        if not isinstance(private, ec.EllipticCurvePrivateKey) or (
            certificate.public_key() != private.public_key()
        ):
            raise SecretError(f"{folder}: ca.pem and ca.key do not belong together; restore both")
        return cls(folder, certificate, private)

    @property
    def pem(self) -> str:
        """The authority's certificate."""
        return self._certificate.public_bytes(_PEM).decode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate (DER), in hexadecimal: what join codes pin."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def issue(self, name: str, request_pem: str, *, now: datetime, days: int) -> Issued:
        """A certificate for hospital ``name`` over the key of a request.

        Raises MessageError unless the request proves possession of a P-256 or P-384 key.
        """
        public = _requested_key(request_pem)
        certificate = (
            _builder(
                _common_name(name), self._certificate.subject, public, now, timedelta(days=days)
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
            .add_extension(self._authority_key(), critical=False)
            .sign(self._key, hashes.SHA384())
        )
        return Issued(
            serial=f"{certificate.serial_number:x}",
            not_after=certificate.not_valid_after_utc,
            certificate=certificate.public_bytes(_PEM).decode(),
            public_key=_public_pem(public),
        )

    def renew_server(self, hosts: Iterable[str], *, now: datetime) -> str:
        """A new key and certificate for the coordinator; its serial. nginx must reload."""
        private = ec.generate_private_key(ec.SECP384R1())
        hosts = list(hosts)
        names = x509.SubjectAlternativeName([_general_name(one) for one in hosts])
        certificate = (
            _builder(
                _common_name(hosts[0][:64]),
                self._certificate.subject,
                private.public_key(),
                now,
                timedelta(days=SERVER_DAYS),
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(self._authority_key(), critical=False)
            .sign(self._key, hashes.SHA384())
        )
        key = private.private_bytes(
            _PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # nginx reads both at a reload only; ``server_is_due`` mends a pair a crash left apart.
        replace_file(self._folder / "server.key", key)
        replace_file(self._folder / "server.pem", certificate.public_bytes(_PEM))
        return f"{certificate.serial_number:x}"

    def server_is_due(self, hosts: Iterable[str], *, now: datetime) -> bool:
        """Whether the coordinator's certificate is missing, misnamed or in its last third."""
        try:
            certificate = _load(self._folder / "server.pem")
            key = serialization.load_pem_private_key(
                (self._folder / "server.key").read_bytes(), None
            )
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except (SecretError, OSError, ValueError, x509.ExtensionNotFound):
            return True
        return (
            certificate.public_key() != key.public_key()
            or list(names.value) != [_general_name(one) for one in hosts]
            or certificate.issuer != self._certificate.subject
            or now > certificate.not_valid_after_utc - timedelta(days=SERVER_DAYS / 3)
        )

    def write_crl(self, revoked: Iterable[Revoked], *, now: datetime) -> None:
        """Replace the list of revoked certificates."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(now - _BACKDATED)
            .next_update(now + timedelta(days=CRL_DAYS))
            .add_extension(self._authority_key(), critical=False)
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        )
        for one in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(int(one.serial, 16))
                .revocation_date(one.at)
                .build()
            )
        signed = builder.sign(self._key, hashes.SHA384())
        replace_file(self._folder / "crl.pem", signed.public_bytes(_PEM))

    def crl_is_due(self, *, now: datetime) -> bool:
        """Whether the list is missing, damaged or past half its life."""
        try:
            listed = x509.load_pem_x509_crl((self._folder / "crl.pem").read_bytes())
        except (OSError, ValueError):
            return True
        expires = listed.next_update_utc
        return expires is None or now > expires - timedelta(days=CRL_DAYS / 2)

    def expiries(self) -> dict[str, datetime]:
        """When the authority, the coordinator's certificate and the revocation list end."""
        found = {"ca": self._certificate.not_valid_after_utc}
        with suppress(SecretError):
            found["server"] = _load(self._folder / "server.pem").not_valid_after_utc
        with suppress(OSError, ValueError):
            listed = x509.load_pem_x509_crl((self._folder / "crl.pem").read_bytes())
            found["crl"] = listed.next_update_utc or found["ca"]
        return found

    def _authority_key(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())


def request_key(request_pem: str) -> str:
    """The public key (PEM) of a certificate request; raises MessageError as ``issue`` does."""
    return _public_pem(_requested_key(request_pem))


def _requested_key(request_pem: str) -> ec.EllipticCurvePublicKey:
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        public = request.public_key()
        proven = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        raise MessageError(
            "certificate request: expected a PEM request, found something else; join again"
        ) from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, _CURVES):
        raise MessageError("certificate request: expected a P-256 or P-384 key; make a new key")
    if not proven:
        raise MessageError("certificate request: its signature is not by its key; make a new one")
    return public


def _public_pem(public: ec.EllipticCurvePublicKey) -> str:
    return public.public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SecretError(f"{path}: no certificate can be read ({error})") from None


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime,
    valid: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - _BACKDATED)
        .not_valid_after(now.astimezone(UTC) + valid)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
