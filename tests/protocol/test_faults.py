"""The fault simulator: no seed breaks an invariant, and each invariant catches what it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import guard, rounds
from client.guard import LedgerGuard, Release, _bytes, noise_stream, request_digest
from common.secagg import MemoryAttempts, client, messages
from common.secagg.client import ClientSession
from common.secagg.clientstate import ClientState
from common.secagg.server import ServerSession
from server import aggregate, panel
from server.panel import Panel, memory_attempts
from server.store import RunFolder
from simulations.cli import main
from simulations.fault_scheduler import Odds, Scheduler
from simulations.faults import SeedResult, Simulator, render, run_seeds, simulator

SEEDS = int(os.environ.get("CONSILIUM_FAULT_SEEDS", "10000"))
PARTS = 8  # what runs the tests shares them out
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def faulty() -> Iterator[Simulator]:
    with simulator() as made:
        yield made


def first_caught(simulated: Simulator, words: str, seeds: range) -> SeedResult:
    """The first seed at which an invariant breaks; it must be the one that says ``words``."""
    for seed in seeds:
        result = simulated.run(seed)
        if result.violation:
            assert words in result.violation, (seed, result.violation)
            return result
    raise AssertionError(f"{len(seeds)} seeds have not found it")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_seed_breaks_an_invariant(part: int) -> None:
    seeds = range(1 + SEEDS * part // PARTS, 1 + SEEDS * (part + 1) // PARTS)
    totals = run_seeds(seeds)
    assert not totals.violations, totals.violations[0]
    assert totals.seeds == len(seeds) == totals.finished + totals.refused
    for kind in Odds.__dataclass_fields__:
        assert totals.faults[kind], kind
    assert totals.resumed
    assert totals.refused < totals.finished


def test_the_parts_are_all_seeds_and_two_processes_find_what_one_finds() -> None:
    starts = [1 + SEEDS * part // PARTS for part in range(PARTS + 1)]
    assert (starts[0], starts[-1], starts) == (1, SEEDS + 1, sorted(starts))
    seeds = range(90, 106)
    one, two = (run_seeds(seeds, jobs=jobs, keep_traces=True) for jobs in (1, 2))
    assert one.as_dict() == two.as_dict()
    assert len(one.traces) == len(seeds)


def test_whole_studies_on_a_real_disk_break_none() -> None:
    totals = run_seeds(range(1, 16), whole=True, on_disk=True)
    assert not totals.violations, totals.violations[0]
    assert totals.whole_studies == 15


def test_without_faults_every_study_finishes_at_once(faulty: Simulator) -> None:
    for seed in (*range(1, 30), 100, 200):
        result = faulty.run(seed, Odds())
        assert (result.ended, result.restarts, result.violation) == ("finished", 0, None)


def test_a_seed_does_the_same_again_in_another_process(faulty: Simulator) -> None:
    program = (
        "from simulations.faults import simulator\n"
        "with simulator() as made:\n"
        "    for seed in (7, 8, 100): print(*made.run(seed).trace, sep='\\n')\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            timeout=100,
            check=True,
        ).stdout.decode()
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    here = "\n".join(line for seed in (7, 8, 100) for line in faulty.run(seed).trace)
    assert outputs[0] == here + "\n"


def test_events_of_one_time_keep_their_order_and_calm_ends_all_faults() -> None:
    scheduler, seen = Scheduler(1, Odds(loss=1.0)), list[int]()
    for number in range(5):
        scheduler.after(1.0, "event", lambda number=number: seen.append(number))
    assert scheduler.strikes("loss")
    scheduler.calm()
    assert not scheduler.strikes("loss")
    scheduler.sleep(0.5)
    assert seen == []
    scheduler.sleep(0.5)
    assert seen == [0, 1, 2, 3, 4]
    assert scheduler.monotonic() == 1.0


# Bugs the simulator found


def test_numbers_of_attempts_outlive_the_coordinator(tmp_path: Path) -> None:
    assert next(RunFolder(tmp_path).attempts("finetune", 3, 1)) == 0
    # The interrupted one again, for hospitals that never heard of it; then new ones.
    assert list(RunFolder(tmp_path).attempts("finetune", 3, 2)) == [0, 1, 2]
    assert list(RunFolder(tmp_path).attempts("finetune", 3, 1)) == [2, 3]
    assert list(RunFolder(tmp_path).attempts("finetune", 4, 1)) == [0]
    assert list(RunFolder(tmp_path).attempts("distill", 3, 2)) == [0, 1]


@pytest.mark.parametrize("seed", [15, 16, 500])
def test_a_sum_that_was_interrupted_before_anything_left_can_be_resumed(
    faulty: Simulator, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A resumed coordinator began at attempt 0 again, which hospitals answer once only."""
    assert faulty.run(seed).violation is None

    def secure_sum(*arguments: Any) -> Any:
        return aggregate.secure_sum(*arguments[:-1], memory_attempts())

    monkeypatch.setattr(panel, "secure_sum", secure_sum)
    assert "no end although faults have stopped" in str(faulty.run(seed).violation)


def test_two_replies_to_a_message_sent_twice_may_arrive_together() -> None:
    """The coordinator's link failed on the second; see also ``test_flower_link.py``."""
    with simulator(whole=True) as simulated:
        result = simulated.run(328, Odds(delay=0.5, hospital_crash=0.5, duplicate=0.3))
    assert result.violation is None


# What a person sees


def test_a_finding_is_told_with_all_its_events_and_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LedgerGuard, "release", uncharged)
    totals = run_seeds(range(100, 101), whole=True)
    text = render(totals)
    assert "VIOLATION at seed 100" in text
    assert "hospital-1 -> coordinator: HelloReply" in text
    assert "again: consilium faults --seeds 1 --seed 100" in text
    monkeypatch.setattr(sys, "argv", ["consilium", "faults", "--seeds", "1", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    (found,) = json.loads(capsys.readouterr().out)["violations"]
    assert found["seed"] == 1
    assert "can be read, its ledger charges 0" in found["trace"][-1]
    monkeypatch.undo()
    assert render(run_seeds(range(1, 3), keep_traces=True)).count("\nseed ") == 2


# Broken parts


def uncharged(guard: LedgerGuard, asked: Release, compute: Callable[..., Any]) -> Any:
    """Lets the release go and charges nothing, with noise that nobody sees drawn."""
    return compute(noise_stream(guard.noise.inner, asked, asked.request))  # type: ignore[attr-defined]


def charged_late(guard: LedgerGuard, asked: Release, compute: Callable[..., Any]) -> Any:
    """The right steps in the wrong order: computed, and then charged."""
    request = request_digest(asked.request, guard.safe.ledger.tag(asked.rows))
    value = compute(noise_stream(guard.noise, asked, request))
    reservation, _ = guard._reserve(asked, request)
    guard.safe.ledger.record_release(reservation, _bytes(value))
    guard.safe.ledger.commit(reservation)
    return value


def revealing(session: ClientSession, state: ClientState, relay: messages.Relay) -> bytes:
    """Gives the coordinator both shares of every hospital."""
    roster, _ = session._placed()
    del relay
    return session._signed(
        messages.Kind.REVEAL,
        messages.Reveal(
            sender=roster.position(session._name),
            agreed=roster.agreed(state.sharers, state.survivors),
            seed=state.seed,
            of_seeds={one: pair[0] for one, pair in state.held.items()},
            of_keys={one: pair[1] for one, pair in state.held.items()},
        ).encode(),
    )


def not_masking(vector: Any, masks: Any, out: Any, each_piece: Callable[[Any], object]) -> None:
    """Forgets the masks."""
    del masks
    out[:] = vector
    each_piece(out)


def counting_all(asked: Panel, action: str, task: Any, kind: type, fits: Any) -> Iterator[Any]:
    """Takes every reply, also a second one of the same hospital."""
    del fits
    replies = asked.link.ask(action, task, kind)
    yield from (one for one in replies if one.hospital in asked.members)


def failing(*_: Any) -> Any:
    """A bug at a hospital."""
    raise KeyError("a column")


BROKEN: dict[str, tuple[Any, str, Any, str]] = {
    "a guard that charges nothing": (
        LedgerGuard, "release", uncharged, "can be read, its ledger charges 0",
    ),
    "a guard that charges after it has computed": (
        LedgerGuard, "release", charged_late, "before it is charged",
    ),
    "a guard that forgets the study's promise": (
        guard, "refuse_beyond_study", lambda *_: None, "more than the study promised",
    ),
    "noise that forgets what it is for": (
        guard, "noise_stream", lambda noise, asked, *_: noise.stream(asked.stage, asked.round),
        "the same noise twice",
    ),
    "a session that reveals both shares": (
        ClientSession, "_on_agreements", revealing, "both shares",
    ),
    "a session that forgets its masks": (
        client, "apply_masks", not_masking, "without a mask",
    ),
    "a hospital that forgets the steps it took": (
        MemoryAttempts, "claim", lambda *_: None, "of one attempt twice",
    ),
    "a sum that counts a vector twice": (
        ServerSession, "_once", lambda *_: None, "is no sum of what",
    ),
    "a panel that counts a reply twice": (
        Panel, "_ask", counting_all, "is no sum of what",
    ),
    "a hospital whose code fails": (
        rounds, "moments_by_unit", failing, "failed unexpectedly: KeyError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_part_is_caught(
    faulty: Simulator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place, attribute, broken, words = BROKEN[name]
    monkeypatch.setattr(place, attribute, broken)
    found = first_caught(faulty, words, range(1, 400))
    print(f"{name}: seed {found.seed}")
    assert found.trace[-1].endswith(f"VIOLATION {found.violation}")
    again = faulty.run(found.seed)
    assert (again.violation, again.trace) == (found.violation, found.trace)
