"""A hospital's safe: keys, policy, ledger and audit log, created once and opened for each use.

::

    FOLDER/            mode 700
      key              opens the secrets; better kept elsewhere (CONSILIUM_KEY_FILE)
      identity         signing key, encrypted      identity.pub  its public half
      ledger.secret    from which patients' hashes are derived, encrypted
      noise.secret     from which all noise is derived, encrypted
      policy.toml      what is permitted           policy.toml.sig
      withdrawals.txt  patients who withdrew consent
      ledger.db        what was spent              audit.log     what happened
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from client.ledger import Ledger
from client.policy import Policy
from client.policyfile import default_text, load_policy, sign_policy
from common.auditlog import AuditLog, Clock, utc_now
from common.errors import SecretError
from common.files import sync_folder
from common.identity import Identity, PublicIdentity
from common.randomness import SecretNoise
from common.secretfiles import (
    KEY_BYTES,
    WrappingKey,
    derive,
    read_secret,
    replace_file,
    write_secret,
)

if TYPE_CHECKING:
    from client.attempts import DurableAttempts, SessionFolder

_LEDGER_PURPOSE = "ledger secret"
_NOISE_PURPOSE = "noise key"
DATES_PURPOSE = "shift of dates"


@dataclass(frozen=True)
class SafeFolder:
    """Where everything is."""

    path: Path

    @property
    def identity(self) -> Path:
        """The encrypted signing key."""
        return self.path / "identity"

    @property
    def public_identity(self) -> Path:
        """The public key."""
        return self.path / "identity.pub"

    @property
    def policy(self) -> Path:
        """The policy; its signature is next to it."""
        return self.path / "policy.toml"

    @property
    def ledger(self) -> Path:
        """The budget ledger."""
        return self.path / "ledger.db"

    @property
    def audit_log(self) -> Path:
        """The audit log."""
        return self.path / "audit.log"

    def public(self) -> PublicIdentity:
        """The hospital's public key; needs no secret."""
        return PublicIdentity.load(self.public_identity)


@dataclass(frozen=True)
class Safe:
    """An open safe. Get one from ``open_safe``."""

    folder: SafeFolder
    identity: Identity
    log: AuditLog
    ledger: Ledger
    _key: WrappingKey

    def policy(self) -> Policy:
        """The policy in force; read anew each time, so that a change counts at once."""
        return load_policy(self.folder.policy, self.identity.public, self.log)

    def withdrawals(self, policy: Policy) -> Path:
        """The file of withdrawn consents that the policy names."""
        return self.folder.path / policy.consent.withdrawals

    def attempts(self) -> DurableAttempts:
        """The steps this hospital has taken in secure sums."""
        from client.attempts import DurableAttempts  # noqa: PLC0415 (it loads torch)

        return DurableAttempts(self.folder.path / "attempts.db")

    def sessions(self) -> SessionFolder:
        """Secure sums that wait for the coordinator's next message."""
        from client.attempts import SessionFolder  # noqa: PLC0415 (it loads torch)

        return SessionFolder(self.folder.path / "sessions", self._key)

    def dates_key(self) -> bytes:
        """What each patient's dates are shifted by, derived; the same as long as the ledger is."""
        path = self.folder.path / "ledger.secret"
        return derive(read_secret(path, key=self._key, purpose=_LEDGER_PURPOSE), DATES_PURPOSE)

    def noise(self) -> SecretNoise:
        """The source of all this hospital's noise; its use is logged."""
        key = read_secret(self.folder.path / "noise.secret", key=self._key, purpose=_NOISE_PURPOSE)
        self.log.append(
            "key_used", {"purpose": "noise", "fingerprint": self.identity.public.fingerprint}
        )
        return SecretNoise(key)


def create_safe(path: Path, environ: Mapping[str, str] = os.environ) -> SafeFolder:
    """Make the folder with new keys, the default policy (signed), an empty ledger and a log.

    A wrapping key is created in ``FOLDER/key`` unless the environment gives one.
    Raises SecretError when the folder exists and is not empty, or cannot be written.
    """
    folder = SafeFolder(path)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        if any(path.iterdir()):
            raise SecretError(
                f"{path}: expected a new or empty folder; a hospital is created once, its keys are "
                f"never overwritten"
            )
    except OSError as error:
        raise SecretError(f"{path}: cannot be created ({error.strerror})") from None
    key = WrappingKey.made_for_folder(path, environ)
    identity = Identity.generate()
    identity.save(folder.identity, key=key)
    identity.public.save(folder.public_identity)
    for name, purpose in (("ledger.secret", _LEDGER_PURPOSE), ("noise.secret", _NOISE_PURPOSE)):
        write_secret(path / name, secrets.token_bytes(KEY_BYTES), key=key, purpose=purpose)
    replace_file(folder.policy, default_text().encode())
    withdrawals = (
        b"# Patients who withdrew consent, one id a line; see `consilium hospital withdraw`.\n"
    )
    replace_file(path / "withdrawals.txt", withdrawals)
    with open_safe(path, environ) as safe:
        sign_policy(folder.policy, identity, safe.log)
    sync_folder(path)
    return folder


@contextmanager
def open_safe(
    path: Path,
    environ: Mapping[str, str] = os.environ,
    clock: Clock = utc_now,
    on_step: Callable[[str], None] = lambda _: None,
) -> Iterator[Safe]:
    """Open a folder by ``create_safe``, with ledger and log checked against each other.

    ``on_step``: see ``Ledger``. Raises SecretError, AuditError or LedgerError when anything is
    missing, open to others or damaged.
    """
    folder = SafeFolder(path)
    key = WrappingKey.of_folder(path, environ)
    identity = Identity.load(folder.identity, key=key)
    secret = read_secret(path / "ledger.secret", key=key, purpose=_LEDGER_PURPOSE)
    log = AuditLog(folder.audit_log, identity, clock)
    with Ledger(folder.ledger, secret=secret, log=log, clock=clock, on_step=on_step) as ledger:
        yield Safe(folder, identity, log, ledger, key)
