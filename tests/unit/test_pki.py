"""The authority: what it signs, what it refuses, what it withdraws."""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import MessageError, SecretError
from common.secretfiles import WrappingKey
from server.pki import CRL_DAYS, SERVER_DAYS, Authority, Revoked
from tests.unit.coordinator import START, certificate_request

KEY = WrappingKey(key=b"k" * 32)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "pki", key=KEY, now=START)


def test_the_hospitals_name_is_the_coordinators_choice(authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    issued = authority.issue("north", certificate_request(key, "south"), now=START, days=30)
    certificate = x509.load_pem_x509_certificate(issued.certificate.encode())
    assert certificate.subject.rfc4514_string() == "CN=north"
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert certificate.not_valid_after_utc == START + timedelta(days=30) == issued.not_after
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.pem.encode()))
    # Flower's header carries exactly these bytes in base64.
    assert issued.public_key == (
        key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def _csr(key: object) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, algorithm).public_bytes(serialization.Encoding.PEM).decode()  # type: ignore[arg-type,call-overload]


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
    ],
    ids=["rsa", "ed25519", "p521", "secp256k1"],
)
def test_other_kinds_of_key_are_refused(authority: Authority, key: object) -> None:
    with pytest.raises(MessageError, match="P-256 or P-384"):
        authority.issue("north", _csr(key), now=START, days=1)


def test_a_request_without_proof_of_its_key_is_refused(authority: Authority) -> None:
    text = certificate_request(ec.generate_private_key(ec.SECP384R1()), "x")
    request = x509.load_pem_x509_csr(text.encode())
    data = bytearray(request.public_bytes(serialization.Encoding.DER))
    data[-1] ^= 1  # inside the signature
    import base64

    forged = base64.encodebytes(bytes(data)).decode()
    pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{forged}-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(MessageError, match="certificate request"):
        authority.issue("north", pem, now=START, days=1)
    with pytest.raises(MessageError, match="expected a PEM request"):
        authority.issue("north", "nonsense", now=START, days=1)


def test_the_key_of_the_authority_is_unreadable_without_the_wrapping_key(
    authority: Authority, tmp_path: Path
) -> None:
    stored = (tmp_path / "pki" / "ca.key").read_bytes()
    assert b"PRIVATE KEY" not in stored
    for one in (tmp_path / "pki").iterdir():
        assert one.stat().st_mode & 0o077 == 0
    assert Authority.load(tmp_path / "pki", key=KEY).fingerprint == authority.fingerprint
    with pytest.raises(SecretError, match="does not open it"):
        Authority.load(tmp_path / "pki", key=WrappingKey(key=b"o" * 32))
    with pytest.raises(SecretError, match="never overwritten"):
        Authority.create(tmp_path / "pki", key=KEY, now=START)


def test_revoked_certificates_are_listed_and_the_list_never_expires_unnoticed(
    authority: Authority, tmp_path: Path
) -> None:
    authority.write_crl([Revoked(serial="abc123", at=START)], now=START)
    listed = x509.load_pem_x509_crl((tmp_path / "pki" / "crl.pem").read_bytes())
    assert listed.get_revoked_certificate_by_serial_number(0xABC123) is not None
    assert listed.get_revoked_certificate_by_serial_number(0xABC124) is None
    ca = x509.load_pem_x509_certificate(authority.pem.encode())
    assert listed.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    assert not authority.crl_is_due(now=START + timedelta(days=1))
    assert authority.crl_is_due(now=START + timedelta(days=CRL_DAYS / 2, hours=1))
    (tmp_path / "pki" / "crl.pem").unlink()
    assert authority.crl_is_due(now=START)


def test_the_servers_certificate_is_renewed_in_time(authority: Authority, tmp_path: Path) -> None:
    hosts = ("coordinator.example", "192.0.2.7", "2001:db8::7")
    assert authority.server_is_due(hosts, now=START)
    authority.renew_server(hosts, now=START)
    path = tmp_path / "pki" / "server.pem"
    first = x509.load_pem_x509_certificate(path.read_bytes())
    names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("192.0.2.7"),
        ipaddress.ip_address("2001:db8::7"),
    ]
    assert not authority.server_is_due(hosts, now=START)
    assert authority.server_is_due(hosts[:2], now=START)
    late = START + timedelta(days=SERVER_DAYS * 0.7)
    assert authority.server_is_due(hosts, now=late)
    authority.renew_server(hosts, now=late)
    second = x509.load_pem_x509_certificate(path.read_bytes())
    assert second.public_key() != first.public_key()
    assert not authority.server_is_due(hosts, now=late)
    # A crash between the two files leaves a pair that does not fit: it is made anew.
    path.write_bytes(first.public_bytes(serialization.Encoding.PEM))
    assert authority.server_is_due(hosts, now=START)
