"""Secrets at rest: AES-256-GCM files that only their owner can read.

A file holds ``magic | kind | salt | nonce | ciphertext``. Its key comes from the hospital's
wrapping key, which is 32 random bytes (a key file or an environment variable) or a passphrase
(scrypt). The file's purpose is authenticated with it, so that one secret cannot stand in for
another. Files are replaced atomically: a crash leaves the old content or the new.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import SecretError
from common.files import replace

KEY_BYTES = 32
KEY_VARIABLE = "CONSILIUM_KEY"
PASSPHRASE_VARIABLE = "CONSILIUM_PASSPHRASE"  # noqa: S105 - the name of a variable
KEY_FILE_VARIABLE = "CONSILIUM_KEY_FILE"
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"  # systemd's, for LoadCredential=

_MAGIC = b"consilium-secret-1\n"
_SALT_BYTES = 16
_NONCE_BYTES = 12
# 64 MiB and about 0.2 s a guess.
_SCRYPT_COST, _SCRYPT_BLOCK, _SCRYPT_MEMORY = 2**16, 8, 2**27


@dataclass(frozen=True, kw_only=True)
class WrappingKey:
    """What opens a hospital's secret files: random ``key`` bytes or a ``passphrase``."""

    key: bytes = field(default=b"", repr=False)
    passphrase: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Refuse an empty or short key."""
        if bool(self.key) == bool(self.passphrase):
            raise SecretError("wrapping key: expected either a key or a passphrase, not both")
        if self.key and len(self.key) != KEY_BYTES:
            raise SecretError(
                f"wrapping key: expected {KEY_BYTES} bytes, found {len(self.key)}; "
                f"create one with `consilium hospital init`"
            )

    @classmethod
    def from_file(cls, path: Path, *, handed_over: bool = False) -> WrappingKey:
        """The key in a file of 44 base64 characters that nobody else can read."""
        check_private(path, handed_over=handed_over)
        return cls(key=_decoded(_read(path), str(path)))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> WrappingKey | None:
        """The key in ``CONSILIUM_KEY`` or the passphrase in ``CONSILIUM_PASSPHRASE``, if set."""
        if environ.get(KEY_VARIABLE):
            return cls(key=_decoded(environ[KEY_VARIABLE].encode(), KEY_VARIABLE))
        if environ.get(PASSPHRASE_VARIABLE):
            return cls(passphrase=environ[PASSPHRASE_VARIABLE])
        return None

    @classmethod
    def of_folder(cls, folder: Path, environ: Mapping[str, str]) -> WrappingKey:
        """What opens ``folder``: the environment's, a key file it names, or ``folder/key``."""
        if key := cls.from_environment(environ):
            return key
        path = Path(environ.get(KEY_FILE_VARIABLE) or folder / "key")
        credentials = environ.get(CREDENTIALS_VARIABLE)
        handed_over = credentials is not None and path.parent == Path(credentials)
        return cls.from_file(path, handed_over=handed_over)

    @classmethod
    def made_for_folder(cls, folder: Path, environ: Mapping[str, str]) -> WrappingKey:
        """The same for a new folder; a new key in ``folder/key`` unless the environment has one."""
        if not (cls.from_environment(environ) or environ.get(KEY_FILE_VARIABLE)):
            cls(key=secrets.token_bytes(KEY_BYTES)).write(folder / "key")
        return cls.of_folder(folder, environ)

    def write(self, path: Path) -> None:
        """Write the random key as a key file of mode 0600; an existing one is never replaced."""
        if path.exists():
            raise SecretError(f"{path}: a key file exists; move it away rather than overwrite it")
        replace_file(path, base64.b64encode(self.key) + b"\n")

    def _file_key(self, salt: bytes) -> bytes:
        if self.passphrase:
            return hashlib.scrypt(
                self.passphrase.encode(),
                salt=salt,
                n=_SCRYPT_COST,
                r=_SCRYPT_BLOCK,
                p=1,
                maxmem=_SCRYPT_MEMORY,
                dklen=KEY_BYTES,
            )
        return derive(self.key, "secret file", salt)


def derive(key: bytes, purpose: str, salt: bytes = b"") -> bytes:
    """An independent 32-byte key for ``purpose`` (HKDF-SHA256, RFC 5869)."""
    info = f"consilium {purpose}".encode()
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=salt or None, info=info).derive(
        key
    )


def seal(key: bytes, data: bytes, context: bytes) -> bytes:
    """``data`` encrypted and authenticated together with ``context`` (AES-256-GCM)."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, data, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """What ``seal`` encrypted; raises SecretError for another key, context or content."""
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError):
        raise SecretError(
            "encrypted data: the key is not the one it was written with, or it was changed"
        ) from None


def write_secret(path: Path, data: bytes, *, key: WrappingKey, purpose: str) -> None:
    """Encrypt ``data`` into ``path`` (mode 0600), atomically and durably."""
    salt = secrets.token_bytes(_SALT_BYTES)
    kind = b"P" if key.passphrase else b"K"
    sealed = seal(key._file_key(salt), data, _MAGIC + kind + purpose.encode())
    replace_file(path, _MAGIC + kind + salt + sealed)


def read_secret(path: Path, *, key: WrappingKey, purpose: str) -> bytes:
    """The content of a file by ``write_secret``.

    Raises SecretError when the file is missing, open to others, not ours, or of another key.
    """
    check_private(path)
    content = _read(path)
    kind = b"P" if key.passphrase else b"K"
    if not content.startswith(_MAGIC) or len(content) <= len(_MAGIC) + 1 + _SALT_BYTES:
        raise SecretError(f"{path}: expected a secret file of this program; restore a backup")
    start = len(_MAGIC)
    if content[start : start + 1] != kind:
        wanted = "passphrase" if content[start : start + 1] == b"P" else "key"
        raise SecretError(f"{path}: was written with a {wanted}; give that instead")
    salt = content[start + 1 : start + 1 + _SALT_BYTES]
    try:
        return unseal(
            key._file_key(salt),
            content[start + 1 + _SALT_BYTES :],
            _MAGIC + kind + purpose.encode(),
        )
    except SecretError:
        raise SecretError(
            f"{path}: this key does not open it; expected the key that this folder was created "
            f"with (or the file was changed: restore a backup)"
        ) from None


def check_private(path: Path, *, handed_over: bool = False) -> None:
    """Refuse a file that is missing, a link, somebody else's, or readable by others.

    ``handed_over``: by the service manager, in a folder that only this service can enter. There the
    file is root's, and we read it by an access list, whose mask shows as the group's permission.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise SecretError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise SecretError(f"{path}: expected a plain file, found a link, folder or device")
    owners = {os.geteuid(), 0} if handed_over else {os.geteuid()}
    if status.st_uid not in owners:
        raise SecretError(f"{path}: belongs to user {status.st_uid}; expected {os.geteuid()}")
    if stat.S_IMODE(status.st_mode) & (0o037 if handed_over else 0o077):
        raise SecretError(
            f"{path}: expected mode 600, found {stat.S_IMODE(status.st_mode):o}: others can open "
            f"it; run `chmod 600` and replace the secret if anyone may have read it"
        )


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` at once: after a crash it holds the old bytes or the new.

    Raises SecretError when the folder cannot be written or the disk is full.
    """
    try:
        replace(path, data, mode=mode)
    except OSError as error:
        raise SecretError(f"{path}: cannot be written ({error.strerror})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SecretError(f"{path}: cannot be read ({error.strerror})") from None


def _decoded(text: bytes, name: str) -> bytes:
    try:
        return base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        raise SecretError(f"{name}: expected {KEY_BYTES} bytes in base64") from None
