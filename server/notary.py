"""The coordinator's signature under hospitals' audit logs.

::

    FOLDER/            mode 700
      key              opens the secret; better kept elsewhere (CONSILIUM_KEY_FILE)
      identity         signing key, encrypted      identity.pub  its public half
      checkpoints/     the newest countersigned checkpoint of each hospital

Keeping the newest checkpoint is the point: a hospital that restores ledger and log together from an
old copy would otherwise look whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from common.checkpoint import Checkpoint
from common.checkpoint import countersign as sign_checkpoint
from common.errors import SecretError
from common.identity import Identity, PublicIdentity
from common.secretfiles import WrappingKey, replace_file


def create_notary(folder: Path, environ: Mapping[str, str] = os.environ) -> PublicIdentity:
    """Make the folder with a new signing key. Raises SecretError when it is not empty."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if any(folder.iterdir()):
            raise SecretError(
                f"{folder}: expected a new or empty folder; keys are never overwritten"
            )
        (folder / "checkpoints").mkdir(mode=0o700)
    except OSError as error:
        raise SecretError(f"{folder}: cannot be created ({error.strerror})") from None
    identity = Identity.generate()
    identity.save(folder / "identity", key=WrappingKey.made_for_folder(folder, environ))
    identity.public.save(folder / "identity.pub")
    return identity.public


def countersign(
    folder: Path,
    checkpoint: Checkpoint,
    hospital: PublicIdentity,
    environ: Mapping[str, str] = os.environ,
) -> Checkpoint:
    """The checkpoint with the coordinator's signature; kept before it is handed out.

    Raises AuditError for one that goes back behind the kept one, SignatureError for one that is not
    the hospital's.
    """
    identity = Identity.load(folder / "identity", key=WrappingKey.of_folder(folder, environ))
    return countersigned(folder, checkpoint, hospital, identity)


def countersigned(
    folder: Path, checkpoint: Checkpoint, hospital: PublicIdentity, identity: Identity
) -> Checkpoint:
    """The same with the coordinator's ``identity`` already open."""
    kept = folder / "checkpoints" / f"{hospital.fingerprint.replace(':', '')}.json"
    previous = Checkpoint.load(kept) if kept.exists() else None
    signed = sign_checkpoint(checkpoint, coordinator=identity, hospital=hospital, previous=previous)
    replace_file(kept, signed.text().encode())
    return signed
