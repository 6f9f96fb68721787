"""What the hospital permits, and the check that every request must pass.

Nothing is clamped or corrected: a request that breaks a rule is refused, and the refusal names
the rule, what was found and the limit. The server can neither read nor override the policy.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime, time
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from client.spend import Accounting, Limits, charged_events
from common.errors import RefusalError
from common.privacy.accounting import GaussianEvent
from common.privacy.units import PrivacyUnit, Relation
from common.strict import Count

Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, lt=1)]
Names = tuple[Annotated[str, Field(min_length=1)], ...]

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class BudgetPolicy(_Section):
    """The most any patient may spend."""

    epsilon_lifetime: Amount = Field(
        default=8.0, description="Largest ε of one patient, over all studies and years."
    )
    epsilon_per_year: Amount = Field(
        default=3.0, description="Largest ε of one patient within any 365 days."
    )
    delta: Probability = Field(
        default=1e-6, description="The δ at which both are counted; far below 1 / patients."
    )
    relation: Relation = Field(
        default=Relation.ADD_REMOVE,
        description="'add_or_remove_one' hides whether a patient was in the data; "
        "'replace_one' hides only what their record says, and every release costs more under it.",
    )
    accounting: Accounting = Field(
        default=Accounting.PLD,
        description="'pld' counts exactly, for studies planned before their data were seen; "
        "'filter' also holds when each study was designed after seeing the last one's results, "
        "and admits fewer rounds.",
    )

    @model_validator(mode="after")
    def _year_within_lifetime(self) -> BudgetPolicy:
        if self.epsilon_per_year > self.epsilon_lifetime:
            raise ValueError("epsilon_per_year may not exceed epsilon_lifetime")
        return self


class ReleasePolicy(_Section):
    """What a single release must look like."""

    tasks: Names = Field(default=("diagnosis",), description="Tasks this hospital takes part in.")
    stages: Names = Field(
        default=("finetune", "distill"), description="Stages that may touch this hospital's data."
    )
    trust: tuple[Literal["local", "distributed"], ...] = Field(
        default=("local",),
        description="'local': our release is private by itself; 'distributed': only the sum of "
        "all hospitals' releases is.",
    )
    units: tuple[PrivacyUnit, ...] = Field(
        default=(PrivacyUnit.PATIENT,),
        description="'patient'; add 'record' only for data with few records per patient: such "
        "releases are charged per patient, at a high price.",
    )
    largest_delta_times_cohort: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="Largest δ of a study, times the cohort's patients."
    )
    smallest_noise_multiplier: Amount = Field(
        default=0.5,
        description="Smallest noise, in clip norms of one patient, of any single step.",
    )
    smallest_cohort: Count = Field(default=50, description="Fewest patients in a cohort.")
    fewest_peers: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Fewest other hospitals in the round."
    )
    most_records_per_patient: Count = Field(
        default=20, description="Most records of one patient that a study may use."
    )


class ConsentPolicy(_Section):
    """Whose data must not be used."""

    withdrawals: Annotated[str, Field(min_length=1)] = Field(
        default="withdrawals.txt",
        description="File of patient ids, one a line, next to this one; left out of every round.",
    )


class HoursPolicy(_Section):
    """When the hospital's computers are busy with patients."""

    quiet: tuple[str, ...] = Field(
        default=(), description="No round starts within, such as ['07:30-18:00']."
    )
    timezone: str = Field(default="UTC", description="Of the quiet hours: 'Europe/Berlin'.")

    @field_validator("quiet")
    @classmethod
    def _are_hours(cls, quiet: tuple[str, ...]) -> tuple[str, ...]:
        for span in quiet:
            if not _HOURS.fullmatch(span):
                raise ValueError(f"expected hours such as '22:00-06:00', found {span!r}")
        return quiet

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"expected a zone such as 'Europe/Berlin', found {name!r}") from None
        return name

    def contains(self, moment: datetime) -> str:
        """The quiet span that ``moment`` falls into, or nothing."""
        local = moment.astimezone(ZoneInfo(self.timezone)).time()
        for span in self.quiet:
            start, end = (time.fromisoformat(part) for part in span.split("-"))
            inside = start <= local < end if start < end else local >= start or local < end
            if inside:
                return span
        return ""


class Policy(_Section):
    """A hospital's whole policy, as written in ``policy.toml``."""

    version: Literal[1] = 1
    budget: BudgetPolicy
    release: ReleasePolicy
    consent: ConsentPolicy
    hours: HoursPolicy

    def limits(self) -> Limits:
        """The budget, as the ledger enforces it."""
        return Limits(
            epsilon_lifetime=self.budget.epsilon_lifetime,
            epsilon_per_year=self.budget.epsilon_per_year,
            delta=self.budget.delta,
            relation=self.budget.relation,
            accounting=self.budget.accounting,
        )


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """The facts of a requested release that the policy decides on.

    ``cohort_patients`` and ``max_records_per_patient`` are what this hospital will really use,
    after consent; ``peers`` counts the other hospitals; ``now`` carries its time zone.
    """

    study: str
    study_digest: str
    task: str
    stage: str
    trust: str
    unit: PrivacyUnit
    relation: Relation
    events: tuple[GaussianEvent, ...]
    delta: float
    cohort_patients: int
    peers: int
    max_records_per_patient: int
    now: datetime


def check(policy: Policy, request: ReleaseRequest) -> None:
    """Raise RefusalError, naming the first rule that ``request`` breaks.

    The budget itself is checked by ``Ledger.reserve``, which knows what was spent.
    """
    rules = policy.release
    _permitted("release.tasks", request.task, rules.tasks)
    _permitted("release.stages", request.stage, rules.stages)
    _permitted("release.trust", request.trust, rules.trust)
    _permitted("release.units", request.unit, rules.units)
    if request.relation is not policy.budget.relation and request.relation is Relation.REPLACE_ONE:
        raise _refusal("budget.relation", request.relation.value, policy.budget.relation.value)
    _at_least("release.smallest_cohort", request.cohort_patients, rules.smallest_cohort)
    _at_least("release.fewest_peers", request.peers, rules.fewest_peers)
    _at_least("release.most_records_per_patient", request.max_records_per_patient, 1)
    _at_most(
        "release.most_records_per_patient",
        request.max_records_per_patient,
        rules.most_records_per_patient,
    )
    for delta in (request.delta, policy.budget.delta):
        if not 0 < delta < 1:
            raise _refusal("release.largest_delta_times_cohort", f"δ = {delta}", "0 < δ < 1")
        _at_most(
            "release.largest_delta_times_cohort",
            delta * request.cohort_patients,
            rules.largest_delta_times_cohort,
        )
    if not request.events:
        raise _refusal("release.smallest_noise_multiplier", "no noise", "at least one event")
    for event in request.events:
        if type(event) is not GaussianEvent:
            raise _refusal("release.smallest_noise_multiplier", type(event).__name__, "Gaussian")
    for event in charged_events(
        request.events,
        unit=request.unit,
        records_per_patient=request.max_records_per_patient,
    ):
        _at_least(
            "release.smallest_noise_multiplier",
            event.noise_multiplier,
            rules.smallest_noise_multiplier,
        )
    if request.now.utcoffset() is None:
        raise _refusal("hours.quiet", "a time without zone", "a time with its zone")
    if span := policy.hours.contains(request.now):
        raise _refusal("hours.quiet", f"{request.now:%H:%M %Z}", f"outside {span}")


def _permitted(rule: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        raise _refusal(rule, repr(str(found)), "one of " + (", ".join(allowed) or "none"))


def _at_least(rule: str, found: float, limit: float) -> None:
    # Written so that NaN is refused.
    if isinstance(found, bool) or not (math.isfinite(found) and found >= limit):
        raise _refusal(rule, f"{found:g}", f"at least {limit:g}")


def _at_most(rule: str, found: float, limit: float) -> None:
    if isinstance(found, bool) or not found <= limit:
        raise _refusal(rule, f"{found:g}", f"at most {limit:g}")


def _refusal(rule: str, found: str, limit: str) -> RefusalError:
    return RefusalError(
        f"{rule}: this hospital's policy expects {limit}, the request has {found}; change the "
        f"study, or ask the hospital to change and sign its policy",
        rule=rule,
    )
