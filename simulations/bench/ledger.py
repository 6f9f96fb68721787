"""What the hospital's ledger costs: one release, and the ε of a thousand entries."""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from client.ledger import Ledger
from client.spend import Charge, Limits, spent
from common.auditlog import AuditLog
from common.identity import Identity
from common.privacy.accounting import GaussianEvent
from common.privacy.units import PrivacyUnit, Relation

_LIMITS = Limits(
    epsilon_lifetime=1e6, epsilon_per_year=1e6, delta=1e-5, relation=Relation.ADD_REMOVE
)
_RELEASE_BYTES = 4 * 6274  # an MLP's update
_PATIENTS = [f"patient {number}" for number in range(500)]


def ledger_figures(*, releases: int = 100, entries: int = 1000) -> dict[str, float]:
    """``ledger_ms_per_release``: median milliseconds of reserve, record and commit, each durable,
    for a cohort of 500 and ever different events, on the disk that holds temporary files.

    ``ledger_1000_entries_s``: seconds for the ε of ``entries`` distinct charges, none of which was
    composed before in this process.
    """
    return {
        "ledger_ms_per_release": 1e3 * _seconds_per_release(releases),
        "ledger_1000_entries_s": _seconds_to_answer(entries),
    }


def _seconds_per_release(releases: int) -> float:
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as temporary:
        folder = Path(temporary)
        log = AuditLog(folder / "audit.log", Identity.generate())
        content = secrets.token_bytes(_RELEASE_BYTES)
        with Ledger(folder / "ledger.db", secret=secrets.token_bytes(32), log=log) as ledger:
            seconds = []
            for number in range(releases):
                begin = time.perf_counter()
                reservation = ledger.reserve(
                    study="bench",
                    study_digest="0" * 64,
                    stage="finetune",
                    round_number=number,
                    attempt=0,
                    request_digest=f"request {number}",
                    unit=PrivacyUnit.PATIENT,
                    relation=Relation.ADD_REMOVE,
                    records_per_patient=1,
                    cohort=ledger.cohort(_PATIENTS),
                    events=[GaussianEvent(noise_multiplier=5 + 1e-3 * number)],
                    limits=_LIMITS,
                )
                ledger.record_release(reservation, content)
                ledger.commit(reservation)
                seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _seconds_to_answer(entries: int) -> float:
    now = datetime.now(UTC)
    never_before = 1e-9 * secrets.randbelow(10**6)  # else a second call would be answered by caches
    charges = [
        Charge(
            events=(
                GaussianEvent(
                    noise_multiplier=2 + 3.1e-3 * number + never_before,
                    sampling_rate=0.01 + 1e-4 * number,
                    steps=1 + number % 50,
                ),
            ),
            relation=Relation.ADD_REMOVE,
            adaptive=False,
            time=now,
        )
        for number in range(entries)
    ]
    begin = time.perf_counter()
    spent(charges, limits=_LIMITS, now=now)
    return time.perf_counter() - begin
