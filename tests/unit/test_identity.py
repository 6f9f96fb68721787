"""Signatures verify for the right key, message and purpose, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import SecretError, SignatureError
from common.identity import Identity, PublicIdentity
from common.secretfiles import WrappingKey

KEY = WrappingKey(key=bytes(range(32)))


def test_a_signature_verifies_for_its_purpose_only() -> None:
    identity = Identity.generate()
    signature = identity.sign(b"policy", purpose="policy")
    identity.public.verify(b"policy", signature, purpose="policy")
    for message, purpose, signed in (
        (b"policy", "checkpoint", signature),
        (b"Policy", "policy", signature),
        (b"policy", "policy", signature[:-1] + bytes([signature[-1] ^ 1])),
        (b"policy", "policy", b""),
    ):
        with pytest.raises(SignatureError, match="is not by key"):
            identity.public.verify(message, signed, purpose=purpose)
    with pytest.raises(SignatureError):
        Identity.generate().public.verify(b"policy", signature, purpose="policy")


def test_keys_are_saved_and_loaded(tmp_path: Path) -> None:
    identity = Identity.generate()
    identity.save(tmp_path / "identity", key=KEY)
    identity.public.save(tmp_path / "identity.pub")
    loaded = Identity.load(tmp_path / "identity", key=KEY)
    assert loaded.public == identity.public == PublicIdentity.load(tmp_path / "identity.pub")
    assert loaded.sign(b"m", purpose="p") == identity.sign(b"m", purpose="p")
    with pytest.raises(SecretError, match="does not open it"):
        Identity.load(tmp_path / "identity", key=WrappingKey(key=bytes(32)))


def test_fingerprints_differ_and_representations_hide_the_key() -> None:
    first, second = Identity.generate(), Identity.generate()
    assert first.public.fingerprint != second.public.fingerprint
    assert len(first.public.fingerprint) == 64
    assert repr(first) == f"Identity({first.public.fingerprint[:16]}…)"


@pytest.mark.parametrize("line", ["", "ssh-ed25519 AAAA", "consilium-ed25519 !", "a b c"])
def test_another_public_key_line_is_refused(line: str) -> None:
    with pytest.raises(SecretError, match="expected a line 'consilium-ed25519"):
        PublicIdentity.from_text(line)
