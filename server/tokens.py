"""Tokens of the admin API: who may do what. Only their hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import datetime

from server.registry import Registry, Role, TokenRow

LOCAL_TOKEN = "local"  # noqa: S105 - the name of the token in FOLDER/admin.token
ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")

_PREFIX = "consilium-"
_TOKEN_BYTES = 32


def make_token(registry: Registry, name: str, role: Role, now: datetime) -> str:
    """A new token, shown once. Raises RunError when the name is taken."""
    token = _PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    registry.add_token(
        TokenRow(name=name, role=role, sha256=_hash(token), created_at=now, revoked_at=None)
    )
    return token


def find_token(registry: Registry, token: str) -> TokenRow | None:
    """Whose token this is; None for one that was never given or counts no longer."""
    given = _hash(token)
    # All are compared, each in constant time: how long it takes says nothing about any of them.
    matches = [one for one in registry.tokens() if hmac.compare_digest(one.sha256, given)]
    return next((one for one in matches if one.revoked_at is None), None)


def allows(role: Role, needed: Role) -> bool:
    """Whether ``role`` may do what takes ``needed``.

    >>> allows("operator", "viewer"), allows("operator", "admin")
    (True, False)
    """
    return ROLES.index(role) >= ROLES.index(needed)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
