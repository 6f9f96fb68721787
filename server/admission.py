"""Who takes part: invitations, joining, renewed certificates, revocation.

A join is used up by its first success and may be interrupted anywhere: the same hospital, with the
same code, identity and key, repeats it. What an interruption leaves undone at Flower or nginx is
found and mended by ``reconcile``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import Protocol

from common.auditlog import Fact
from common.enrolment import JoinCode, JoinReply, JoinRequest, RenewRequest
from common.errors import RefusalError, RunError
from common.identity import PublicIdentity
from server.desk import Desk, NotFoundError
from server.federation import Federation
from server.pki import Issued, request_key
from server.registry import Hospital, JoinCodeRow

SERVICE = "service"  # the actor of what nobody asked for at that moment

_SECRET_BYTES = 20
_NOBODY = hashlib.sha256(b"").hexdigest()


class Edge(Protocol):
    """The public entrance."""

    def publish(self, keys: Mapping[str, str]) -> None:
        """Let exactly these hospitals in, each with its node key (PEM); read the CRL anew."""


class Admission:
    """Decides who takes part, and keeps Flower and the public entrance to it."""

    def __init__(self, desk: Desk, federation: Federation, edge: Edge) -> None:
        """``federation``, ``edge``: what must follow the registry."""
        self._desk = desk
        self._registry = desk.registry
        self._federation = federation
        self._edge = edge

    def enroll(self, name: str, *, actor: str) -> JoinCode:
        """A join code for a hospital; an older one for it counts no longer.

        One that takes part already, whose certificate expired say, comes back by it with the same
        identity. Raises RunError when the name is taken in another spelling of case, or revoked.
        """
        now = self._desk.clock()
        with self._desk.lock:
            for one in self._registry.hospitals():
                if one.name.lower() == name.lower() and (one.name != name or one.revoked_at):
                    raise RunError(
                        f"hospital {name!r}: {one.name!r} is enrolled already"
                        + (" and was revoked" if one.revoked_at else "")
                        + "; choose another name"
                    )
            secret = secrets.token_bytes(_SECRET_BYTES)
            expires = now + timedelta(hours=self._desk.settings.join_hours)
            facts: dict[str, Fact] = {"name": name, "expires_at": expires.isoformat()}
            self._desk.record("code_issued", name, actor=actor, facts=facts)
            digest = hashlib.sha256(secret).hexdigest()
            self._registry.put_join_code(
                JoinCodeRow(name=name, secret_sha256=digest, expires_at=expires, used_at=None)
            )
        return JoinCode(
            address=self._desk.settings.address,
            ca_sha256=self._desk.authority.fingerprint,
            name=name,
            secret=secret,
        )

    def join(self, request: JoinRequest) -> JoinReply:
        """Let a hospital in. Raises RefusalError, SignatureError, MessageError or RunError."""
        identity = request.verify()
        key = request_key(request.certificate_request)
        with self._desk.lock:
            code = self._checked_code(request)
            if code.used_at is None:
                self._take_in(request, identity, key)
            hospital = self._registry.hospital(request.name)
            issued = self._registry.certificates(request.name)
            if (
                hospital is None
                or hospital.revoked_at is not None
                or hospital.identity != identity.text()
                or not issued
                or issued[-1].public_key != key
            ):
                raise RefusalError(
                    f"join code of {request.name}: expected an unused one, or the hospital that "
                    f"used it; ask the coordinator for a new one",
                    rule="join.used",
                )
            self._adopt_key(hospital, key)
            self.publish()
            return self._reply(issued[-1].pem)

    def renew(self, name: str, request: RenewRequest) -> JoinReply:
        """A new certificate for a hospital, for the same key or a new one.

        Its older certificates count until the new one is first used (``arrived``): a reply may be
        lost. An old node key counts no longer at once.
        """
        key = request_key(request.certificate_request)
        with self._desk.lock:
            hospital = self.active(name)
            request.verify(PublicIdentity.from_text(hospital.identity))
            self._check_key(key, name)
            issued = self._issued(name, request.certificate_request, actor=name)
            self._registry.add_certificate(name, issued, self._desk.clock())
            self._adopt_key(hospital, key)
            self.publish()
            return self._reply(issued.certificate)

    def arrived(self, name: str, serial: str) -> Hospital:
        """The hospital behind a request with certificate ``serial`` (hexadecimal).

        The first use of its newest certificate ends the older ones. Raises RefusalError for a
        revoked hospital or certificate.
        """
        hospital = self.active(name)
        known = [one.serial for one in self._registry.certificates(name)]
        if serial not in known:
            raise RefusalError(
                f"certificate {serial[:16]}…: expected one in force, found one that was replaced; "
                f"use the newest",
                rule="certificate.superseded",
            )
        if serial == known[-1] and len(known) > 1:
            with self._desk.lock:
                facts: dict[str, Fact] = {"name": name, "serials": known[:-1]}
                self._desk.record("certificates_superseded", name, actor=name, facts=facts)
                self._registry.supersede(name, serial, self._desk.clock())
                self.publish()
        return hospital

    def active(self, name: str) -> Hospital:
        """The hospital, unless it is unknown (NotFoundError) or revoked (RefusalError)."""
        hospital = self._registry.hospital(name)
        if hospital is None:
            raise NotFoundError(f"hospital {name!r}: expected an enrolled one, found none so named")
        if hospital.revoked_at is not None:
            raise RefusalError(
                f"hospital {name!r}: was revoked on {hospital.revoked_at:%Y-%m-%d}; "
                f"speak with the coordinator",
                rule="hospital.revoked",
            )
        return hospital

    def revoke(self, name: str, *, actor: str) -> None:
        """Shut a hospital out at once and for good. Raises NotFoundError, UnavailableError.

        The entrance is closed first; a SuperLink that is away is told by ``reconcile``.
        """
        with self._desk.lock:
            hospital = self._registry.hospital(name)
            if hospital is None:
                raise NotFoundError(f"hospital {name!r}: expected an enrolled one, found none")
            if hospital.revoked_at is None:
                self._desk.record("hospital_revoked", name, actor=actor, facts={"name": name})
            self._registry.revoke_hospital(name, self._desk.clock())
            self.publish()
            if hospital.node_id is not None:
                self._federation.unregister_node(hospital.node_id)

    def publish(self) -> None:
        """Write the revocation list and the entrance's bindings as the registry has them."""
        now = self._desk.clock()
        with self._desk.lock:
            revoked = self._registry.revoked_certificates(now)
            self._desk.authority.write_crl(revoked, now=now)
            self._edge.publish(
                {one.name: one.public_key for one in self._registry.hospitals() if _in(one)}
            )

    def maintain(self) -> bool:
        """Renew what is about to expire: the revocation list, the server's certificate."""
        desk, now = self._desk, self._desk.clock()
        with desk.lock:
            is_due = desk.authority.server_is_due(desk.settings.host, now=now)
            if is_due:
                self.renew_server(actor=SERVICE)
            elif is_due := desk.authority.crl_is_due(now=now):
                self.publish()
        return is_due

    def renew_server(self, *, actor: str) -> str:
        """A new key and certificate for the coordinator itself; its serial."""
        desk = self._desk
        with desk.lock:
            serial = desk.authority.renew_server(desk.settings.host, now=desk.clock())
            desk.record("server_certificate", serial[:16], actor=actor, facts={"serial": serial})
            self.publish()
        return serial

    def reconcile(self) -> Mapping[int, bool]:
        """Make Flower's nodes those of the registry; which are online."""
        with self._desk.lock:
            nodes = dict(self._federation.nodes())
            active = [one for one in self._registry.hospitals() if _in(one)]
            for one in active:
                if one.node_id not in nodes:
                    nodes[self._register(one)] = False
            kept = {one.node_id for one in self._registry.hospitals() if _in(one)}
            for node in nodes.keys() - kept:
                self._federation.unregister_node(node)
                del nodes[node]
            return nodes

    def _checked_code(self, request: JoinRequest) -> JoinCodeRow:
        code = self._registry.join_code(request.name)
        try:
            given = base64.b64decode(request.secret, validate=True)
        except binascii.Error:
            given = b""
        expected = code.secret_sha256 if code else _NOBODY
        is_right = hmac.compare_digest(hashlib.sha256(given).hexdigest(), expected)
        if code is None or not (is_right and given):
            raise RefusalError(
                f"join code of {request.name}: expected the coordinator's newest for this "
                f"hospital, found another; ask for it again",
                rule="join.code",
            )
        if self._desk.clock() > code.expires_at:
            raise RefusalError(
                f"join code of {request.name}: expired at {code.expires_at:%Y-%m-%d %H:%M} UTC; "
                f"ask the coordinator for a new one",
                rule="join.expired",
            )
        return code

    def _take_in(self, request: JoinRequest, identity: PublicIdentity, key: str) -> None:
        """A new hospital, or one that comes back with the identity it is known by."""
        self._check_key(key, request.name)
        known = self._registry.hospital(request.name)
        if known is not None and known.identity != identity.text():
            raise RefusalError(
                f"hospital {request.name!r}: expected the identity it is enrolled with, found "
                f"{identity.fingerprint[:16]}…",
                rule="join.identity",
            )
        issued = self._issued(request.name, request.certificate_request, actor=request.name)
        if known is not None:
            self._registry.readmit_hospital(request.name, issued, self._desk.clock())
            return
        facts: dict[str, Fact] = {
            "name": request.name,
            "identity": identity.fingerprint,
            "key_digest": _digest(key),
        }
        self._desk.record("hospital_joined", request.name, actor=request.name, facts=facts)
        self._registry.add_hospital(
            Hospital(
                name=request.name,
                identity=identity.text(),
                public_key=key,
                node_id=None,
                enrolled_at=self._desk.clock(),
                revoked_at=None,
            ),
            issued,
        )

    def _issued(self, name: str, request_pem: str, *, actor: str) -> Issued:
        days = self._desk.settings.certificate_days
        issued = self._desk.authority.issue(name, request_pem, now=self._desk.clock(), days=days)
        facts: dict[str, Fact] = {
            "name": name,
            "serial": issued.serial,
            "not_after": issued.not_after.isoformat(),
            "key_digest": _digest(issued.public_key),
        }
        self._desk.record("certificate_issued", name, actor=actor, facts=facts)
        return issued

    def _check_key(self, key: str, name: str) -> None:
        # Flower knows a node by its key: two hospitals with one key would be one.
        if self._registry.key_owner(key) not in (None, name):
            raise RefusalError(
                "certificate request: expected a key of this hospital's own; make a new one",
                rule="certificate.key",
            )

    def _adopt_key(self, hospital: Hospital, key: str) -> None:
        """Make ``key`` the hospital's only node key."""
        node = self._federation.register_node(key, hospital.name)
        self._registry.set_node(hospital.name, node, key)
        if hospital.node_id not in (None, node):
            self._federation.unregister_node(hospital.node_id)

    def _register(self, hospital: Hospital) -> int:
        node = self._federation.register_node(hospital.public_key, hospital.name)
        self._registry.set_node(hospital.name, node, hospital.public_key)
        return node

    def _reply(self, certificate: str) -> JoinReply:
        return JoinReply(
            certificate=certificate,
            ca=self._desk.authority.pem,
            coordinator=self._desk.identity.public.text(),
        )


def _in(hospital: Hospital) -> bool:
    return hospital.revoked_at is None


def _digest(public_key: str) -> str:
    return hashlib.sha256(public_key.encode()).hexdigest()
