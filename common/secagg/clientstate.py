"""What a hospital remembers between two messages of an attempt. All of it is secret."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import MessageError
from common.secagg import shamir
from common.secagg.keys import KEY_BYTES
from common.secagg.messages import Kind
from common.secagg.terms import DIGEST_BYTES
from common.secagg.wire import Reader, Writer

_MAGIC = b"CSS1"


@dataclass(frozen=True, kw_only=True)
class ClientState:
    """``sealing``, ``masking``: X25519 private keys. ``seed``: of the self-mask.

    ``held``: neighbour → its (seed share, key share), as delivered to this hospital.
    """

    expects: Kind
    sealing: bytes = field(repr=False)
    masking: bytes = field(repr=False)
    seed: bytes = field(repr=False)
    advert: bytes
    roster: tuple[bytes, ...] = ()
    sharers: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()
    held: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)

    def encode(self, terms: bytes, *, exposed: bool) -> bytes:
        """Bytes for ``decode`` under the same ``terms`` (their digest)."""
        writer = Writer().raw(_MAGIC).raw(terms).u8(self.expects).u8(exposed)
        writer.raw(self.sealing).raw(self.masking).raw(self.seed)
        writer.u16(len(self.advert)).raw(self.advert).u16(len(self.roster))
        for message in self.roster:
            writer.u16(len(message)).raw(message)
        writer.positions(self.sharers).positions(self.survivors).positions(sorted(self.held))
        for one in sorted(self.held):
            writer.raw(shamir.encode(self.held[one][0])).raw(shamir.encode(self.held[one][1]))
        return writer.done()

    @classmethod
    def decode(cls, frozen: bytes, terms: bytes) -> tuple[ClientState, bool]:
        """The state, and whether a masked vector was produced."""
        reader = Reader(frozen, "frozen state")
        if reader.raw(len(_MAGIC)) != _MAGIC or reader.raw(DIGEST_BYTES) != terms:
            raise MessageError("frozen state: made for another attempt, or not a state at all")
        expects, exposed = Kind(reader.u8()), bool(reader.u8())
        sealing, masking, seed = (reader.raw(KEY_BYTES) for _ in range(3))
        advert = reader.raw(reader.u16())
        roster = tuple(reader.raw(reader.u16()) for _ in range(reader.u16()))
        sharers, survivors, holders = reader.positions(), reader.positions(), reader.positions()
        half = shamir.SHARE_BYTES
        held = {
            one: (shamir.decode(reader.raw(half)), shamir.decode(reader.raw(half)))
            for one in holders
        }
        reader.finish()
        state = cls(
            expects=expects, sealing=sealing, masking=masking, seed=seed, advert=advert,
            roster=roster, sharers=sharers, survivors=survivors, held=held,
        )  # fmt: skip
        return state, exposed
