"""One hospital process for the ledger's crash tests: rounds until it is told to die at a step.

Run as ``python ledger_driver.py FOLDER STEP SKIP``: kills itself with SIGKILL at the
(SKIP + 1)-th time it reaches STEP. A file ``released`` records, as a network would see it, every
release that left the hospital, and ``drawn`` every draw of noise.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from client.ledger import Ledger
from client.spend import Limits
from common.auditlog import AuditLog
from common.identity import Identity
from common.privacy.accounting import GaussianEvent
from common.privacy.units import PrivacyUnit, Relation
from common.secretfiles import WrappingKey

SECRET = bytes(range(32))
KEY = WrappingKey(key=bytes(32))
EVENT = GaussianEvent(noise_multiplier=20.0)
LIMITS = Limits(
    epsilon_lifetime=50.0, epsilon_per_year=50.0, delta=1e-5, relation=Relation.ADD_REMOVE
)
STEPS = (
    "checked",
    "reserved, not yet durable",
    "reserved, not yet logged",
    "reserved",
    "noise drawn",
    "released, not yet durable",
    "released, not yet logged",
    "released",
    "sent",
    "committed, not yet durable",
    "committed, not yet logged",
    "committed",
)


def opened(folder: Path, on_step: Callable[[str], None] = lambda _: None) -> Ledger:
    log = AuditLog(folder / "audit.log", Identity.load(folder / "identity", key=KEY))
    return Ledger(folder / "ledger.db", secret=SECRET, log=log, on_step=on_step)


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def one_round(
    ledger: Ledger, folder: Path, number: int, on_step: Callable[[str], None] = lambda _: None
) -> None:
    request = f"round {number}"
    stored = ledger.resume(request)
    if stored is None:
        reservation = ledger.reserve(
            study="crash",
            study_digest="0" * 64,
            stage="finetune",
            round_number=number,
            attempt=ledger.next_attempt(request),
            request_digest=request,
            unit=PrivacyUnit.PATIENT,
            relation=Relation.ADD_REMOVE,
            records_per_patient=1,
            cohort=ledger.cohort(f"patient {i}" for i in range(20)),
            events=[EVENT],
            limits=LIMITS,
        )
        note(folder / "drawn", f"{number} {reservation.attempt}")
        # Unlike a real release this one differs at every draw, so that reuse can be told.
        content = os.urandom(32)
        on_step("noise drawn")
        ledger.record_release(reservation, content)
    else:
        reservation, content = stored.reservation, stored.content
    note(folder / "released", f"{number} {reservation.attempt} {content.hex()}")
    on_step("sent")
    ledger.commit(reservation)


def main(folder: Path, fatal_step: str, skip: int) -> None:
    left = skip

    def on_step(step: str) -> None:
        nonlocal left
        if step == fatal_step:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    ledger = opened(folder, on_step)
    first = len({entry.round for entry in ledger.entries() if entry.state == "committed"})
    for number in range(first, first + 4):
        one_round(ledger, folder, number, on_step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
