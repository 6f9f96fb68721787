"""SQLAlchemy over SQLite or PostgreSQL: durable, and with times that know their zone."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, DateTime, Dialect, Engine, String, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.types import TypeDecorator

from common.errors import RunError

_READS = {"consilium_reads": True}


class Utc(TypeDecorator[datetime]):
    """A time in UTC; SQLite keeps no zone of its own."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """As UTC; a time without a zone is our bug."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("expected a time with a zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """With its zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Uint64(TypeDecorator[int]):
    """Flower's unsigned 64-bit ids, as text."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Its decimal digits."""
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """The number."""
        return None if value is None else int(value)


def open_engine(url: str) -> Engine:
    """An engine for ``url``. Raises RunError when the database cannot be reached."""
    try:
        engine = create_engine(url, pool_pre_ping=True)
        if engine.dialect.name == "sqlite":
            _make_private(engine)
            event.listen(engine, "connect", _durable)
            event.listen(engine, "begin", _begin)
        with engine.connect():
            pass
    except ImportError:
        raise RunError(
            "database: PostgreSQL needs its driver; install consilium[postgres]"
        ) from None
    except (SQLAlchemyError, OSError) as error:
        cause = str(getattr(error, "orig", error)).splitlines() or [type(error).__name__]
        raise RunError(f"database: cannot be opened ({cause[0]})") from None
    return engine


def reading(engine: Engine) -> Engine:
    """The same database for transactions that only read: they never wait for a writer."""
    return engine.execution_options(**_READS)


def _make_private(engine: Engine) -> None:
    # SQLite gives its companions (-wal, -shm) the mode of the main file.
    if engine.url.database:
        Path(engine.url.database).touch(mode=0o600)


def _durable(connection: Any, _record: object) -> None:
    # Transactions are opened by ``_begin``; the driver's own habits leave DDL outside of them.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # A transaction that will write takes its lock at once: no deadlock between two that read first.
    mode = "" if connection.get_execution_options().get("consilium_reads") else " IMMEDIATE"
    connection.exec_driver_sql(f"BEGIN{mode}")
