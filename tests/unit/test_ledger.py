"""What the ledger charges, to whom, and what it refuses."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger import Ledger
from client.ledger_records import Reservation
from client.spend import Accounting, Charge, Limits, charged_events, spent
from common.auditlog import AuditLog, verify_log
from common.errors import DataError, LedgerError, PrivacyError, RefusalError
from common.identity import Identity
from common.privacy.accounting import GaussianEvent, epsilon
from common.privacy.units import PrivacyUnit, Relation

SECRET = bytes(range(32))
HOSPITAL = Identity.generate()
ADD, REPLACE = Relation.ADD_REMOVE, Relation.REPLACE_ONE
LIMITS = Limits(epsilon_lifetime=3.0, epsilon_per_year=2.0, delta=1e-5, relation=ADD)
EVENT = GaussianEvent(noise_multiplier=10.0)


class World:
    """A ledger with its log and a clock that the test moves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.count = 0
        self.log = AuditLog(folder / "audit.log", HOSPITAL, clock=lambda: self.now)
        self.ledger = self.opened()

    def opened(self) -> Ledger:
        return Ledger(
            self.folder / "ledger.db", secret=SECRET, log=self.log, clock=lambda: self.now
        )

    def reserve(
        self,
        patients: Sequence[str],
        events: Sequence[GaussianEvent] = (EVENT,),
        *,
        request: str = "",
        attempt: int = 0,
        limits: Limits = LIMITS,
        relation: Relation = ADD,
        unit: PrivacyUnit = PrivacyUnit.PATIENT,
        records: int = 1,
        adaptive: bool = False,
    ) -> Reservation:
        self.count += 1
        return self.ledger.reserve(
            study="study",
            study_digest="0" * 64,
            stage="finetune",
            round_number=self.count,
            attempt=attempt,
            request_digest=request or f"request {self.count}",
            unit=unit,
            relation=relation,
            records_per_patient=records,
            cohort=self.ledger.cohort(patients),
            events=events,
            limits=limits,
            adaptive=adaptive,
        )

    def reserve_until_refused(self, patients: Sequence[str], **options: object) -> int:
        for number in range(1000):
            try:
                self.reserve(patients, **options)  # type: ignore[arg-type]
            except RefusalError:
                return number
        raise AssertionError("the budget never ended")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.ledger.close()


def most_rounds(limit: float, relation: Relation = ADD) -> int:
    count = 0
    while epsilon([replace(EVENT, steps=count + 1)], delta=1e-5, relation=relation) <= limit:
        count += 1
    return count


def test_exactly_the_budget_fits(world: World) -> None:
    assert world.reserve_until_refused(["a", "b"]) == most_rounds(2.0)
    with pytest.raises(RefusalError, match=r"budget.epsilon_per_year: .* limit is 2") as refusal:
        world.reserve(["a"])
    assert refusal.value.rule == "budget.epsilon_per_year"


def test_a_year_later_the_yearly_budget_is_back_and_the_lifetime_one_is_not(world: World) -> None:
    limits = replace(LIMITS, epsilon_lifetime=2.5)
    first = world.reserve_until_refused(["a"], limits=limits)
    world.now += timedelta(days=364)
    assert world.reserve_until_refused(["a"], limits=limits) == 0
    world.now += timedelta(days=2)
    second = world.reserve_until_refused(["a"], limits=limits)
    assert first == most_rounds(2.0)
    assert first + second == most_rounds(2.5)
    with pytest.raises(RefusalError, match=r"budget.epsilon_lifetime"):
        world.reserve(["a"], limits=limits)


def test_overlapping_cohorts_share_their_patients_budget(world: World) -> None:
    half = most_rounds(2.0) // 2
    for _ in range(half):
        world.reserve(["a", "b"])
    world.reserve(["b", "c"], [replace(EVENT, steps=most_rounds(2.0) - half)])
    for patients in (["b"], ["b", "z"], ["a", "b", "c"]):
        with pytest.raises(RefusalError):
            world.reserve(patients)
    world.reserve(["a"])
    world.reserve(["c", "new"])


@settings(max_examples=25)
@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=1, max_size=12))
def test_every_patients_history_is_known(
    tmp_path_factory: pytest.TempPathFactory, cohorts: list[set[str]]
) -> None:
    world = World(tmp_path_factory.mktemp("ledger"))
    limits = replace(LIMITS, epsilon_lifetime=1e3, epsilon_per_year=1e3)
    by_id: dict[int, set[str]] = {}
    for patients in cohorts:
        world.reserve(sorted(patients), limits=limits)
        by_id[world.ledger.cohort(patients).id] = patients
    expected: dict[frozenset[int], int] = {}
    for patient in set().union(*cohorts):
        history = frozenset(each for each, members in by_id.items() if patient in members)
        expected[history] = expected.get(history, 0) + 1
    assert world.ledger.patient_groups() == expected
    world.ledger.close()
    world.opened().close()  # its consistency checks hold


def test_repeated_ids_are_one_patient(world: World) -> None:
    cohort = world.ledger.cohort(["a", "b", "a", " a ", "b"])
    assert cohort.patients == 2
    assert world.ledger.cohort(["b", "a"]) == cohort
    # One letter in two encodings is one patient.
    assert world.ledger.cohort(["é"]).digest == world.ledger.cohort(["e\u0301"]).digest


@pytest.mark.parametrize("patients", [[], [""], ["a", "  "]])
def test_nobody_is_no_cohort(world: World, patients: list[str]) -> None:
    with pytest.raises(DataError, match="expected"):
        world.ledger.cohort(patients)


def test_the_same_request_gets_the_same_bytes(world: World) -> None:
    reservation = world.reserve(["a"], request="r")
    assert world.ledger.resume("r") is None
    world.ledger.record_release(reservation, b"noisy")
    stored = world.ledger.resume("r")
    assert stored is not None
    assert (stored.content, stored.is_committed) == (b"noisy", False)
    world.ledger.commit(stored.reservation)
    world.ledger.commit(stored.reservation)
    world.ledger.close()
    world.ledger = world.opened()
    again = world.ledger.resume("r")
    assert again is not None
    assert (again.content, again.is_committed) == (b"noisy", True)
    with pytest.raises(LedgerError, match="already answered; resume it"):
        world.reserve(["a"], request="r", attempt=1)
    with pytest.raises(LedgerError, match="its release is already stored"):
        world.ledger.record_release(reservation, b"other noise")
    assert len(world.ledger.entries()) == 1


def test_a_lost_attempt_is_paid_again(world: World) -> None:
    world.reserve(["a"], request="r")
    with pytest.raises(LedgerError, match="counts as spent; a new try is attempt 1"):
        world.reserve(["a"], request="r")
    assert world.ledger.next_attempt("r") == 1
    world.reserve(["a"], request="r", attempt=1)
    assert len(world.ledger.entries()) == 2
    assert world.ledger.next_attempt("unheard of") == 0


def test_only_real_reservations_are_honoured(world: World) -> None:
    reservation = world.reserve(["a"])
    for forged in (
        replace(reservation, nonce="0" * 32),
        replace(reservation, entry=7),
        replace(reservation, request_digest="other"),
    ):
        with pytest.raises(LedgerError, match="expected a reservation made by this ledger"):
            world.ledger.record_release(forged, b"x")
    with pytest.raises(LedgerError, match="expected a stored release"):
        world.ledger.commit(reservation)
    with pytest.raises(LedgerError, match="never free"):
        world.reserve(["a"], [])
    assert "nonce" not in repr(reservation)


def test_pruning_forgets_bytes_and_keeps_charges(world: World) -> None:
    reservation = world.reserve(["a"], request="r")
    world.ledger.record_release(reservation, b"noisy")
    assert world.ledger.prune(world.now + timedelta(days=1)) == 0  # not committed yet
    world.ledger.commit(reservation)
    assert world.ledger.prune(world.now + timedelta(days=1)) == 1
    with pytest.raises(LedgerError, match="was pruned"):
        world.ledger.resume("r")
    with pytest.raises(LedgerError, match="already answered"):
        world.reserve(["a"], request="r", attempt=1)
    assert len(world.ledger.entries()) == 1


def test_another_process_s_charges_count(world: World) -> None:
    other = world.opened()
    here, world.ledger = world.ledger, other
    used = world.reserve_until_refused(["a"])
    world.ledger = here
    assert used == most_rounds(2.0)
    assert world.reserve_until_refused(["a"]) == 0
    other.close()


def test_a_replace_one_release_never_counts_under_add_remove(world: World) -> None:
    with pytest.raises(RefusalError, match="ε = ∞"):
        world.reserve(["a"], relation=REPLACE)
    lenient = replace(LIMITS, relation=REPLACE)
    world.reserve(["a"], relation=REPLACE, limits=lenient)
    # And once there is one, its patients are closed to an add/remove budget, others are not.
    with pytest.raises(RefusalError, match="ε = ∞"):
        world.reserve(["a", "b"])
    world.reserve(["b"])


def test_an_add_remove_release_under_a_replace_one_budget_costs_as_replace_one(
    world: World,
) -> None:
    limits = replace(LIMITS, relation=REPLACE)
    assert world.reserve_until_refused(["a"], limits=limits) == most_rounds(2.0, REPLACE)
    assert most_rounds(2.0, REPLACE) < most_rounds(2.0) / 3


def test_a_record_level_release_costs_each_patient_its_records(world: World) -> None:
    as_patient = world.reserve_until_refused(["a"])
    as_records = world.reserve_until_refused(["b"], unit=PrivacyUnit.RECORD, records=4)
    assert as_records == as_patient // 16  # the noise is a quarter, its precision 16 times
    single = world.reserve_until_refused(["c"], unit=PrivacyUnit.RECORD, records=1)
    assert single == as_patient


def test_record_level_charges_dominate_the_true_group_loss() -> None:
    """dp-accounting's mixture of Gaussians is exact for k records drawn independently."""
    from dp_accounting.pld import privacy_loss_distribution
    from scipy.stats import binom

    rate, noise, count = 0.1, 6.0, 4
    event = GaussianEvent(noise_multiplier=noise, sampling_rate=rate)
    charged = charged_events([event], unit=PrivacyUnit.RECORD, records_per_patient=count)
    exact = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        standard_deviation=noise,
        sensitivities=list(range(count + 1)),
        sampling_probs=list(binom.pmf(range(count + 1), count, rate)),
        value_discretization_interval=1e-4,
    )
    for delta in (1e-3, 1e-5):
        ours = epsilon(charged, delta=delta, relation=ADD)
        assert ours >= exact.get_epsilon_for_delta(delta) * 0.999


def test_adaptive_releases_are_counted_by_the_filter(world: World) -> None:
    fixed = world.reserve_until_refused(["a"])
    adaptive = world.reserve_until_refused(["b"], adaptive=True)
    assert 0 < adaptive < fixed
    always = replace(LIMITS, accounting=Accounting.FILTER)
    assert world.reserve_until_refused(["c"], limits=always) == adaptive


def test_the_log_and_the_ledger_hold_no_patient(world: World) -> None:
    canaries = ["CANARY-7731", "1234567890", "Müller"]
    reservation = world.reserve(canaries)
    world.ledger.record_release(reservation, b"CANARY-VALUE-42")
    world.ledger.commit(reservation)
    world.log.append("consent_applied", {"patients": [world.ledger.tag(canaries[0])]})
    world.ledger.close()
    for name in ("audit.log", "ledger.db"):
        content = (world.folder / name).read_bytes()
        for canary in [*canaries, "CANARY", "VALUE-42"]:
            assert canary.encode() not in content
    assert len(verify_log(world.folder / "audit.log", HOSPITAL.public)) == 6


def test_hashes_of_patients_need_the_secret(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    log = AuditLog(tmp_path / "other" / "log", HOSPITAL)
    with Ledger(tmp_path / "other" / "ledger.db", secret=bytes(32), log=log) as other:
        assert other.cohort(["a"]).digest != world.ledger.cohort(["a"]).digest
        assert other.tag("a") != world.ledger.tag("a")


def test_a_round_over_a_hundred_thousand_patients_is_one_row(world: World) -> None:
    patients = [f"patient {i}" for i in range(100_000)]
    world.reserve(patients)
    world.reserve(patients[:50_000])
    world.reserve(patients[25_000:])
    assert sorted(world.ledger.patient_groups().values()) == [25_000, 25_000, 50_000]
    cohort = world.ledger.cohort(patients)

    def sizes() -> dict[str, int]:
        with closing(sqlite3.connect(world.folder / "ledger.db")) as database:
            tables = ("patient", "atom", "cohort", "cohort_atom", "entry", "operation")
            return {
                one: database.execute(f"SELECT count(*) FROM {one}").fetchone()[0]  # noqa: S608
                for one in tables
            }

    before = sizes()
    assert before["patient"] == 100_000 and before["atom"] == 3
    for number in range(10):
        world.ledger.reserve(
            study="s",
            study_digest="0" * 64,
            stage="distil",
            round_number=number,
            attempt=0,
            request_digest=f"many {number}",
            unit=PrivacyUnit.PATIENT,
            relation=ADD,
            records_per_patient=1,
            cohort=cohort,
            events=[GaussianEvent(noise_multiplier=100.0)],
            limits=LIMITS,
        )
    grown = {one: size - before[one] for one, size in sizes().items()}
    assert grown == dict.fromkeys(before, 0) | {"entry": 10, "operation": 10}


def test_a_thousand_distinct_entries_are_composed() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    charges = [
        Charge(
            events=(
                GaussianEvent(
                    noise_multiplier=3 + i * 5.1e-3, sampling_rate=0.001 + i * 1e-5, steps=40
                ),
            ),
            relation=ADD,
            adaptive=False,
            time=now - timedelta(days=i),
        )
        for i in range(1000)
    ]
    found = spent(charges, limits=LIMITS, now=now)
    assert 0 < found.year < found.lifetime


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_absurd_limits_are_refused(wrong: float) -> None:
    with pytest.raises(PrivacyError, match="expected a finite number above 0"):
        replace(LIMITS, epsilon_lifetime=wrong)
    with pytest.raises(PrivacyError, match="records per patient"):
        charged_events([EVENT], unit=PrivacyUnit.RECORD, records_per_patient=0)
