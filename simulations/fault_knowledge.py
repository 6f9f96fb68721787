"""What whoever reads every message of every secure sum can work out.

The reader is the coordinator and everybody on the wire together, with a perfect memory: messages
that were lost, late, repeated, or of an attempt that failed count like any other. What is checked
is the protocol's promise itself (Bonawitz et al. 2017): the sums that can be unmasked from all that
was said hold at least ``threshold`` hospitals each. The worlds here have at most 32 hospitals; up
to there each shares masks with every other.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from common.errors import ConsiliumError
from common.secagg import messages
from common.secagg.messages import Kind
from common.secagg.terms import DIGEST_BYTES
from common.wire import AggregateStep

_TERMS = slice(5, 5 + DIGEST_BYTES)  # where a message's header names them


@dataclass
class Exchange:
    """All that was ever said under one roster; hospitals are named by their position.

    ``sharers``: whose masks are in a vector that left, by its owner. ``seeds``: owners that showed
    their own. ``seed_shares``, ``key_shares``: who revealed a share of an owner's secret.
    """

    sharers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    seeds: set[int] = field(default_factory=set)
    seed_shares: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    key_shares: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def unmasked(self, needed: int) -> list[set[int]]:
        """The sets of hospitals whose sums can be read; ``needed``: shares that give a secret.

        A vector is hidden by its own mask and by one mask with each sharer. Two vectors with an
        unknown mask in common can only be read together, and none beside a vector that never left.
        """
        keys = {one for one, held in self.key_shares.items() if len(held) >= needed}
        seeds = self.seeds | {one for one, by in self.seed_shares.items() if len(by) >= needed}
        found, left = [], set(self.sharers)
        while left:
            group, fresh = set[int](), {min(left)}
            while fresh:
                one = fresh.pop()
                group.add(one)
                if one not in keys:
                    fresh |= {other for other in self.sharers.get(one, ()) if other not in keys}
                fresh -= group
            left -= group
            if group <= seeds and group <= set(self.sharers):
                found.append(group)
        return found


@dataclass
class Eavesdropper:
    """Reads hospitals' messages as they leave.

    ``threshold``: fewest hospitals in a sum, and shares that give a secret.
    """

    threshold: int
    exchanges: dict[bytes, Exchange] = field(default_factory=dict)
    _said: dict[tuple[str, bytes, Kind], bytes] = field(default_factory=dict)
    _place: dict[tuple[str, bytes], tuple[bytes, int]] = field(default_factory=dict)

    def hears(self, name: str, asked: AggregateStep | None, message: bytes) -> str | None:
        """``message`` of hospital ``name`` leaves, in answer to ``asked`` (None: its Advert).

        Returns what it gives away that it must not.
        """
        kind, terms = messages.kind_of(message), message[_TERMS]
        if self._said.setdefault((name, terms, kind), message) != message:
            return f"{name} took step {kind.name} of one attempt twice"
        if asked is None or kind is Kind.AGREEMENT:
            return None
        body = messages.body_of(message, kind, terms, is_signed=True)
        if kind is Kind.SHARES:
            shares = messages.Shares.decode(body)
            self.exchanges.setdefault(shares.roster, Exchange())
            self._place[name, terms] = (shares.roster, shares.sender)
            return None
        roster, me = self._place[name, terms]
        if kind is Kind.MASKED:
            request = messages.body_of(asked.message, Kind.DELIVERY, terms, is_signed=False)
            self.exchanges[roster].sharers[me] = messages.Delivery.decode(request).sharers
            return None
        try:
            return self._revealed(self.exchanges[roster], me, messages.Reveal.decode(body))
        except ConsiliumError as error:
            return f"{name}: {error}"

    def _revealed(self, exchange: Exchange, me: int, reveal: messages.Reveal) -> str | None:
        exchange.seeds.add(me)
        for owner in reveal.of_seeds:
            exchange.seed_shares[owner].add(me)
        for owner in reveal.of_keys:
            exchange.key_shares[owner].add(me)
            if me in exchange.seed_shares[owner]:
                return f"hospital {me} revealed both shares of hospital {owner}"
        for group in exchange.unmasked(self.threshold):
            if len(group) < self.threshold:
                return f"the sum of {len(group)} hospitals can be read, {self.threshold} is least"
        return None
