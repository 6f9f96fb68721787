"""Databases, read and never written: a table, a view, or a query of the hospital's own.

Every identifier is quoted and every value bound; the transaction itself is read-only, so that not
even a query with a side effect can change anything. What the coordinator sends never comes here.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from sqlalchemy import (
    Connection,
    Engine,
    FromClause,
    column,
    create_engine,
    inspect,
    select,
    table,
    text,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql.elements import quoted_name

from client.sources.specs import Database, SqlSource
from common.errors import DataError, nearest
from common.readers import Chunk, chunk_rows


def quoted(name: str) -> quoted_name:
    """An identifier that is always quoted: it can name a column and nothing else."""
    return quoted_name(name, quote=True)


def open_database(spec: Database, folder: Path) -> Engine:
    """An engine whose transactions cannot write; raises DataError when its driver is missing."""
    url = spec.resolved(folder)
    if url.drivername == "sqlite":
        path = folder / (url.database or "")
        if not path.is_file():
            raise DataError(f"{path}: no such database file; a path is relative to hospital.toml")

        def connect() -> sqlite3.Connection:
            opened = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)
            opened.execute("PRAGMA query_only = ON")
            return opened

        return create_engine("sqlite://", creator=connect)
    try:
        return create_engine(
            url,
            isolation_level="REPEATABLE READ",
            connect_args={"options": "-c default_transaction_read_only=on", "connect_timeout": 30},
        )
    except ImportError:
        raise DataError(
            "a PostgreSQL source needs psycopg, which is not installed; run "
            "`pip install 'consilium[postgres]'`"
        ) from None


@contextmanager
def reading(engine: Engine, origin: str) -> Iterator[Connection]:
    """One read-only transaction; whatever the database says becomes one line."""
    options = {"postgresql_readonly": True} if engine.dialect.name == "postgresql" else {}
    try:
        with engine.connect().execution_options(**options) as connection:
            yield connection
    except SQLAlchemyError as error:
        reason = (str(getattr(error, "orig", None) or error).splitlines() or [""])[0]
        raise DataError(
            f"{origin}: the database says {type(error).__name__}: {_without(reason, engine)}; "
            f"check url, table names and the account's rights to read"
        ) from None
    finally:
        engine.dispose()


def rows_in_chunks(connection: Connection, statement: Any, names: Sequence[str]) -> Iterator[Chunk]:
    """The statement's rows, fetched in parts by a cursor at the server."""
    streamed = connection.execution_options(stream_results=True, yield_per=chunk_rows(len(names)))
    for part in streamed.execute(statement).partitions():
        cells = list(zip(*part, strict=True))
        yield {name: _array(values) for name, values in zip(names, cells, strict=True)}


class SqlTable:
    """Rows of a table, a view or the hospital's query, always in the same order."""

    patient = ""

    def __init__(self, spec: SqlSource, folder: Path) -> None:
        self._spec, self._folder = spec, folder
        self.origin = spec.table or "query"
        with reading(open_database(spec, folder), self.origin) as connection:
            self.columns = self._names(connection)
        for name in spec.key:
            # SQLite takes an unknown name in quotation marks for a text.
            if name not in self.columns:
                raise DataError(
                    f"{self.origin}: key: column {name!r} not found; {nearest(name, self.columns)}"
                )

    def chunks(self, wanted: Sequence[str]) -> Iterator[Chunk]:
        """Cells in the database's types; missing ones as None."""
        # Without an order a database may give another one each time, and patients would change
        # between training and testing.
        order = self._spec.key or tuple(wanted)
        statement: Any = (
            select(*(column(quoted(name)) for name in wanted))
            .select_from(self._relation())
            .order_by(*(column(quoted(name)) for name in order))
        )
        with reading(open_database(self._spec, self._folder), self.origin) as connection:
            yield from rows_in_chunks(connection, statement, wanted)

    def notes(self) -> tuple[str, ...]:
        """Nothing: every row is read."""
        return ()

    def _names(self, connection: Connection) -> tuple[str, ...]:
        if self._spec.query:
            nothing: Any = select(text("*")).select_from(self._relation()).limit(0)
            return tuple(connection.execute(nothing).keys())
        name, schema = _split(self._spec.table)
        return tuple(str(one["name"]) for one in inspect(connection).get_columns(name, schema))

    def _relation(self) -> FromClause | Any:
        if self._spec.query:
            # A colon would be read as the start of a parameter.
            words = re.sub(r":", r"\\:", self._spec.query.strip().rstrip(";"))
            return text(f"({words}\n) AS hospital_query")
        name, schema = _split(self._spec.table)
        return table(quoted(name), schema=quoted(schema) if schema else None)


def _split(name: str) -> tuple[str, str | None]:
    schema, _, bare = name.rpartition(".")
    return bare, schema or None


def _array(values: Sequence[Any]) -> Any:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _without(reason: str, engine: Engine) -> str:
    password = engine.url.password
    return reason.replace(str(password), "***") if password else reason
