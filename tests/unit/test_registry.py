"""The registry on both databases: one suite, run on each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from common.errors import RunError
from server.database import open_engine
from server.migrations import MIGRATIONS, NEWEST, migrate
from server.pki import Issued
from server.registry import (
    METADATA,
    AnswerRow,
    Hospital,
    JoinCodeRow,
    Registry,
    StudyRow,
)
from server.tokens import find_token, make_token
from tests.unit.coordinator import START

_names = iter(range(1000))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    made: str = request.getfixturevalue("postgres")(f"t{next(_names)}")
    return made


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    registry = Registry.open(url)
    yield registry
    registry.close()


def a_hospital(name: str = "north") -> Hospital:
    return Hospital(
        name=name,
        identity=f"consilium-ed25519 {name}",
        public_key=f"key of {name}",
        node_id=None,
        enrolled_at=START,
        revoked_at=None,
    )


def issued(serial: str, key: str = "k") -> Issued:
    return Issued(
        serial=serial, not_after=START.replace(year=2031), certificate="c", public_key=key
    )


def add(registry: Registry, name: str, serial: str) -> None:
    registry.put_join_code(
        JoinCodeRow(name=name, secret_sha256="00", expires_at=START, used_at=None)
    )
    registry.add_hospital(a_hospital(name), issued(serial))


def a_study(name: str = "heart") -> StudyRow:
    return StudyRow(
        id=f"{name}-1",
        name=name,
        digest=name,
        toml="t",
        state="offered",
        submitted_at=START,
        offer="{}",
        run_id=None,
        attempts=0,
        next_attempt_at=None,
        last_error="",
        progress=0,
    )


def test_rows_come_back_as_they_went_in(registry: Registry) -> None:
    add(registry, "north", "aa")
    registry.set_node("north", 2**64 - 1, "another key")
    assert registry.hospitals() == [
        replace(a_hospital(), node_id=2**64 - 1, public_key="another key")
    ]
    registry.add_study(a_study())
    assert registry.study("heart-1") == registry.study_of("heart") == a_study()
    assert registry.change_study("heart-1", ["offered"], run_id=2**63, next_attempt_at=START)
    assert registry.studies() == [replace(a_study(), run_id=2**63, next_attempt_at=START)]
    answer = AnswerRow(study="heart-1", hospital="north", decision="refuse", json="{}", at=START)
    assert registry.put_answer(answer)
    assert registry.put_answer(replace(answer, decision="approve"))
    assert registry.answers("heart-1") == [replace(answer, decision="approve")]
    assert registry.hospital("nobody") is None


def test_what_must_be_unique_is(registry: Registry) -> None:
    add(registry, "north", "aa")
    with pytest.raises(RunError, match="enrolled already"):
        add(registry, "NORTH", "bb")
    with pytest.raises(RunError, match="unused"):
        registry.add_hospital(a_hospital("south"), issued("cc"))  # without a code
    registry.put_join_code(
        JoinCodeRow(name="south", secret_sha256="00", expires_at=START, used_at=None)
    )
    with pytest.raises(RunError, match="enrolled already"):
        registry.add_hospital(replace(a_hospital("south"), public_key="key of north"), issued("dd"))
    # All or nothing: the code is still there.
    code = registry.join_code("south")
    assert code is not None
    assert code.used_at is None
    registry.add_study(a_study())
    with pytest.raises(RunError, match="submitted already"):
        registry.add_study(replace(a_study(), id="other"))


def test_a_state_changes_only_from_the_expected_one(registry: Registry) -> None:
    add(registry, "north", "aa")
    registry.add_study(a_study())
    assert registry.change_study("heart-1", ["offered"], state="running")
    assert not registry.change_study("heart-1", ["offered"], state="stopped")
    late = AnswerRow(study="heart-1", hospital="north", decision="approve", json="{}", at=START)
    assert not registry.put_answer(late)
    assert registry.answers("heart-1") == []


def test_superseded_and_revoked_certificates(registry: Registry) -> None:
    add(registry, "north", "aa")
    for number, serial in enumerate(("bb", "cc"), 1):
        registry.add_certificate("north", issued(serial), START.replace(hour=number))
    assert registry.supersede("north", "bb", START) == ["aa"]
    assert [one.serial for one in registry.certificates("north")] == ["bb", "cc"]
    assert registry.supersede("north", "nonsense", START) == []
    assert registry.revoke_hospital("north", START)
    assert not registry.revoke_hospital("north", START)
    found = registry.revoked_certificates(START)
    assert sorted(one.serial for one in found) == ["aa", "bb", "cc"]
    assert registry.revoked_certificates(START.replace(year=2032)) == []  # expired by themselves


def test_tokens_are_kept_as_hashes(registry: Registry) -> None:
    token = make_token(registry, "anna", "operator", START)
    found = find_token(registry, token)
    assert found is not None
    assert (found.name, found.role) == ("anna", "operator")
    assert token not in repr(registry.tokens())
    assert find_token(registry, token + "x") is None
    assert registry.revoke_token("anna", START)
    assert find_token(registry, token) is None
    with pytest.raises(RunError, match="taken"):
        make_token(registry, "anna", "admin", START)


def test_events_come_newest_first_also_within_one_instant(registry: Registry) -> None:
    for number in range(20):
        registry.add_event(f"k{number}", "s", "a", START)
    assert [one.kind for one in registry.events(3)] == ["k19", "k18", "k17"]


def test_one_join_code_lets_one_hospital_in_at_a_time(registry: Registry) -> None:
    registry.put_join_code(
        JoinCodeRow(name="north", secret_sha256="00", expires_at=START, used_at=None)
    )
    outcomes: list[str] = []
    barrier = threading.Barrier(6)

    def rush(number: int) -> None:
        hospital = replace(a_hospital(), identity=f"i{number}", public_key=f"k{number}")
        barrier.wait()
        try:
            registry.add_hospital(hospital, issued(f"{number:x}"))
            outcomes.append("in")
        except RunError:
            outcomes.append("out")

    threads = [threading.Thread(target=rush, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(outcomes) == ["in"] + ["out"] * 5
    assert len(registry.hospitals()) == 1


def test_a_database_of_the_previous_version_becomes_current_with_its_rows(url: str) -> None:
    engine = open_engine(url)
    migrate(engine, up_to=1)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO hospitals (name, identity, public_key, serial, not_after, node_id,"
                " enrolled_at) VALUES ('north', 'i', 'k', 'aa', '2031-01-01 00:00:00+00:00', '7',"
                " '2030-01-01 00:00:00+00:00')"
            )
        )
        connection.execute(
            text(
                "INSERT INTO studies (id, name, digest, toml, state, submitted_at, offer)"
                " VALUES ('s', 's', 'd', 't', 'running', '2030-01-01 00:00:00+00:00', '{}')"
            )
        )
    engine.dispose()
    registry = Registry.open(url)
    (hospital,) = registry.hospitals()
    assert (hospital.node_id, hospital.enrolled_at) == (7, START)
    (certificate,) = registry.certificates("north")
    assert (certificate.serial, certificate.public_key) == ("aa", "k")
    assert certificate.not_after == START.replace(year=2031)
    (study,) = registry.studies()
    assert (study.state, study.progress, study.attempts) == ("running", 0, 0)
    registry.close()


def test_migrated_tables_are_the_ones_the_code_uses(url: str) -> None:
    engine = open_engine(url)
    migrate(engine)
    migrate(engine)  # nothing more to do
    found = inspect(engine)
    for table in METADATA.sorted_tables:
        columns = {one["name"]: one["nullable"] for one in found.get_columns(table.name)}
        assert columns == {one.name: bool(one.nullable) for one in table.columns}, table.name
    engine.dispose()


def test_a_step_and_its_record_are_committed_together(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(url)
    migrate(engine, up_to=1)
    broken = replace(MIGRATIONS[1], statements=(*MIGRATIONS[1].statements, "SELECT nonsense"))
    monkeypatch.setattr("server.migrations.MIGRATIONS", (MIGRATIONS[0], broken))
    with pytest.raises(Exception, match="nonsense"):
        migrate(engine)
    assert "certificates" not in inspect(engine).get_table_names()
    monkeypatch.undo()
    migrate(engine)
    with engine.connect() as connection:
        numbers = connection.execute(text("SELECT number FROM schema_versions")).scalars().all()
    assert sorted(numbers) == list(range(1, NEWEST + 1))
    engine.dispose()


def test_a_newer_database_is_refused(url: str) -> None:
    engine = open_engine(url)
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO schema_versions VALUES (:number, 'later')"), {"number": NEWEST + 1}
        )
    engine.dispose()
    with pytest.raises(RunError, match="newer release"):
        Registry.open(url)


def test_sqlite_is_durable_and_private(tmp_path: Path) -> None:
    registry = Registry.open(f"sqlite:///{tmp_path / 'store.db'}")
    with registry._engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous")
        }
        assert found == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2}
        for path in tmp_path.iterdir():
            assert path.stat().st_mode & 0o077 == 0, path
    registry.close()


def test_an_unreachable_database_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be opened"):
        Registry.open(f"sqlite:///{tmp_path / 'nowhere' / 'store.db'}")
