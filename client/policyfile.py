"""policy.toml: reading, writing and signing it.

The signature covers the file's exact bytes. Which policy is in force is also in the audit log, so
that an older one, validly signed in its time, cannot be put back unnoticed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import textwrap
import tomllib
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from client.policy import BudgetPolicy, ConsentPolicy, HoursPolicy, Policy, ReleasePolicy
from common.auditlog import AuditLog
from common.errors import PolicyError, SignatureError, nearest
from common.identity import Identity, PublicIdentity
from common.secretfiles import replace_file

_PURPOSE = "policy"
_MISSING = "expected, but not there; `consilium hospital init` writes an example"
_SECTIONS: dict[str, type[BaseModel]] = {
    "budget": BudgetPolicy,
    "release": ReleasePolicy,
    "consent": ConsentPolicy,
    "hours": HoursPolicy,
}


@lru_cache(maxsize=16)  # a round asks several times what is in force: the same bytes each time
def parse_policy(content: bytes, name: str = "policy.toml") -> Policy:
    """The policy in ``content``.

    Raises PolicyError for a value that is missing, unknown, of the wrong type or out of range; for
    an unknown key it names the nearest valid one.
    """
    try:
        return _parsed(content)
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}") from None


@lru_cache(maxsize=4)
def _parsed(content: bytes) -> Policy:
    """Worked out once, although every release asks."""
    try:
        document = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PolicyError(f"expected TOML: {error}") from None
    try:
        # As JSON, so that strict means the same for enumerations and lists.
        policy = Policy.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        raise PolicyError(_explained(error)) from None
    # Defaults are for the example only: what a hospital signed must not depend on a version.
    for section, model in _SECTIONS.items():
        for key in sorted(model.model_fields.keys() - document[section].keys()):
            raise PolicyError(f"{section}.{key}: {_MISSING}")
    return policy


def sign_policy(path: Path, identity: Identity, log: AuditLog) -> str:
    """Check and sign the file, and put it in force; the digest of its bytes.

    Raises PolicyError when it is not a valid policy: nothing is signed then.
    """
    content = _read(path)
    parse_policy(content, str(path))
    digest = hashlib.sha256(content).hexdigest()
    signature = base64.b64encode(identity.sign(content, purpose=_PURPOSE))
    replace_file(signature_path(path), signature + b"\n", mode=0o644)
    before = log.latest("policy_changed")
    previous = str(before.facts["policy_digest"]) if before else ""
    if previous != digest:
        log.append("policy_changed", {"policy_digest": digest, "previous_digest": previous})
    return digest


def load_policy(path: Path, public: PublicIdentity, log: AuditLog) -> Policy:
    """The policy in force.

    Raises PolicyError when it is missing, unsigned, changed since, or not the one signed last.
    """
    content = _read(path)
    try:
        signature = base64.b64decode(_read(signature_path(path)).strip(), validate=True)
        public.verify(content, signature, purpose=_PURPOSE)
    except (SignatureError, binascii.Error):
        raise PolicyError(
            f"{path}: expected this hospital's signature over these bytes, found another: the file "
            f"was changed after signing; review it and run `consilium hospital policy sign`"
        ) from None
    last = log.latest("policy_changed")
    digest = hashlib.sha256(content).hexdigest()
    if last is None or last.facts["policy_digest"] != digest:
        raise PolicyError(
            f"{path}: expected the policy that was signed last, found another (an older one put "
            f"back?); review it and run `consilium hospital policy sign`"
        )
    return parse_policy(content, str(path))


def signature_path(path: Path) -> Path:
    """``policy.toml.sig`` next to the policy."""
    return path.with_name(path.name + ".sig")


def default_text() -> str:
    """The policy a new hospital starts with, every key explained."""
    lines = [
        "# What this hospital permits. Change it, then run `consilium hospital policy sign`:",
        "# an unsigned or changed policy stops every round.",
        "version = 1",
    ]
    for section, model in _SECTIONS.items():
        lines += ["", f"# {model.__doc__}", f"[{section}]"]
        for name, info in model.model_fields.items():
            lines += textwrap.wrap(
                info.description or "", 98, initial_indent="# ", subsequent_indent="# "
            )
            lines.append(f"{name} = {_toml(info.default)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Enum):
        return json.dumps(value.value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    return json.dumps(value)


def _explained(error: ValidationError) -> str:
    """The first complaint, with the key it is about."""
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known: list[str] = list(Policy.model_fields)
        if len(place) > 1:
            known = list(_SECTIONS[place[0]].model_fields)
        return f"{key}: unknown key; {nearest(place[-1], known)}"
    if first["type"] == "missing":
        return f"{key}: {_MISSING}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}; found {first['input']!r}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot be read ({error.strerror}); without a signed policy nothing is "
            f"released: run `consilium hospital policy sign`"
        ) from None
