"""A study on offer in words: what it reads, what it would cost here, and whether it is permitted.

Nothing here leaves the hospital, and nothing is written: it is a rehearsal of what the guard and
the ledger will decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from client.approvals import StudyFolder, decision_of, keys_of
from client.consent import read_withdrawals
from client.hospital import own_records, split_patients
from client.hospitalfile import HospitalFile, load_hospital_file
from client.ledger import Ledger
from client.ledger_records import Entry
from client.policy import Policy, ReleaseRequest, check
from client.safe import Safe
from client.spend import Charge as Spending
from client.spend import Limits, charged_events, refuse_overspending, spent
from common.errors import ConsiliumError, RefusalError
from common.privacy.accounting import GaussianEvent
from common.privacy.budget import Charge, budget_of, evaluation_charge
from common.privacy.units import Trust
from common.study import Study, load_study
from common.tables import Table

_QUIET = "hours.quiet"  # when rounds run is not a matter of approval


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a study costs the patients of one ``pool``, and what the policy leaves afterwards.

    ``left_lifetime``, ``left_year``: of the worst-off patient this hospital has ever charged.
    """

    pool: str
    epsilon: float | None
    delta: float | None
    left_lifetime: float
    left_year: float


def describe_study(folder: Path, place: StudyFolder, safe: Safe, now: datetime) -> dict[str, Any]:
    """All an operator should know before a decision, as plain values."""
    study = load_study(place.study)
    settings = load_hospital_file(folder)
    data, tables = _data(folder, settings, study, safe)
    refusals = rehearse(study, safe, tables, now)
    offered = place.offered()
    return {
        "study": study.name,
        "digest": place.digest,
        "state": offered.state if offered else "laid out by hand",
        "decision": decision_of(place, safe.identity.public, safe.log),
        "task": study.task,
        "columns": [{"name": one.name, "kind": one.kind} for one in study.dictionary.columns],
        "label": study.dictionary.label.name,
        "patient_id": study.dictionary.patient_id,
        "stages": [
            {"stage": one.stage, "rounds": one.rounds, "steps_per_round": one.steps_per_round}
            for one in _charges(study)
        ],
        "trust": study.privacy.trust.value,
        "unit": study.privacy.unit.value,
        "hospitals": {
            name: key.fingerprint
            for name, key in (keys_of(offered.offer.hospitals) if offered else {}).items()
        },
        "cost": [asdict(one) for one in costs(study, safe.ledger, safe.policy().limits(), now)],
        "permitted": not refusals,
        "refusals": refusals,
        "data": data,
        "test_noise": settings.test_noise_seed is not None,
    }


def costs(study: Study, ledger: Ledger, limits: Limits, now: datetime) -> list[Cost]:
    """ε by pool of patients, as the ledger will charge it, and what would remain."""
    budget, evaluation = budget_of(study), evaluation_charge(study)
    found = []
    for pool, promised in (("train", budget.total()), ("test", study.evaluation.epsilon)):
        if pool == "test" and evaluation is None:
            continue
        after = spent(_worst_off(study, ledger, limits, now, pool), limits=limits, now=now)
        found.append(
            Cost(
                pool=pool,
                epsilon=promised,
                delta=study.privacy.delta,
                left_lifetime=max(0.0, limits.epsilon_lifetime - after.lifetime),
                left_year=max(0.0, limits.epsilon_per_year - after.year),
            )
        )
    return found


def rehearse(
    study: Study, safe: Safe, tables: tuple[Table, Table] | None, now: datetime
) -> list[dict[str, str]]:
    """Every rule of policy and budget that would stop the study; none when it may pass."""
    policy, limits = safe.policy(), safe.policy().limits()
    refusals: list[dict[str, str]] = []

    def note(stage: str, error: RefusalError) -> None:
        if error.rule != _QUIET:
            refusals.append({"stage": stage, "rule": error.rule, "reason": str(error)})

    if study.privacy.delta is None:
        error = RefusalError(
            "release.trust: the study adds no noise; a hospital with a safe takes no part",
            rule="release.trust",
        )
        return [{"stage": "all", "rule": error.rule, "reason": str(error)}]
    patients = _patients(safe, policy, tables)
    for one in _charges(study):
        try:
            check(policy, _request(study, one, patients, policy, now))
        except RefusalError as refusal:
            note(one.stage, refusal)
    for pool in ("train", "test"):
        try:
            charges = _worst_off(study, safe.ledger, limits, now, pool)
            refuse_overspending(charges, limits=limits, now=now)
        except RefusalError as refusal:
            note(pool, refusal)
    return refusals


def _charges(study: Study) -> list[Charge]:
    evaluation = evaluation_charge(study)
    return [*budget_of(study).charges, *([evaluation] if evaluation else [])]


def _request(
    study: Study, charge: Charge, patients: dict[str, int], policy: Policy, now: datetime
) -> ReleaseRequest:
    federation, privacy = study.federation, study.privacy
    peers = federation.minimum_hospitals - 1
    if privacy.trust is Trust.DISTRIBUTED and charge.stage != "evaluate":
        assert federation.hospitals is not None  # noqa: S101 - the study holds it
        peers = federation.hospitals - federation.tolerated_dropouts - 1
    pool = "test" if charge.stage == "evaluate" else "train"
    assert privacy.delta is not None  # noqa: S101 - asked by the caller
    return ReleaseRequest(
        study=study.name,
        study_digest=study.digest(),
        task=study.task,
        stage=charge.stage,
        trust=privacy.trust.value,
        unit=privacy.unit,
        relation=privacy.relation,
        events=charge.events(1),
        delta=privacy.delta,
        # Data that cannot be read yet are taken to be just large enough.
        cohort_patients=patients.get(pool, policy.release.smallest_cohort),
        peers=peers,
        max_records_per_patient=charge.plan.records_per_unit,
        now=now,
    )


def _worst_off(
    study: Study, ledger: Ledger, limits: Limits, now: datetime, pool: str
) -> Sequence[Spending]:
    """The charges of the patient who would have spent most, this study's ``pool`` included."""
    charges = _charges(study)
    mine = [one for one in charges if (one.stage == "evaluate") == (pool == "test")]
    events = [event for one in mine for event in one.events()]
    if pool == "train":
        events += [event for event in budget_of(study).spare if isinstance(event, GaussianEvent)]
    records = max((one.plan.records_per_unit for one in mine), default=1)
    charged = charged_events(events, unit=study.privacy.unit, records_per_patient=records)
    relation = study.privacy.relation
    new = [Spending(events=charged, relation=relation, adaptive=False, time=now)] if charged else []
    by_cohort: dict[int, list[Entry]] = {}
    for entry in ledger.entries():
        # What the study has charged already is part of what it costs, not on top of it.
        if entry.study_digest != study.digest():
            by_cohort.setdefault(entry.cohort, []).append(entry)
    histories = {
        frozenset(each for each in history if each in by_cohort)
        for history in ledger.patient_groups()
    }
    spends = [
        [*(entry.charge for each in sorted(history) for entry in by_cohort[each]), *new]
        for history in histories or {frozenset[int]()}
    ]

    def total(charged: Sequence[Spending]) -> float:
        after = spent(charged, limits=limits, now=now)
        return max(after.lifetime / limits.epsilon_lifetime, after.year / limits.epsilon_per_year)

    return max(spends, key=total)


def _patients(safe: Safe, policy: Policy, tables: tuple[Table, Table] | None) -> dict[str, int]:
    if tables is None:
        return {}
    gone = read_withdrawals(safe.withdrawals(policy))
    return {
        pool: len(gone.without(dict.fromkeys(str(one) for one in table.patients)))
        for pool, table in zip(("train", "test"), tables, strict=True)
    }


def _data(
    folder: Path, settings: HospitalFile, study: Study, safe: Safe
) -> tuple[dict[str, Any], tuple[Table, Table] | None]:
    """The hospital's own data against the dictionary, for its operator's eyes only."""
    try:
        table = own_records(settings, study, folder, safe.dates_key)
        parts = split_patients(table, study.evaluation, seed=study.seed, name=settings.name)
    except ConsiliumError as error:
        return {"fits": False, "problem": str(error)}, None
    report = asdict(table.report)
    report["columns"] = [
        one for one in report["columns"] if one["missing"] or one["out_of_range"] or one["unmapped"]
    ]
    return {"fits": True} | report, parts


def study_lines(facts: dict[str, Any]) -> list[str]:
    """The same for a person."""
    columns = ", ".join(one["name"] for one in facts["columns"])
    lines = [
        f"{facts['study']} ({facts['digest'][:12]}…): {facts['state']}; here: {facts['decision']}",
        f"  learns     {facts['task']}: {facts['label']}",
        f"  reads      {columns}; patients by {facts['patient_id'] or 'row'}",
        "  releases   "
        + "; ".join(
            f"{one['stage']} {one['rounds']} rounds × {one['steps_per_round']}"
            for one in facts["stages"]
        )
        + f" ({facts['trust']} trust, per {facts['unit']})",
    ]
    lines += [f"  with       {name:<16} {key}" for name, key in facts["hospitals"].items()]
    for one in facts["cost"]:
        promise = (
            "no promise"
            if one["epsilon"] is None
            else f"ε {one['epsilon']:.3g} at δ {one['delta']:g}"
        )
        left = min(one["left_lifetime"], one["left_year"])
        lines.append(
            f"  costs      {promise} for {one['pool']} patients; then the policy leaves the "
            f"worst-off one ε {'0' if math.isnan(left) else f'{left:.3g}'}"
        )
    data = facts["data"]
    if data["fits"]:
        lines.append(
            f"  your data  {data['rows']} rows of {data['patients']} patients, "
            f"{data['unlabelled']} rows without a known label"
        )
        lines += [
            f"             {one['name']}: {one['missing']} missing, {one['out_of_range']} out of "
            f"range, {one['unmapped']} unmapped"
            for one in data["columns"]
        ]
    else:
        lines.append(f"  your data  do not fit yet: {data['problem']}")
    lines += [f"  ✗ {one['stage']}: {one['reason']}" for one in facts["refusals"]]
    if facts["permitted"]:
        lines.append("  ✓ the policy in force permits it")
    if facts["test_noise"]:
        lines.append("  ✗ TEST NOISE: hospital.toml sets test_noise_seed; NOBODY IS PROTECTED")
    return [printable(line) for line in lines]


def printable(text: str) -> str:
    """Without what could move a terminal's cursor: names of columns are the coordinator's words."""
    return "".join(one if one.isprintable() else "�" for one in text)
