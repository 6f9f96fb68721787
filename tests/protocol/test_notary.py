"""Coordinator and hospital bind an audit log together: what a restored backup cannot hide."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.safe import create_safe, open_safe
from common.checkpoint import make_checkpoint, verify_log_against
from common.errors import AuditError, SecretError, SignatureError
from common.identity import PublicIdentity
from server.notary import countersign, create_notary


def head(folder: Path) -> tuple[object, PublicIdentity]:
    with open_safe(folder, {}) as safe:
        safe.log.append("study_seen", {"study": "s", "study_digest": "d"})
        return make_checkpoint(safe.log, safe.identity), safe.identity.public


def test_a_log_restored_with_its_ledger_is_found(tmp_path: Path) -> None:
    hospital, desk, backup = tmp_path / "hospital", tmp_path / "desk", tmp_path / "backup"
    create_safe(hospital, {})
    coordinator = create_notary(desk, {})
    shutil.copytree(hospital, backup)
    checkpoint, public = head(hospital)
    signed = countersign(desk, checkpoint, public, {})  # type: ignore[arg-type]
    log = hospital / "audit.log"
    verify_log_against(log, signed, hospital=public, coordinator=coordinator)

    shutil.rmtree(hospital)
    shutil.copytree(backup, hospital)  # yesterday's ledger and log agree with each other …
    with open_safe(hospital, {}) as safe:
        older = make_checkpoint(safe.log, safe.identity)
    with pytest.raises(AuditError, match="cut"):  # … but not with what was countersigned
        countersign(desk, older, public, {})
    with pytest.raises(AuditError, match="cut"):
        verify_log_against(log, signed, hospital=public, coordinator=coordinator)


def test_only_the_hospitals_own_checkpoint_is_signed(tmp_path: Path) -> None:
    create_notary(tmp_path / "desk", {})
    keys = []
    for name in ("north", "south"):
        create_safe(tmp_path / name, {})
        keys.append(head(tmp_path / name))
    with pytest.raises(SignatureError):
        countersign(tmp_path / "desk", keys[0][0], keys[1][1], {})  # type: ignore[arg-type]
    assert list((tmp_path / "desk" / "checkpoints").iterdir()) == []


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    create_notary(tmp_path / "desk", {})
    with pytest.raises(SecretError, match="never overwritten"):
        create_notary(tmp_path / "desk", {})
    assert (tmp_path / "desk").stat().st_mode & 0o077 == 0
    assert (tmp_path / "desk" / "identity").stat().st_mode & 0o077 == 0
