"""What the admin interface says and takes, as its OpenAPI document describes it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from common.enrolment import HospitalName
from server.registry import Role, StudyState

TokenName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Out(BaseModel):
    """What is said."""

    model_config = ConfigDict(frozen=True)


class In(BaseModel):
    """What is taken: nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ErrorOut(Out):
    """Any error: one line with what was expected, what was found and what to do."""

    error: str


class HospitalOut(Out):
    """A hospital that joined."""

    name: str
    identity: str = Field(description="Fingerprint of its signing key, to compare by telephone.")
    enrolled_at: datetime
    revoked_at: datetime | None
    certificate_expires_at: datetime | None
    online: bool = Field(description="Whether it is connected to Flower right now.")


class InvitationOut(Out):
    """A hospital that was invited and has not joined."""

    name: str
    expires_at: datetime


class HospitalsOut(Out):
    """All hospitals, and all open invitations."""

    hospitals: list[HospitalOut]
    invited: list[InvitationOut]


class EnrollIn(In):
    """Whom to invite."""

    name: HospitalName


class EnrollOut(Out):
    """The code for one hospital, shown this once. Hand it over by a channel of its own."""

    name: str
    code: str
    expires_at: datetime


class RevokedOut(Out):
    """A hospital was shut out."""

    name: str
    stopped_studies: list[str] = Field(description="Studies left with too few hospitals.")


class SubmitIn(In):
    """A study file's text, and whom to ask; all enrolled hospitals if left out."""

    toml: Annotated[str, Field(min_length=1, max_length=1_000_000)]
    hospitals: list[HospitalName] | None = None


class StopIn(In):
    """Why, for the audit log."""

    reason: Annotated[str, Field(max_length=300)] = ""


class StudyOut(Out):
    """A study at a glance."""

    id: str
    name: str
    digest: str
    state: StudyState
    submitted_at: datetime
    trust: str
    epsilon: float | None = Field(description="What the study promises in all.")
    delta: float | None
    invited: list[str]
    approved: list[str]
    refused: list[str]
    pending: list[str]
    missing: str = Field(description="Why it cannot begin; empty when it can.")
    rounds_finished: int
    rounds_planned: int
    epsilon_spent: float | None = Field(description="After the last finished round.")
    failed_attempts: int = Field(description="Since the last finished round.")
    next_attempt_at: datetime | None
    last_error: str


class RoundOut(Out):
    """A finished round."""

    stage: str
    round: int
    hospitals: int = Field(description="How many took part.")
    epsilon: float | None = Field(description="Spent so far, all rounds together.")


class RoundsOut(Out):
    """All finished rounds, in order."""

    rounds: list[RoundOut]


class ResultsOut(Out):
    """What a finished study left."""

    id: str
    result: dict[str, Any]
    privacy: dict[str, Any]
    files: list[str]


class TokenIn(In):
    """A token to make."""

    name: TokenName
    role: Role = "viewer"


class TokenOut(Out):
    """A token; it is never shown again."""

    name: str
    role: Role
    created_at: datetime
    revoked_at: datetime | None


class NewTokenOut(Out):
    """A new token, shown this once."""

    name: str
    role: Role
    token: str


class TokensOut(Out):
    """All tokens."""

    tokens: list[TokenOut]


class StudiesOut(Out):
    """All studies, the newest first."""

    studies: list[StudyOut]


class EventOut(Out):
    """What happened; the signed audit log is the proof."""

    time: datetime
    kind: str
    subject: str
    actor: str


class EventsOut(Out):
    """The newest events, the latest first."""

    events: list[EventOut]


class StatusOut(Out):
    """The federation at a glance."""

    address: str
    fingerprint: str = Field(description="Of the coordinator's signing key.")
    ca_fingerprint: str
    version: str
    time: datetime
    hospitals: int
    online: int
    studies: dict[str, int]
    services: dict[str, Any] = Field(description="Processes, when supervised.")


class ServerCertificateOut(Out):
    """The coordinator's renewed certificate."""

    serial: str


class HealthOut(Out):
    """Whether the service answers."""

    status: str
