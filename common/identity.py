"""Who signed this: Ed25519 keys of hospitals and coordinators (RFC 8032).

A signature names its purpose, so that one made over a policy is worthless on a checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import SecretError, SignatureError
from common.secretfiles import WrappingKey, read_secret, replace_file, write_secret

_KEY_PURPOSE = "ed25519 identity"
_PUBLIC_PREFIX = "consilium-ed25519"


@dataclass(frozen=True)
class PublicIdentity:
    """The public half: 32 bytes, safe to hand out."""

    key: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key in hexadecimal: what two people compare over the telephone."""
        return hashlib.sha256(self.key).hexdigest()

    def verify(self, message: bytes, signature: bytes, *, purpose: str) -> None:
        """Raise SignatureError unless this key signed ``message`` for ``purpose``."""
        try:
            public = Ed25519PublicKey.from_public_bytes(self.key)
            public.verify(signature, _framed(message, purpose))
        except (InvalidSignature, ValueError):
            raise SignatureError(
                f"{purpose}: the signature is not by key {self.fingerprint[:16]}… over these "
                f"bytes; they were changed, or signed by someone else"
            ) from None

    def text(self) -> str:
        """One line for a file or a message."""
        return f"{_PUBLIC_PREFIX} {base64.b64encode(self.key).decode()}"

    @classmethod
    def from_text(cls, line: str) -> PublicIdentity:
        """The key of ``text``; raises SecretError for anything else."""
        try:
            prefix, encoded = line.split()
            key = base64.b64decode(encoded, validate=True)
            Ed25519PublicKey.from_public_bytes(key)
        except (ValueError, binascii.Error):
            prefix = ""
        if prefix != _PUBLIC_PREFIX:
            raise SecretError(
                f"public key: expected a line '{_PUBLIC_PREFIX} <base64>', found {line[:40]!r}"
            )
        return cls(key)

    def save(self, path: Path) -> None:
        """Write ``text`` to ``path``, readable by all."""
        replace_file(path, f"{self.text()}\n".encode(), mode=0o644)

    @classmethod
    def load(cls, path: Path) -> PublicIdentity:
        """Read a file by ``save``."""
        try:
            return cls.from_text(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SecretError(f"{path}: no public key can be read ({error})") from None


class Identity:
    """A signing key. Its representation never shows it."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        """``private``: from ``generate`` or ``load``."""
        self._private = private
        self.public = PublicIdentity(private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Identity:
        """A new key from the operating system."""
        return cls(Ed25519PrivateKey.generate())

    def __repr__(self) -> str:
        """The public fingerprint only."""
        return f"Identity({self.public.fingerprint[:16]}…)"

    def sign(self, message: bytes, *, purpose: str) -> bytes:
        """64 bytes that ``PublicIdentity.verify`` accepts for the same message and purpose."""
        return self._private.sign(_framed(message, purpose))

    def save(self, path: Path, *, key: WrappingKey) -> None:
        """Write the key encrypted, mode 0600."""
        write_secret(path, self._private.private_bytes_raw(), key=key, purpose=_KEY_PURPOSE)

    @classmethod
    def load(cls, path: Path, *, key: WrappingKey) -> Identity:
        """Read a file by ``save``; raises SecretError for a wrong key or loose permissions."""
        raw = read_secret(path, key=key, purpose=_KEY_PURPOSE)
        return cls(Ed25519PrivateKey.from_private_bytes(raw))


def _framed(message: bytes, purpose: str) -> bytes:
    return b"consilium-signature-v1\0" + purpose.encode() + b"\0" + message
