"""Tables, queries and OMOP on both databases: one suite, run on each; nothing is ever written."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from sqlalchemy import create_engine, text

from client.services import Wiring, outer_services, runner_service
from client.sources.databases import SqlTable, open_database, reading
from client.sources.reading import read_public
from client.sources.specs import OmopSource, SecretReference, SqlSource
from common.dictionary import Dictionary
from common.errors import DataError, SecretError, StudyError
from common.sources import CsvSource
from common.strict import parse_strict
from common.study import parse_study
from common.tables import Table

LAB = Dictionary.model_validate_json(
    """{"patient_id": "pid", "label": {"name": "ill", "classes": [[0], [1]]},
        "columns": [
          {"name": "age", "kind": "numeric", "range": [0, 120], "unit": "years"},
          {"name": "chol", "kind": "numeric", "range": [80, 610], "unit": "mg/dL"},
          {"name": "sex", "kind": "binary", "categories": ["f", "m"]}]}"""
)
ROWS = [
    (2, "B", date(1950, 5, 1), date(2020, 5, 1), 210.5, "m", 1),
    (1, "A", date(1960, 1, 1), date(2020, 1, 1), None, "f", 0),
    (1, "A", date(1960, 1, 1), date(2021, 1, 1), 180.0, "f", 1),
]
DERIVE = {"age": {"start": "born", "end": "Seen On", "unit": "years"}}

Url = Callable[[], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with one odd table, a view on it and the OMOP tables."""
    if request.param == "sqlite":
        found = f"sqlite:///{tmp_path / 'hospital.db'}"
    else:
        name = f"sources{len(str(tmp_path))}{tmp_path.name[-30:]}".lower()
        found = request.getfixturevalue("postgres")(name)
    engine = create_engine(found)
    with engine.begin() as connection:
        connection.execute(
            text(
                'CREATE TABLE "Lab; Results" (pid integer, name text, born date, "Seen On" date, '
                '"CHOL ""total""" float, sex text, ill integer)'
            )
        )
        for pid, name, born, seen, chol, sex, ill in ROWS:
            connection.execute(
                text('INSERT INTO "Lab; Results" VALUES (:p, :n, :b, :s, :c, :x, :i)'),
                {
                    "p": pid,
                    "n": name,
                    "b": born.isoformat(),
                    "s": seen.isoformat(),
                    "c": chol,
                    "x": sex,
                    "i": ill,
                },
            )
        connection.execute(text('CREATE VIEW lab AS SELECT * FROM "Lab; Results"'))
        fill_omop(connection)
    engine.dispose()
    return found


def sql(url: str, **settings: Any) -> SqlSource:
    return parse_strict(
        SqlSource,
        {
            "kind": "sql",
            "url": url,
            "rename": {"chol": 'CHOL "total"'},
            "derive": DERIVE,
            **settings,
        },
        origin="hospital.toml",
    )


def read(source: Any, folder: Path, dictionary: Dictionary = LAB) -> Table:
    return read_public(source, dictionary, folder)


@pytest.mark.parametrize(
    "where",
    [
        {"table": "Lab; Results"},
        {"table": "lab"},
        {"query": "SELECT * FROM lab -- '\nWHERE ill IN (0, 1) AND sex <> ':x'; "},
    ],
)
def test_tables_views_and_queries_read_alike(url: str, where: Any, tmp_path: Path) -> None:
    table = read(sql(url, **where), tmp_path)
    # In one order at every reading, whatever order they were written in: by age first.
    by_patient = sorted(zip(table.patients, table.labels, strict=True))
    assert by_patient == [("1", 0), ("1", 1), ("2", 1)]
    again = read(sql(url, **where), tmp_path)
    assert again.patients.tolist() == table.patients.tolist()
    two = table.take(np.flatnonzero(table.patients == "2"))
    np.testing.assert_allclose(two.values["age"], [70], atol=0.01)
    assert two.values["chol"].tolist() == [210.5]
    assert (table.report.columns[1].missing, table.report.columns[1].unmapped) == (1, 0)
    assert "name" in table.report.deidentified[0]


def test_a_key_orders_rows(url: str, tmp_path: Path) -> None:
    table = read(sql(url, table="lab", key=["pid", "Seen On"]), tmp_path)
    assert table.patients.tolist() == ["1", "1", "2"]
    assert table.labels.tolist() == [0, 1, 1]


def test_a_database_cannot_be_written(url: str, tmp_path: Path) -> None:
    source = sql(url, table="lab")
    for statement in ('DELETE FROM "Lab; Results"', "CREATE TABLE x (a integer)"):
        with (
            pytest.raises(DataError, match="read-only|readonly"),
            reading(open_database(source, tmp_path), "x") as connection,
        ):
            connection.execute(text(statement))
    with pytest.raises(DataError, match="the database says"):
        read(sql(url, query='DELETE FROM "Lab; Results" RETURNING *'), tmp_path)
    assert len(read(source, tmp_path)) == 3


def test_what_is_not_there_is_one_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'CHOL' not found; choose one of: CHOL"):
        read(sql(url, table="lab", rename={"chol": "CHOL"}), tmp_path)
    with pytest.raises(DataError, match="labb: the database says NoSuchTable") as caught:
        read(sql(url, table="labb"), tmp_path)
    assert "\n" not in str(caught.value)


def test_an_identifier_from_a_file_is_never_words_of_sql(url: str, tmp_path: Path) -> None:
    """A name with everything that could end a quotation names a column, or nothing."""
    evil = 'x" FROM lab; DROP TABLE "Lab; Results"; --'
    with pytest.raises(DataError, match="not found"):
        read(sql(url, table="lab", rename={"chol": evil}), tmp_path)
    with pytest.raises(DataError, match="key: column .* not found"):
        read(sql(url, table="lab", key=[evil]), tmp_path)
    with pytest.raises(DataError, match="the database says"):
        read(sql(url, table=evil), tmp_path)
    assert len(read(sql(url, table="Lab; Results"), tmp_path)) == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "postgresql+psycopg://me:secret@db/x", "table": "t"}, "password in clear text"),
        ({"url": "postgresql+psycopg://me@db/x?password=secret", "table": "t"}, "in clear text"),
        ({"url": "mysql://me@db/x", "table": "t"}, "found 'mysql'"),
        ({"url": "nonsense", "table": "t"}, "expected sqlite:///FILE"),
        ({"url": "sqlite:///x", "table": "t", "query": "SELECT 1"}, "give either table"),
        ({"url": "sqlite:///x"}, "give either table"),
        (
            {"url": "sqlite:///x", "table": "t", "password": {"env": "A", "file": "b"}},
            "give either env",
        ),
    ],
)
def test_settings_are_refused_without_repeating_a_secret(settings: Any, says: str) -> None:
    with pytest.raises(StudyError, match=says) as caught:
        parse_strict(SqlSource, {"kind": "sql", **settings}, origin="hospital.toml")
    assert "secret@" not in str(caught.value)
    assert "=secret" not in str(caught.value)


def test_passwords_come_from_the_environment_or_a_private_file(tmp_path: Path) -> None:
    assert SecretReference(env="DB").read(tmp_path, {"DB": "s3"}) == "s3"
    with pytest.raises(SecretError, match="DB is not set"):
        SecretReference(env="DB").read(tmp_path, {})
    path = tmp_path / "db.secret"
    path.write_text("s3\n")
    path.chmod(0o640)
    with pytest.raises(SecretError, match="expected mode 600"):
        SecretReference(file="db.secret").read(tmp_path)
    # A service manager hands it over in a folder of this service's own.
    handed = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    path.chmod(0o440)
    assert SecretReference(file=str(path)).read(tmp_path / "elsewhere", handed) == "s3"
    path.chmod(0o600)
    source = parse_strict(
        SqlSource,
        {
            "kind": "sql",
            "url": "postgresql+psycopg://me@127.0.0.1:1/x",
            "table": "t",
            "password": {"file": "db.secret"},
        },
        origin="x",
    )
    assert source.resolved(tmp_path).password == "s3"
    pytest.importorskip("psycopg", reason="psycopg is not installed (consilium[postgres])")
    with pytest.raises(DataError, match="the database says OperationalError") as caught:
        read(source, tmp_path)
    assert "s3" not in str(caught.value)


def test_only_the_runner_knows_a_databases_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the tunnel to the outside nor Flower's SuperNode has business with records."""
    monkeypatch.setenv("WARD_PASSWORD", "s3")
    monkeypatch.setenv("OTHER_PASSWORD", "s4")
    database = {"kind": "sql", "url": "postgresql+psycopg://me@db/x", "table": "t"}
    settings = {
        "name": "north",
        "declared_patients": 10,
        "source": database | {"password": {"env": "WARD_PASSWORD"}},
        "sources": {"heart": database | {"password": {"env": "OTHER_PASSWORD"}}},
    }
    (tmp_path / "hospital.toml").write_text(tomli_w.dumps(settings))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        wiring = Wiring(folder=tmp_path, tunnel=listening, node_key=0, runtime_port=1, drain_s=1.0)
        for service in outer_services(wiring, lambda: None):
            assert not {"s3", "s4"} & set(service.environ.values())
        assert runner_service(wiring).environ["WARD_PASSWORD"] == "s3"


def test_rows_come_in_parts(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(sql(url, table="lab"), tmp_path)
    monkeypatch.setattr("client.sources.databases.chunk_rows", lambda _: 1)
    source = SqlTable(sql(url, table="lab"), tmp_path)
    assert [len(chunk["pid"]) for chunk in source.chunks(["pid", "ill"])] == [1, 1, 1]
    parts = read(sql(url, table="lab"), tmp_path)
    assert parts.patients.tolist() == whole.patients.tolist()
    np.testing.assert_array_equal(parts.values["chol"], whole.values["chol"])


def test_a_study_file_cannot_name_a_database(tree: dict[str, Any]) -> None:
    """Else the coordinator could have queries asked at a hospital."""
    for source in (
        {"kind": "sql", "url": "sqlite:///x", "query": "SELECT 1"},
        {"kind": "omop", "url": "sqlite:///x"},
    ):
        tree["simulation"] = {"source": source, "hospitals": 3}
        with pytest.raises(StudyError, match=r"source.kind: expected one of csv"):
            parse_study(tree, origin="study.toml")


def test_a_missing_file_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such database file"):
        read(sql("sqlite:///absent.db", table="lab"), tmp_path)
    assert not (tmp_path / "absent.db").exists()


# OMOP

WARD = Dictionary.model_validate_json(
    """{"label": {"name": "back", "classes": [[0], [1]]},
        "columns": [
          {"name": "age", "kind": "numeric", "range": [0, 120], "unit": "years"},
          {"name": "sex", "kind": "binary", "categories": ["female", "male"]},
          {"name": "visit", "kind": "categorical", "categories": ["IMP", "AMB", "EMER"]},
          {"name": "weight", "kind": "numeric", "range": [1, 300], "unit": "kg"},
          {"name": "diabetes", "kind": "binary", "categories": [0, 1]}]}"""
)


def fill_omop(connection: Any) -> None:
    for statement in (
        "CREATE TABLE person (person_id integer, gender_concept_id integer, year_of_birth integer,"
        " month_of_birth integer, day_of_birth integer, person_source_value text)",
        "CREATE TABLE visit_occurrence (visit_occurrence_id integer, person_id integer,"
        " visit_concept_id integer, visit_start_date date, visit_end_date date)",
        "CREATE TABLE measurement (measurement_id integer, person_id integer,"
        " measurement_concept_id integer, measurement_date date, value_as_number numeric(10, 3),"
        " value_as_concept_id integer, unit_concept_id integer, unit_source_value text)",
        "CREATE TABLE condition_occurrence (condition_occurrence_id integer, person_id integer,"
        " condition_concept_id integer, condition_start_date date)",
        "CREATE TABLE concept (concept_id integer, concept_code text)",
        "CREATE TABLE concept_ancestor (ancestor_concept_id integer,"
        " descendant_concept_id integer)",
        "CREATE TABLE death (person_id integer, death_date date)",
        "INSERT INTO concept VALUES (9529, 'kg'), (8739, '[lb_us]')",
        "INSERT INTO concept_ancestor VALUES (201820, 201826)",
    ):
        connection.execute(text(statement))
    for person in range(1, 1202):
        connection.execute(
            text("INSERT INTO person VALUES (:id, :sex, :year, NULL, NULL, 'CANARY')"),
            {"id": person, "sex": 8507 if person % 2 else 8532, "year": 1950 + person % 40},
        )
        connection.execute(
            text(
                "INSERT INTO visit_occurrence VALUES (:v, :id, :kind, '2020-01-01', '2020-01-05')"
            ),
            {"v": person * 10, "id": person, "kind": 9201 if person % 3 else 9202},
        )
    for statement in (
        "INSERT INTO visit_occurrence VALUES (11, 1, 9203, '2020-02-01', NULL)",
        "INSERT INTO measurement VALUES (1, 1, 3025315, '2020-01-02', 80.5, NULL, 9529, NULL)",
        "INSERT INTO measurement VALUES (2, 1, 3025315, '2020-02-01', 82, NULL, NULL, 'kg')",
        "INSERT INTO measurement VALUES (3, 2, 3025315, '2020-01-02', 99, NULL, 8739, NULL)",
        "INSERT INTO measurement VALUES (4, 2, 999, '2020-01-02', 1, NULL, 9529, NULL)",
        "INSERT INTO measurement VALUES (5, 1201, 3025315, '2019-12-31', 70, NULL, 9529, NULL)",
        "INSERT INTO condition_occurrence VALUES (1, 1, 201826, '2020-01-03')",
        "INSERT INTO condition_occurrence VALUES (2, 2, 201826, '2020-01-20')",
    ):
        connection.execute(text(statement))


def omop(url: str, **settings: Any) -> OmopSource:
    tree = {
        "kind": "omop",
        "url": url,
        "derive": {"age": {"start": "birth_date", "end": "start", "unit": "years"}},
        "columns": {
            "weight": {"observation": ["3025315"], "unit": "kg"},
            "diabetes": {"condition": ["201826"]},
            "back": {"condition": ["201826"], "when": "after", "within_days": 30},
        },
    }
    return parse_strict(OmopSource, tree | settings, origin="hospital.toml")


def test_omop_tables_become_rows(url: str, tmp_path: Path) -> None:
    table = read(omop(url), tmp_path, WARD)
    assert (table.report.rows, table.report.patients) == (1202, 1201)
    assert table.patients[:4].tolist() == ["1", "1", "2", "3"]
    assert table.patients[-1] == "1201"
    np.testing.assert_allclose(table.values["weight"][:3], [80.5, 82, np.nan])
    assert table.values["weight"][-1] == 70
    assert table.values["visit"][:4].tolist() == [0, 2, 0, 1]
    assert table.values["sex"][:4].tolist() == [1, 1, 0, 1]
    assert table.values["diabetes"][:3].tolist() == [1, 1, 0]
    assert table.labels[:3].tolist() == [0, 0, 1]
    np.testing.assert_allclose(table.values["age"][0], 68.5, atol=0.1)
    assert any("'[lb_us]'" in one for one in table.report.problems)
    assert "CANARY" not in str(table.report)


def test_a_diagnosis_stands_for_those_below_it(url: str, tmp_path: Path) -> None:
    columns = {
        "weight": {"observation": ["3025315"], "unit": "kg"},
        "diabetes": {"condition": ["201820"]},
        "back": {"condition": ["201826"], "when": "after"},
    }
    found = read(omop(url, columns=columns, descendants=True), tmp_path, WARD)
    assert found.values["diabetes"][:3].tolist() == [1, 1, 0]
    assert not read(omop(url, columns=columns), tmp_path, WARD).values["diabetes"].any()


def test_what_is_no_omop_database_is_said_so(url: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="expected concept ids, found 'E11'"):
        omop(url, columns={"x": {"condition": ["E11"]}})
    with pytest.raises(DataError, match="the database says|expected OMOP tables, found no"):
        read(omop(url, cdm_schema="elsewhere"), tmp_path, WARD)


def test_csv_and_database_give_one_table(url: str, tmp_path: Path) -> None:
    """The same rows, in the same order, from either."""
    lines = [f"{one[0]},{one[2]},{one[3]},{one[4] or ''},{one[5]},{one[6]}" for one in ROWS]
    order = [lines[1], lines[2], lines[0]]
    (tmp_path / "x.csv").write_text("\n".join(["pid,born,Seen On,chol,sex,ill", *order]) + "\n")
    text_source = CsvSource.model_validate_json(
        json.dumps({"kind": "csv", "path": "x.csv", "derive": DERIVE})
    )
    one = read(text_source, tmp_path)
    other = read(sql(url, table="lab", key=["pid", "Seen On"]), tmp_path)
    for name in one.values:
        np.testing.assert_array_equal(one.values[name], other.values[name])
    assert one.patients.tolist() == other.patients.tolist()
