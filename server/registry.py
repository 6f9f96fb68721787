"""Who takes part and in what: hospitals, certificates, studies, answers, tokens, events.

Plain rows in a database; no rule lives here except those a second process could break at the same
moment: what must be unique, and what changes only from an expected state.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.engine import RowMapping
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql import Executable, Select

from common.errors import RunError
from server.database import Uint64, Utc, open_engine, reading
from server.migrations import migrate
from server.pki import Issued, Revoked

StudyState = Literal["offered", "running", "finished", "failed", "stopped"]
Role = Literal["viewer", "operator", "admin"]

METADATA = MetaData()
_hospitals = Table(
    "hospitals",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("identity", String(100), nullable=False, unique=True),
    Column("public_key", Text, nullable=False, unique=True),
    Column("node_id", Uint64),
    Column("enrolled_at", Utc, nullable=False),
    Column("revoked_at", Utc),
)
_certificates = Table(
    "certificates",
    METADATA,
    Column("serial", String(64), primary_key=True),
    Column("hospital", String(64), ForeignKey("hospitals.name"), nullable=False),
    Column("public_key", Text, nullable=False),
    Column("pem", Text, nullable=False),
    Column("issued_at", Utc, nullable=False),
    Column("not_after", Utc, nullable=False),
    Column("revoked_at", Utc),
)
_join_codes = Table(
    "join_codes",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("expires_at", Utc, nullable=False),
    Column("used_at", Utc),
)
_studies = Table(
    "studies",
    METADATA,
    Column("id", String(100), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("toml", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("submitted_at", Utc, nullable=False),
    Column("offer", Text, nullable=False),
    Column("run_id", Uint64),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", Utc),
    Column("last_error", Text, nullable=False, default=""),
    Column("progress", Integer, nullable=False, default=0),
)
_answers = Table(
    "answers",
    METADATA,
    Column("study", String(100), ForeignKey("studies.id"), primary_key=True),
    Column("hospital", String(64), ForeignKey("hospitals.name"), primary_key=True),
    Column("decision", String(16), nullable=False),
    Column("json", Text, nullable=False),
    Column("at", Utc, nullable=False),
)
_tokens = Table(
    "tokens",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("created_at", Utc, nullable=False),
    Column("revoked_at", Utc),
)
_events = Table(
    "events",
    METADATA,
    Column("seq", String(32), primary_key=True),
    Column("time", Utc, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("subject", String(100), nullable=False),
    Column("actor", String(100), nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """A hospital that joined. ``node_id``: None until Flower knows it."""

    name: str
    identity: str
    public_key: str
    node_id: int | None
    enrolled_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate that was issued to a hospital."""

    serial: str
    hospital: str
    public_key: str
    pem: str
    issued_at: datetime
    not_after: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class JoinCodeRow:
    """A hospital's invitation."""

    name: str
    secret_sha256: str
    expires_at: datetime
    used_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """A study. ``offer``: the signed offer as JSON; ``attempts``: failures without progress."""

    id: str
    name: str
    digest: str
    toml: str
    state: StudyState
    submitted_at: datetime
    offer: str
    run_id: int | None
    attempts: int
    next_attempt_at: datetime | None
    last_error: str
    progress: int


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """A hospital's word on a study; ``json``: the signed answer."""

    study: str
    hospital: str
    decision: Literal["approve", "refuse"]
    json: str
    at: datetime


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Somebody who may use the admin API; of the token itself only a hash."""

    name: str
    role: Role
    sha256: str
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """What happened, for people to read; the signed audit log is the proof."""

    seq: str
    time: datetime
    kind: str
    subject: str
    actor: str


Row = TypeVar("Row")


class Registry:
    """An open registry. Its methods may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        """``engine``: of an up-to-date database; see ``open``."""
        self._engine = engine
        self._reads = reading(engine)
        self._events_written = itertools.count()

    @classmethod
    def open(cls, url: str) -> Registry:
        """Open or create the database at ``url`` and bring it up to date. Raises RunError."""
        engine = open_engine(url)
        try:
            migrate(engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    # Hospitals

    def hospitals(self) -> list[Hospital]:
        """All that ever joined, by name."""
        return self._all(Hospital, select(_hospitals).order_by(_hospitals.c.name))

    def hospital(self, name: str) -> Hospital | None:
        """The hospital ``name``, written exactly so."""
        return self._one(Hospital, select(_hospitals).where(_hospitals.c.name == name))

    def add_hospital(self, hospital: Hospital, first: Issued) -> None:
        """Add it with its certificate and use its join code up, all or nothing.

        Raises RunError when name or identity is taken, or the code was used at the same moment.
        """
        try:
            with self._engine.begin() as connection:
                _use_code(connection, hospital.name, hospital.enrolled_at)
                connection.execute(insert(_hospitals).values(**vars(hospital)))
                connection.execute(
                    insert(_certificates).values(
                        _certificate(hospital.name, first, hospital.enrolled_at)
                    )
                )
        except IntegrityError:
            raise RunError(
                f"hospital {hospital.name!r}: its name, identity or key is enrolled already; "
                f"use another name, or a new `consilium hospital init`"
            ) from None

    def readmit_hospital(self, name: str, issued: Issued, at: datetime) -> None:
        """Give a hospital that is known a new certificate and use its join code up."""
        with self._engine.begin() as connection:
            _use_code(connection, name, at)
            connection.execute(insert(_certificates).values(_certificate(name, issued, at)))

    def set_node(self, name: str, node_id: int, public_key: str) -> None:
        """Record under which node and key Flower knows the hospital."""
        self._write(
            update(_hospitals)
            .where(_hospitals.c.name == name)
            .values(node_id=node_id, public_key=public_key)
        )

    def revoke_hospital(self, name: str, at: datetime) -> bool:
        """Shut it out with all its certificates; False when that was done before."""
        with self._engine.begin() as connection:
            changed = connection.execute(
                update(_hospitals)
                .where(_hospitals.c.name == name, _hospitals.c.revoked_at.is_(None))
                .values(revoked_at=at)
            ).rowcount
            connection.execute(
                update(_certificates)
                .where(_certificates.c.hospital == name, _certificates.c.revoked_at.is_(None))
                .values(revoked_at=at)
            )
        return bool(changed)

    # Certificates

    def key_owner(self, public_key: str) -> str | None:
        """Which hospital ever had a certificate for this key."""
        rows = self._rows(
            select(_certificates.c.hospital).where(_certificates.c.public_key == public_key)
        )
        return str(rows[0]["hospital"]) if rows else None

    def add_certificate(self, hospital: str, issued: Issued, at: datetime) -> None:
        """Record a renewed certificate."""
        self._write(insert(_certificates).values(_certificate(hospital, issued, at)))

    def certificates(self, hospital: str) -> list[Certificate]:
        """The hospital's certificates that are not revoked, the newest last."""
        return self._all(
            Certificate,
            select(_certificates)
            .where(_certificates.c.hospital == hospital, _certificates.c.revoked_at.is_(None))
            .order_by(_certificates.c.issued_at, _certificates.c.not_after),
        )

    def supersede(self, hospital: str, kept: str, at: datetime) -> list[str]:
        """Revoke the certificates issued before ``kept``; their serials."""
        older = [one.serial for one in self.certificates(hospital)]
        older = older[: older.index(kept)] if kept in older else []
        if older:
            self._write(
                update(_certificates).where(_certificates.c.serial.in_(older)).values(revoked_at=at)
            )
        return older

    def revoked_certificates(self, now: datetime) -> list[Revoked]:
        """All revoked certificates that would otherwise still count."""
        rows = self._rows(
            select(_certificates.c.serial, _certificates.c.revoked_at).where(
                _certificates.c.revoked_at.is_not(None), _certificates.c.not_after > now
            )
        )
        return [Revoked(serial=row["serial"], at=row["revoked_at"]) for row in rows]

    # Join codes

    def put_join_code(self, code: JoinCodeRow) -> None:
        """Keep a code, in place of an older one for the name."""
        with self._engine.begin() as connection:
            connection.execute(delete(_join_codes).where(_join_codes.c.name == code.name))
            connection.execute(insert(_join_codes).values(**vars(code)))

    def join_code(self, name: str) -> JoinCodeRow | None:
        """The newest code made for ``name``."""
        return self._one(JoinCodeRow, select(_join_codes).where(_join_codes.c.name == name))

    def join_codes(self) -> list[JoinCodeRow]:
        """All codes, by name."""
        return self._all(JoinCodeRow, select(_join_codes).order_by(_join_codes.c.name))

    # Studies

    def studies(self) -> list[StudyRow]:
        """All studies, the newest first."""
        return self._all(
            StudyRow, select(_studies).order_by(_studies.c.submitted_at.desc(), _studies.c.id)
        )

    def study(self, study_id: str) -> StudyRow | None:
        """The study with this id."""
        return self._one(StudyRow, select(_studies).where(_studies.c.id == study_id))

    def study_of(self, digest: str) -> StudyRow | None:
        """The study with this digest."""
        return self._one(StudyRow, select(_studies).where(_studies.c.digest == digest))

    def add_study(self, study: StudyRow) -> None:
        """Add a study; raises RunError when the same one was submitted before."""
        try:
            self._write(insert(_studies).values(**vars(study)))
        except IntegrityError:
            raise RunError(
                f"study {study.name}: the same study was submitted already; see "
                f"`consilium coordinator status`, or change its seed"
            ) from None

    def change_study(self, study_id: str, expected: Sequence[StudyState], **values: Any) -> bool:
        """Set columns of a study that is in one of the ``expected`` states; else False."""
        return bool(
            self._write(
                update(_studies)
                .where(_studies.c.id == study_id, _studies.c.state.in_(expected))
                .values(**values)
            )
        )

    # Answers

    def answers(self, study_id: str) -> list[AnswerRow]:
        """The answers to a study, by hospital."""
        return self._all(
            AnswerRow,
            select(_answers).where(_answers.c.study == study_id).order_by(_answers.c.hospital),
        )

    def put_answer(self, answer: AnswerRow) -> bool:
        """Keep an answer in place of an earlier one; False once the study is past its offer."""
        open_study = (
            select(_studies.c.id)
            .where(_studies.c.id == answer.study, _studies.c.state == "offered")
            .with_for_update()
        )
        with self._engine.begin() as connection:
            if connection.execute(open_study).first() is None:
                return False
            connection.execute(
                delete(_answers).where(
                    _answers.c.study == answer.study, _answers.c.hospital == answer.hospital
                )
            )
            connection.execute(insert(_answers).values(**vars(answer)))
        return True

    # Tokens

    def tokens(self) -> list[TokenRow]:
        """All tokens, by name."""
        return self._all(TokenRow, select(_tokens).order_by(_tokens.c.name))

    def add_token(self, token: TokenRow) -> None:
        """Add a token; raises RunError when its name is taken."""
        try:
            self._write(insert(_tokens).values(**vars(token)))
        except IntegrityError:
            raise RunError(f"token {token.name!r}: the name is taken; choose another") from None

    def revoke_token(self, name: str, at: datetime) -> bool:
        """Let a token count no longer; False when none such counts."""
        return bool(
            self._write(
                update(_tokens)
                .where(_tokens.c.name == name, _tokens.c.revoked_at.is_(None))
                .values(revoked_at=at)
            )
        )

    def remove_token(self, name: str) -> None:
        """Forget a token and its name altogether."""
        self._write(delete(_tokens).where(_tokens.c.name == name))

    # Events

    def add_event(self, kind: str, subject: str, actor: str, at: datetime) -> None:
        """Note what happened."""
        # In order of time, then of writing, also when a clock stands still.
        count = next(self._events_written) % 10**8
        seq = f"{int(at.timestamp() * 1e6):018d}-{count:08d}-{secrets.token_hex(2)}"
        self._write(
            insert(_events).values(seq=seq, time=at, kind=kind, subject=subject, actor=actor)
        )

    def events(self, newest: int) -> list[EventRow]:
        """The newest events, the latest first."""
        return self._all(EventRow, select(_events).order_by(_events.c.seq.desc()).limit(newest))

    def _rows(self, query: Select[Any]) -> Sequence[RowMapping]:
        with self._reads.connect() as connection:
            return connection.execute(query).mappings().all()

    def _all(self, kind: type[Row], query: Select[Any]) -> list[Row]:
        return [kind(**row) for row in self._rows(query)]

    def _one(self, kind: type[Row], query: Select[Any]) -> Row | None:
        found = self._all(kind, query)
        return found[0] if found else None

    def _write(self, statement: Executable) -> int:
        with self._engine.begin() as connection:
            return connection.execute(statement).rowcount


def _use_code(connection: Connection, name: str, at: datetime) -> None:
    claim = (
        update(_join_codes)
        .where(_join_codes.c.name == name, _join_codes.c.used_at.is_(None))
        .values(used_at=at)
    )
    if connection.execute(claim).rowcount != 1:
        raise RunError(f"join code of {name}: expected an unused one; ask for a new one")


def _certificate(hospital: str, issued: Issued, at: datetime) -> dict[str, Any]:
    return {
        "serial": issued.serial,
        "hospital": hospital,
        "public_key": issued.public_key,
        "pem": issued.certificate,
        "issued_at": at,
        "not_after": issued.not_after,
        "revoked_at": None,
    }
