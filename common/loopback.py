"""Certificates for connections that never leave this machine.

Flower demands TLS wherever nodes authenticate, on loopback too. Each start makes a new authority,
valid for this machine's loopback names alone, and forgets its key at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.secretfiles import replace_file

_VALID = timedelta(days=3650)  # replaced at every start; its key is gone
_BACKDATED = timedelta(days=1)  # a clock set back must not stop a machine talking to itself


@dataclass(frozen=True)
class LoopbackCertificate:
    """Files for a server on 127.0.0.1, ::1 or localhost: ``ca`` verifies ``certificate``."""

    ca: Path
    certificate: Path
    key: Path


def make_loopback_certificate(folder: Path) -> LoopbackCertificate:
    """Write a new authority and one certificate by it into ``folder`` (files of mode 0600)."""
    authority, server = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "consilium loopback authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    root = (
        _builder(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False
        )
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority, hashes.SHA256())
    )
    names = [
        x509.DNSName("localhost"),
        x509.IPAddress(ip_address("127.0.0.1")),
        x509.IPAddress(ip_address("::1")),
    ]
    leaf = (
        _builder(subject, issuer, server.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .add_extension(_usage(signs_certificates=False), critical=True)
        .sign(authority, hashes.SHA256())
    )
    made = LoopbackCertificate(
        folder / "loopback-ca.pem", folder / "loopback.pem", folder / "loopback.key"
    )
    replace_file(made.ca, root.public_bytes(serialization.Encoding.PEM))
    replace_file(made.certificate, leaf.public_bytes(serialization.Encoding.PEM))
    replace_file(
        made.key,
        server.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    return made


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _VALID)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
