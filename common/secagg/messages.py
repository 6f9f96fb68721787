"""The messages of one aggregation: fixed binary fields behind a header, hospitals' ones signed.

Header: ``CSA1`` | kind | digest of the terms. A hospital's message ends with an Ed25519 signature
over the SHA-256 of all before it, made for that kind alone: no message of another run, round,
attempt, step, sender or recipient can stand in for it. After the roster, hospitals are named by
their position in it.

==========  ===========  =====================================================================
kind        from         holds
==========  ===========  =====================================================================
Advert      hospital     its name and two fresh public keys
Roster      coordinator  all adverts
Shares      hospital     for each neighbour, sealed to it: shares of both secrets; a commitment
Delivery    coordinator  who has shared; the shares sealed to this recipient
Masked      hospital     the masked integers
Survivors   coordinator  whose masked integers arrived
Agreement   hospital     its signature over roster, sharers and survivors
Agreements  coordinator  those signatures
Reveal      hospital     one share for each neighbour: of the self-mask if alive, of the key if not
==========  ===========  =====================================================================
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum

from common.errors import MessageError, SecAggError
from common.identity import Identity, PublicIdentity
from common.secagg import shamir
from common.secagg.keys import KEY_BYTES, SEALED_BYTES
from common.secagg.wire import Reader, Writer

_MAGIC = b"CSA1"
_DIGEST_BYTES = 32
_HEADER_BYTES = len(_MAGIC) + 1 + _DIGEST_BYTES
SIGNATURE_BYTES = 64
# Header and fields of a masked vector fill 112 bytes, so that its integers are aligned.
_ALIGNING = bytes(5)


class Kind(IntEnum):
    """What a message is; the order is the protocol's."""

    ADVERT = 1
    ROSTER = 2
    SHARES = 3
    DELIVERY = 4
    MASKED = 5
    SURVIVORS = 6
    AGREEMENT = 7
    AGREEMENTS = 8
    REVEAL = 9


def header(kind: Kind, terms: bytes) -> bytes:
    """The first bytes of a message; ``terms`` is their digest."""
    return _MAGIC + bytes([kind]) + terms


def kind_of(data: bytes) -> Kind:
    """What ``data`` claims to be; raises MessageError when it is no message of this protocol."""
    try:
        if len(data) < _HEADER_BYTES or data[: len(_MAGIC)] != _MAGIC:
            raise ValueError
        return Kind(data[len(_MAGIC)])
    except ValueError:
        raise MessageError("secure aggregation: not a message of this protocol") from None


def sign(identity: Identity, kind: Kind, digest: bytes) -> bytes:
    """The signature that ends a hospital's message; ``digest``: SHA-256 of all before it."""
    return identity.sign(digest, purpose=_purpose(kind))


def signed(identity: Identity, kind: Kind, terms: bytes, body: bytes) -> bytes:
    """A whole hospital's message."""
    unsigned = header(kind, terms) + body
    return unsigned + sign(identity, kind, hashlib.sha256(unsigned).digest())


def verify(data: bytes, kind: Kind, key: PublicIdentity) -> None:
    """Raise SignatureError unless ``key`` signed this message."""
    covered = memoryview(data)[:-SIGNATURE_BYTES]
    key.verify(hashlib.sha256(covered).digest(), data[-SIGNATURE_BYTES:], purpose=_purpose(kind))


def unsigned(kind: Kind, terms: bytes, body: bytes) -> bytes:
    """A whole message of the coordinator."""
    return header(kind, terms) + body


def body_of(data: bytes, kind: Kind, terms: bytes, *, is_signed: bool) -> Reader:
    """The fields after the header; raises MessageError for another kind or other terms."""
    found = kind_of(data)
    if found is not kind:
        raise MessageError(
            f"secure aggregation: expected {kind.name}, found {found.name}; the message is "
            f"replayed, or out of order"
        )
    if data[len(_MAGIC) + 1 : _HEADER_BYTES] != terms:
        raise MessageError(
            f"{kind.name}: made for another run, round, attempt, model or range; "
            f"this attempt's terms differ"
        )
    end = len(data) - SIGNATURE_BYTES if is_signed else len(data)
    if end < _HEADER_BYTES:
        raise MessageError(f"{kind.name}: the message is cut")
    return Reader(memoryview(data)[_HEADER_BYTES:end], kind.name)


def _purpose(kind: Kind) -> str:
    return f"secure aggregation {kind.name}"


@dataclass(frozen=True, kw_only=True)
class Advert:
    """``sealing_key`` encrypts shares, ``masking_key`` makes masks; both X25519, both fresh."""

    sender: str
    sealing_key: bytes
    masking_key: bytes

    def encode(self) -> bytes:
        """The body."""
        return Writer().text(self.sender).raw(self.sealing_key).raw(self.masking_key).done()

    @classmethod
    def decode(cls, reader: Reader) -> Advert:
        """Read the body."""
        one = cls(
            sender=reader.text(),
            sealing_key=reader.raw(KEY_BYTES),
            masking_key=reader.raw(KEY_BYTES),
        )
        reader.finish()
        return one


@dataclass(frozen=True, kw_only=True)
class Shares:
    """``sealed``: receiver → its two shares. ``commitment``: SHA-256 that fixes the self-mask."""

    sender: int
    roster: bytes
    commitment: bytes
    sealed: dict[int, bytes]

    def encode(self) -> bytes:
        """The body."""
        writer = Writer().u16(self.sender).raw(self.roster).raw(self.commitment)
        writer.positions(sorted(self.sealed))
        for receiver in sorted(self.sealed):
            writer.raw(self.sealed[receiver])
        return writer.done()

    @classmethod
    def decode(cls, reader: Reader) -> Shares:
        """Read the body."""
        sender, roster, commitment = (
            reader.u16(),
            reader.raw(_DIGEST_BYTES),
            reader.raw(_DIGEST_BYTES),
        )
        sealed = {one: reader.raw(SEALED_BYTES) for one in reader.positions()}
        reader.finish()
        return cls(sender=sender, roster=roster, commitment=commitment, sealed=sealed)


@dataclass(frozen=True, kw_only=True)
class Masked:
    """The fields before the vector; ``sharers``: digest of those whose masks are in it."""

    sender: int
    roster: bytes
    sharers: bytes
    length: int

    def encode(self) -> bytes:
        """The body up to the vector."""
        writer = Writer().u16(self.sender).raw(self.roster).raw(self.sharers).u32(self.length)
        return writer.raw(_ALIGNING).done()

    @classmethod
    def decode(cls, reader: Reader) -> tuple[Masked, memoryview]:
        """Read the body: the fields, and the vector's bytes, not copied."""
        one = cls(
            sender=reader.u16(),
            roster=reader.raw(_DIGEST_BYTES),
            sharers=reader.raw(_DIGEST_BYTES),
            length=reader.u32(),
        )
        if reader.raw(len(_ALIGNING)) != _ALIGNING:
            raise MessageError("MASKED: expected zeros before the vector")
        vector = reader.view(4 * one.length)
        reader.finish()
        return one, vector


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """``agreed``: digest over roster, sharers and survivors."""

    sender: int
    agreed: bytes

    def encode(self) -> bytes:
        """The body."""
        return Writer().u16(self.sender).raw(self.agreed).done()

    @classmethod
    def decode(cls, reader: Reader) -> Agreement:
        """Read the body."""
        one = cls(sender=reader.u16(), agreed=reader.raw(_DIGEST_BYTES))
        reader.finish()
        return one


@dataclass(frozen=True, kw_only=True)
class Reveal:
    """``seed``: the sender's own, 32 bytes. ``of_seeds``, ``of_keys``: shares, by their owner.

    An owner is in one of the two at most: ``decode`` refuses a message that lists it in both.
    """

    sender: int
    agreed: bytes
    seed: bytes
    of_seeds: dict[int, int]
    of_keys: dict[int, int]

    def encode(self) -> bytes:
        """The body."""
        writer = Writer().u16(self.sender).raw(self.agreed).raw(self.seed)
        for shares in (self.of_seeds, self.of_keys):
            writer.positions(sorted(shares))
            for owner in sorted(shares):
                writer.raw(shamir.encode(shares[owner]))
        return writer.done()

    @classmethod
    def decode(cls, reader: Reader) -> Reveal:
        """Read the body."""
        sender, agreed, seed = (
            reader.u16(),
            reader.raw(_DIGEST_BYTES),
            reader.raw(shamir.SECRET_BYTES),
        )
        of_seeds, of_keys = (
            {one: shamir.decode(reader.raw(shamir.SHARE_BYTES)) for one in reader.positions()}
            for _ in range(2)
        )
        reader.finish()
        if of_seeds.keys() & of_keys.keys():
            raise SecAggError("REVEAL: both shares of one hospital")
        return cls(sender=sender, agreed=agreed, seed=seed, of_seeds=of_seeds, of_keys=of_keys)


@dataclass(frozen=True, kw_only=True)
class Relay:
    """``Roster`` and ``Agreements``: hospitals' signed messages, passed on as they came."""

    messages: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The body."""
        writer = Writer().u16(len(self.messages))
        for message in self.messages:
            writer.u16(len(message)).raw(message)
        return writer.done()

    @classmethod
    def decode(cls, reader: Reader) -> Relay:
        """Read the body."""
        messages = tuple(reader.raw(reader.u16()) for _ in range(reader.u16()))
        reader.finish()
        return cls(messages=messages)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """``sharers``: all who shared. ``sealed``: sender → what it sealed for the recipient."""

    sharers: tuple[int, ...]
    sealed: dict[int, bytes]

    def encode(self) -> bytes:
        """The body."""
        writer = Writer().positions(self.sharers).positions(sorted(self.sealed))
        for sender in sorted(self.sealed):
            writer.raw(self.sealed[sender])
        return writer.done()

    @classmethod
    def decode(cls, reader: Reader) -> Delivery:
        """Read the body."""
        sharers = reader.positions()
        sealed = {one: reader.raw(SEALED_BYTES) for one in reader.positions()}
        reader.finish()
        return cls(sharers=sharers, sealed=sealed)


@dataclass(frozen=True, kw_only=True)
class Survivors:
    """Whose masked integers arrived. Who did not survive follows; nobody can be both."""

    survivors: tuple[int, ...]

    def encode(self) -> bytes:
        """The body."""
        return Writer().positions(self.survivors).done()

    @classmethod
    def decode(cls, reader: Reader) -> Survivors:
        """Read the body."""
        survivors = reader.positions()
        reader.finish()
        return cls(survivors=survivors)
