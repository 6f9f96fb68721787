"""Secrets at rest: who may open them, and what a wrong key says."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from common.errors import SecretError
from common.secretfiles import (
    WrappingKey,
    read_secret,
    replace_file,
    seal,
    unseal,
    write_secret,
)

KEY = WrappingKey(key=bytes(range(32)))


def test_a_secret_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"noise key", key=KEY, purpose="noise")
    assert read_secret(path, key=KEY, purpose="noise") == b"noise key"
    assert b"noise key" not in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_passphrase_works_and_the_kinds_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    phrase = WrappingKey(passphrase="correct horse")
    write_secret(path, b"x", key=phrase, purpose="p")
    assert read_secret(path, key=phrase, purpose="p") == b"x"
    with pytest.raises(SecretError, match="written with a passphrase"):
        read_secret(path, key=KEY, purpose="p")
    with pytest.raises(SecretError, match="does not open it"):
        read_secret(path, key=WrappingKey(passphrase="wrong horse"), purpose="p")


def test_a_wrong_key_is_refused_clearly(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"x", key=KEY, purpose="p")
    with pytest.raises(SecretError, match=r"secret: this key does not open it; expected the key"):
        read_secret(path, key=WrappingKey(key=bytes(32)), purpose="p")


def test_one_secret_cannot_stand_in_for_another(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"x", key=KEY, purpose="noise")
    with pytest.raises(SecretError):
        read_secret(path, key=KEY, purpose="ledger")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_loose_permissions_are_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"x", key=KEY, purpose="p")
    path.chmod(mode)
    with pytest.raises(SecretError, match=f"expected mode 600, found {mode:o}"):
        read_secret(path, key=KEY, purpose="p")


def test_a_link_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    write_secret(tmp_path / "a", b"x", key=KEY, purpose="p")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(SecretError, match="expected a plain file"):
        read_secret(tmp_path / "b", key=KEY, purpose="p")
    with pytest.raises(SecretError, match="cannot be read"):
        read_secret(tmp_path / "c", key=KEY, purpose="p")


@pytest.mark.parametrize("content", [b"", b"hello", b"consilium-secret-1\nK"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    replace_file(path, content)
    with pytest.raises(SecretError, match="expected a secret file"):
        read_secret(path, key=KEY, purpose="p")


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, b"abc", key=KEY, purpose="p")
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        replace_file(path, bytes(changed))
        with pytest.raises(SecretError):
            read_secret(path, key=KEY, purpose="p")


def test_keys_from_file_and_environment(tmp_path: Path) -> None:
    KEY.write(tmp_path / "key")
    assert WrappingKey.from_file(tmp_path / "key") == KEY
    with pytest.raises(SecretError, match="a key file exists"):
        KEY.write(tmp_path / "key")
    encoded = base64.b64encode(KEY.key).decode()
    assert WrappingKey.from_environment({"CONSILIUM_KEY": encoded}) == KEY
    phrase = WrappingKey.from_environment({"CONSILIUM_PASSPHRASE": "p"})
    assert phrase is not None
    assert phrase.passphrase == "p"
    assert WrappingKey.from_environment({}) is None
    with pytest.raises(SecretError, match="in base64"):
        WrappingKey.from_environment({"CONSILIUM_KEY": "not base64!"})
    with pytest.raises(SecretError, match="expected 32 bytes, found 3"):
        WrappingKey.from_environment({"CONSILIUM_KEY": "YWJj"})


def test_keys_never_show_in_representations() -> None:
    assert "key=" not in repr(KEY)
    assert "horse" not in repr(WrappingKey(passphrase="horse"))


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with pytest.raises(SecretError, match="cannot be written"):
        replace_file(path, b"x")
    path.parent.mkdir()
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]  # noqa: PTH208


def test_sealed_bytes_are_bound_to_their_context() -> None:
    sealed = seal(KEY.key, b"data", b"entry 1")
    assert unseal(KEY.key, sealed, b"entry 1") == b"data"
    with pytest.raises(SecretError, match="encrypted data"):
        unseal(KEY.key, sealed, b"entry 2")
    with pytest.raises(SecretError):
        unseal(KEY.key, b"", b"entry 1")


def test_a_credential_from_the_service_manager_opens_what_only_we_can_enter(
    tmp_path: Path,
) -> None:
    """systemd hands over root's file, readable by an access list that shows as group permission."""
    path = tmp_path / "key"
    KEY.write(path)
    path.chmod(0o440)
    environ = {"CONSILIUM_KEY_FILE": str(path)}
    with pytest.raises(SecretError, match="expected mode 600, found 440"):
        WrappingKey.of_folder(tmp_path, environ)
    handed = environ | {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert WrappingKey.of_folder(tmp_path, handed) == KEY
    elsewhere = environ | {"CREDENTIALS_DIRECTORY": str(tmp_path.parent)}
    with pytest.raises(SecretError, match="expected mode 600, found 440"):
        WrappingKey.of_folder(tmp_path, elsewhere)
    for mode in (0o444, 0o460, 0o441):
        path.chmod(mode)
        with pytest.raises(SecretError, match="others can open it"):
            WrappingKey.of_folder(tmp_path, handed)
