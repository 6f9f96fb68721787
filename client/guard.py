"""The gate that every release passes: consent, policy, budget, noise, in this order.

::

    admit (consent) ▶ charge (policy, study's ε, patients' ε) ▶ compute under own noise ▶ release

Two gates keep the same promise. :class:`LedgerGuard` is a hospital's own: signed policy, durable
ledger, audit log. :class:`MemoryGuard` holds a simulated hospital to its study for as long as the
process lives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from client.consent import apply_consent
from client.ledger_records import Reservation
from client.policy import ReleaseRequest, check
from client.safe import Safe
from common.auditlog import utc_now
from common.errors import RefusalError
from common.privacy.accounting import GaussianEvent, epsilon, merged
from common.privacy.units import PrivacyUnit, Relation
from common.randomness import NoiseSource, Stream

# The calibrated noise meets the study's ε closely; rounding must not refuse its last round.
_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is about to leave, and all it depends on.

    ``request``: digest over the study, stage, round, attempt and incoming models: public.
    ``rows``: digest over the very rows used: secret, since who knows all patients but one could
    guess the last; it only ever enters keyed hashes.
    ``pool``: which patients are charged, ``train`` or ``test``; they never overlap.
    ``once``: never given again, even byte for byte. Two secure sums with one share of noise but
    other survivors would differ by one hospital's vector and that share alone.
    ``epsilon``, ``delta``: what the study promised those patients in all; None without privacy.
    ``distance``: the part of ``delta`` set aside for noise that is only nearly Gaussian.
    """

    study: str
    study_digest: str
    task: str
    stage: str
    round: int
    attempt: int
    request: str
    rows: str = field(repr=False)
    pool: str
    trust: str
    unit: PrivacyUnit
    relation: Relation
    records_per_patient: int
    events: tuple[GaussianEvent, ...]
    patients: tuple[str, ...] = field(repr=False)
    peers: int
    epsilon: float | None
    delta: float | None
    once: bool = False
    distance: float = 0.0


class Guard(Protocol):
    """Lets a release pass, or raises RefusalError; then nothing was computed from patients."""

    @property
    def noise(self) -> NoiseSource:
        """Where its noise comes from."""
        ...

    @property
    def is_lasting(self) -> bool:
        """Whether what was spent is remembered for as long as it matters."""
        ...

    def admit(self, patients: Iterable[str], *, study: str, round_number: int) -> frozenset[str]:
        """Those of ``patients`` whose records may be used in this round."""
        ...

    def release(self, asked: Release, compute: Callable[[Stream], Tensor]) -> Tensor:
        """The release: a stored one byte for byte, or ``compute`` under its own noise, charged."""
        ...


@dataclass
class MemoryGuard:
    """The gate of a simulated hospital: the study's own ε, and no more."""

    noise: NoiseSource
    is_lasting: bool = True
    _charged: dict[tuple[str, str, str], tuple[GaussianEvent, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Add up what was charged before."""
        self._spent: dict[tuple[str, str], tuple[GaussianEvent, ...]] = {}
        for (study, pool, _), events in self._charged.items():
            self._spend((study, pool), events)

    def admit(self, patients: Iterable[str], *, study: str, round_number: int) -> frozenset[str]:  # noqa: ARG002
        """Everybody: a simulation's data are public."""
        return frozenset(patients)

    def release(self, asked: Release, compute: Callable[[Stream], Tensor]) -> Tensor:
        """Computed anew each time: the same request draws the same noise, so the same bytes."""
        return compute(self.charge(asked))

    def charge(self, asked: Release) -> Stream:
        """Charge ``asked``; the noise under which alone it may now be computed and leave.

        For a simulation that computes many hospitals' releases together.
        """
        key = (asked.study_digest, asked.pool, request_digest(asked.request, asked.rows))
        if key in self._charged and asked.once:
            raise _answered(asked)
        if key not in self._charged:
            refuse_beyond_study(self._spent.get(key[:2], ()), asked)
            self._charged[key] = asked.events
            self._spend(key[:2], asked.events)
        return noise_stream(self.noise, asked, key[2])

    def _spend(self, payer: tuple[str, str], events: tuple[GaussianEvent, ...]) -> None:
        """``payer``: the study and the pool of patients."""
        self._spent[payer] = merged((*self._spent.get(payer, ()), *events))


@dataclass(frozen=True)
class LedgerGuard:
    """The gate of a real hospital, over its open safe."""

    safe: Safe
    noise: NoiseSource

    @property
    def is_lasting(self) -> bool:
        """True: the ledger outlives every run."""
        return True

    def admit(self, patients: Iterable[str], *, study: str, round_number: int) -> frozenset[str]:
        """The patients who have not withdrawn their consent; the log notes the list's hash."""
        withdrawals = self.safe.withdrawals(self.safe.policy())
        return frozenset(
            apply_consent(
                withdrawals,
                patients,
                ledger=self.safe.ledger,
                log=self.safe.log,
                study=study,
                round_number=round_number,
            )
        )

    def release(self, asked: Release, compute: Callable[[Stream], Tensor]) -> Tensor:
        """Reserve, compute, store, commit; each step durable before the next (see the ledger).

        A refusal is logged here in full; only its rule may be told to the coordinator.
        """
        ledger = self.safe.ledger
        request = request_digest(asked.request, ledger.tag(asked.rows))
        if stored := ledger.resume(request):
            if asked.once:
                raise _answered(asked)
            ledger.commit(stored.reservation)
            return _tensor(stored.content)
        try:
            reservation, attempt = self._reserve(asked, request)
        except RefusalError as refusal:
            self.safe.log.append(
                "refused",
                {
                    "study": asked.study,
                    "study_digest": asked.study_digest,
                    "stage": asked.stage,
                    "round": asked.round,
                    "rule": refusal.rule or "request",
                },
            )
            raise
        value = compute(noise_stream(self.noise, asked, request, attempt))
        ledger.record_release(reservation, _bytes(value))
        ledger.commit(reservation)
        return value

    def _reserve(self, asked: Release, request: str) -> tuple[Reservation, int]:
        policy, ledger = self.safe.policy(), self.safe.ledger
        if asked.delta is None:
            raise RefusalError(
                "release.trust: expected a study with a privacy promise, found none; "
                "this hospital releases nothing without noise",
                rule="release.trust",
            )
        cohort = ledger.cohort(asked.patients)
        check(
            policy,
            ReleaseRequest(
                study=asked.study,
                study_digest=asked.study_digest,
                task=asked.task,
                stage=asked.stage,
                trust=asked.trust,
                unit=asked.unit,
                relation=asked.relation,
                events=asked.events,
                delta=asked.delta,
                cohort_patients=cohort.patients,
                peers=asked.peers,
                max_records_per_patient=asked.records_per_patient,
                now=utc_now(),
            ),
        )
        refuse_beyond_study(self._spent_in_study(asked), asked)
        attempt = ledger.next_attempt(request)
        reservation = ledger.reserve(
            study=asked.study,
            study_digest=asked.study_digest,
            stage=asked.stage,
            round_number=asked.round,
            attempt=attempt,
            request_digest=request,
            unit=asked.unit,
            relation=asked.relation,
            records_per_patient=asked.records_per_patient,
            cohort=cohort,
            events=asked.events,
            limits=policy.limits(),
        )
        return reservation, attempt

    def _spent_in_study(self, asked: Release) -> list[GaussianEvent]:
        """All this study has charged to the pool, lost attempts included."""
        return [
            event
            for entry in self.safe.ledger.entries()
            if entry.study_digest == asked.study_digest
            and (entry.stage == "evaluate") == (asked.pool == "test")
            for event in entry.declared
        ]


def noise_stream(noise: NoiseSource, asked: Release, request: str, attempt: int = 0) -> Stream:
    """The noise of one release.

    Secret noise is bound to all that the release depends on: ``request`` digests its very rows, so
    that no two answers ever share noise. Test noise protects nobody and is bound to the place of
    the release in its study alone: runs that differ in rounding only, as a simulation's and a
    deployment's do, or those of two engines, draw alike in every round.
    """
    if noise.is_secret:
        return noise.stream(asked.stage, asked.round, request, attempt)
    return noise.stream(asked.study_digest, asked.stage, asked.round, asked.attempt)


def refuse_beyond_study(spent: Sequence[GaussianEvent], asked: Release) -> None:
    """Refuse what would break the promise the study made, whatever the hospital could afford."""
    if asked.epsilon is None or asked.delta is None:
        return
    delta = asked.delta - asked.distance
    after = epsilon([*spent, *asked.events], delta=delta, relation=asked.relation)
    if not after <= asked.epsilon * (1 + _SLACK):
        raise RefusalError(
            f"study.epsilon: the study promised ε = {asked.epsilon:g} to its {asked.pool} "
            f"patients, this release would bring them to {after:.4g}; a repeated or additional "
            f"round does not fit",
            rule="study.epsilon",
        )


def _answered(asked: Release) -> RefusalError:
    return RefusalError(
        f"secagg.attempt: {asked.stage} round {asked.round} was answered under these very terms; "
        f"raise the attempt number",
        rule="secagg.attempt",
    )


def request_digest(*parts: str | int) -> str:
    """SHA-256 over typed, length-prefixed parts: no two different requests share one."""
    running = hashlib.sha256()
    for part in parts:
        data = f"{type(part).__name__}:{part}".encode()
        running.update(len(data).to_bytes(8, "big") + data)
    return running.hexdigest()


_TYPES = {"<f4": torch.float32, "<i4": torch.int32}


def _bytes(value: Tensor) -> bytes:
    kind = next(code for code, dtype in _TYPES.items() if dtype is value.dtype)
    return kind.encode() + bytes(value.contiguous().numpy().astype(kind).tobytes())


def _tensor(content: bytes) -> Tensor:
    kind = content[:3].decode()
    array = np.frombuffer(content, dtype=kind, offset=3)
    return torch.from_numpy(array.copy()).to(_TYPES[kind])
