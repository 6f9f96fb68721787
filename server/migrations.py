"""The registry's schema, as numbered steps; each is committed together with its record.

A step never changes once released: a database of any age becomes current by the steps it lacks.
The statements run on SQLite and PostgreSQL alike. Node and run ids are text, because Flower's are
unsigned 64-bit numbers and neither database has these.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine, inspect, text

from common.errors import RunError

_TIME = "TIMESTAMP WITH TIME ZONE"


@dataclass(frozen=True)
class Migration:
    """One step: its number, what it is for, and its statements in order."""

    number: int
    purpose: str
    statements: tuple[str, ...]


MIGRATIONS = (
    Migration(
        1,
        "hospitals, studies, answers, tokens and events",
        (
            f"""CREATE TABLE hospitals (
                name VARCHAR(64) NOT NULL PRIMARY KEY,
                identity VARCHAR(100) NOT NULL UNIQUE,
                public_key TEXT NOT NULL UNIQUE,
                serial VARCHAR(64),
                not_after {_TIME},
                node_id VARCHAR(20),
                enrolled_at {_TIME} NOT NULL,
                revoked_at {_TIME})""",
            # nginx compares names without regard to case.
            "CREATE UNIQUE INDEX hospitals_one_case ON hospitals (lower(name))",
            f"""CREATE TABLE join_codes (
                name VARCHAR(64) NOT NULL PRIMARY KEY,
                secret_sha256 VARCHAR(64) NOT NULL,
                expires_at {_TIME} NOT NULL,
                used_at {_TIME})""",
            f"""CREATE TABLE studies (
                id VARCHAR(100) NOT NULL PRIMARY KEY,
                name VARCHAR(64) NOT NULL,
                digest VARCHAR(64) NOT NULL UNIQUE,
                toml TEXT NOT NULL,
                state VARCHAR(16) NOT NULL,
                submitted_at {_TIME} NOT NULL,
                offer TEXT NOT NULL,
                run_id VARCHAR(20),
                attempts INTEGER NOT NULL DEFAULT 0,
                next_attempt_at {_TIME},
                last_error TEXT NOT NULL DEFAULT '')""",
            f"""CREATE TABLE answers (
                study VARCHAR(100) NOT NULL REFERENCES studies (id),
                hospital VARCHAR(64) NOT NULL REFERENCES hospitals (name),
                decision VARCHAR(16) NOT NULL,
                json TEXT NOT NULL,
                at {_TIME} NOT NULL,
                PRIMARY KEY (study, hospital))""",
            f"""CREATE TABLE tokens (
                name VARCHAR(64) NOT NULL PRIMARY KEY,
                role VARCHAR(16) NOT NULL,
                sha256 VARCHAR(64) NOT NULL UNIQUE,
                created_at {_TIME} NOT NULL,
                revoked_at {_TIME})""",
            f"""CREATE TABLE events (
                seq VARCHAR(32) NOT NULL PRIMARY KEY,
                time {_TIME} NOT NULL,
                kind VARCHAR(40) NOT NULL,
                subject VARCHAR(100) NOT NULL,
                actor VARCHAR(100) NOT NULL)""",
        ),
    ),
    Migration(
        2,
        "every certificate that was issued, so that replaced ones can be revoked; "
        "progress of a study, so that an attempt that got further starts the waits anew",
        (
            f"""CREATE TABLE certificates (
                serial VARCHAR(64) NOT NULL PRIMARY KEY,
                hospital VARCHAR(64) NOT NULL REFERENCES hospitals (name),
                public_key TEXT NOT NULL,
                pem TEXT NOT NULL,
                issued_at {_TIME} NOT NULL,
                not_after {_TIME} NOT NULL,
                revoked_at {_TIME})""",
            """INSERT INTO certificates
                (serial, hospital, public_key, pem, issued_at, not_after, revoked_at)
                SELECT serial, name, public_key, '', enrolled_at, not_after, revoked_at
                FROM hospitals WHERE serial IS NOT NULL""",
            "ALTER TABLE hospitals DROP COLUMN serial",
            "ALTER TABLE hospitals DROP COLUMN not_after",
            "ALTER TABLE studies ADD COLUMN progress INTEGER NOT NULL DEFAULT 0",
        ),
    ),
)
NEWEST = MIGRATIONS[-1].number


def migrate(engine: Engine, *, up_to: int = NEWEST) -> None:
    """Bring the schema to ``up_to``. Raises RunError for a database newer than this code."""
    with engine.begin() as connection:
        if not inspect(connection).has_table("schema_versions"):
            connection.execute(
                text("CREATE TABLE schema_versions (number INTEGER PRIMARY KEY, purpose TEXT)")
            )
        found = connection.execute(text("SELECT max(number) FROM schema_versions")).scalar() or 0
    if found > NEWEST:
        raise RunError(
            f"database: expected a schema up to version {NEWEST}, found version {found}: a newer "
            f"release has used it; install that release"
        )
    for step in MIGRATIONS[found:up_to]:
        with engine.begin() as connection:
            for statement in step.statements:
                connection.execute(text(statement))
            record = text("INSERT INTO schema_versions VALUES (:number, :purpose)")
            connection.execute(record, {"number": step.number, "purpose": step.purpose})
