"""Keys between two hospitals: X25519, HKDF bound to the attempt, AES-256-GCM for shares."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import MessageError
from common.secagg import shamir
from common.secagg.wire import Writer

KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
SEALED_BYTES = _NONCE_BYTES + 2 * shamir.SHARE_BYTES + _TAG_BYTES


def public_of(private: bytes) -> bytes:
    """The X25519 public key of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def mask_key(private: bytes, public: bytes, bound: bytes, pair: tuple[int, int]) -> bytes:
    """The key of the mask that two hospitals share; the same from either side.

    ``bound``: the roster's digest, which covers the terms (run, round, attempt, model, range).
    ``pair``: their roster positions, in any order.
    """
    return _derive(private, public, _info("mask", bound, min(pair), max(pair)))


def self_mask_key(seed: bytes, bound: bytes) -> bytes:
    """The key of a hospital's own mask, from its 32 random bytes."""
    info = Writer().text("consilium-secagg-v1 self").raw(bound).done()
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(seed)


def seal_shares(
    private: bytes,
    public: bytes,
    bound: bytes,
    sender: int,
    receiver: int,
    shares: tuple[int, int],
    entropy: Callable[[int], bytes],
) -> bytes:
    """Two shares that only ``receiver`` can read and only ``sender`` can have written."""
    info = _info("seal", bound, sender, receiver)
    nonce = entropy(_NONCE_BYTES)
    plain = shamir.encode(shares[0]) + shamir.encode(shares[1])
    return nonce + AESGCM(_derive(private, public, info)).encrypt(nonce, plain, info)


def open_shares(
    private: bytes, public: bytes, bound: bytes, sender: int, receiver: int, sealed: bytes
) -> tuple[int, int]:
    """The shares of ``seal_shares``; raises a domain error for anything else."""
    info = _info("seal", bound, sender, receiver)
    try:
        plain = AESGCM(_derive(private, public, info)).decrypt(
            sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], info
        )
    except (InvalidTag, ValueError):
        raise MessageError(
            f"shares from hospital {sender}: not sealed for hospital {receiver} in this attempt; "
            f"they were changed, or the two hold different rosters"
        ) from None
    half = shamir.SHARE_BYTES
    return shamir.decode(plain[:half]), shamir.decode(plain[half:])


def _info(label: str, bound: bytes, first: int, second: int) -> bytes:
    return Writer().text(f"consilium-secagg-v1 {label}").raw(bound).u16(first).u16(second).done()


def _derive(private: bytes, public: bytes, info: bytes) -> bytes:
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise MessageError(
            "public key: a point of low order, with which no key is secret"
        ) from None
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)
