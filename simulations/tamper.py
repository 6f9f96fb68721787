"""What an attacking hospital's answer looks like when it leaves.

Under ``trust = "local"`` the honest software has clipped, noised and charged before the attacker
touches the update: sign flip and scaling act on signal and noise alike, and cost the attacker's own
patients nothing (post-processing). In a secure sum nobody sees a single vector, and any integers
can be masked: the attacker adds its own before it signs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray

from client.hospital import Hospital
from common.flower import pack, read
from common.privacy.budget import stage_charge
from common.scenario import AttackSpec
from common.secagg import messages
from common.secagg.messages import Kind
from common.secagg.plan import encoding_of
from common.study import Study
from common.wire import AggregateReply, TrainReply
from simulations.draws import generator

# Header and fields before the vector, as ``common.secagg.messages.Masked`` says.
_VECTOR_AT = 112


@dataclass(frozen=True)
class Tamperer:
    """Changes what hospitals that attack send in rounds of training."""

    study: Study
    attack: AttackSpec
    attackers: frozenset[str]

    def update(self, hospital: Hospital, reply: Message) -> Message:
        """An update that is sent by itself."""
        honest = read(TrainReply, reply)
        if self.attack.kind == "wrong_vector":
            drawn = self._direction(hospital, honest.stage, honest.round, honest.update.numel())
            length = self.attack.strength * float(honest.update.norm())
            changed = torch.from_numpy(drawn * length).float()
        else:
            changed = honest.update * self.attack.strength
        return _with_content(reply, replace(honest, update=changed))

    def masked(self, hospital: Hospital, reply: Message, stage: str, round_number: int) -> Message:
        """A masked vector: what the attacker adds arrives in the sum, and the signature holds.

        As long as ``factor`` times all the patients it declares pulling the same way.
        """
        honest = read(AggregateReply, reply)
        assert hospital.aggregator is not None  # noqa: S101  (it has just answered a secure sum)
        body = bytearray(honest.message[: -messages.SIGNATURE_BYTES])
        vector = np.frombuffer(body, "<u4", offset=_VECTOR_AT)
        encoding = encoding_of(self.study, stage, len(vector))
        patients = hospital.declared_patients * stage_charge(self.study, stage).plan.sampling_rate
        length = self.attack.strength * patients * encoding.clip_norm * encoding.scale
        added = np.rint(self._direction(hospital, stage, round_number, len(vector)) * length)
        vector += added.astype(np.int64).astype("<u4")
        digest = hashlib.sha256(body).digest()
        signature = messages.sign(hospital.aggregator.identity, Kind.MASKED, digest)
        return _with_content(reply, replace(honest, message=bytes(body) + signature))

    def _direction(
        self, hospital: Hospital, stage: str, round_number: int, length: int
    ) -> NDArray[np.float64]:
        context = f"wrong vector|{hospital.name}|{stage}|{round_number}"
        drawn = generator(self.study.seed, context).normal(size=length)
        return drawn / np.linalg.norm(drawn)


def _with_content(reply: Message, changed: TrainReply | AggregateReply) -> Message:
    reply.content = pack(changed)
    return reply
