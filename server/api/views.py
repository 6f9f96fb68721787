"""From rows to what the admin interface says."""

from __future__ import annotations

from collections import Counter
from importlib import metadata

from common.identity import PublicIdentity
from common.study import Study
from server.api.models import (
    HospitalOut,
    HospitalsOut,
    InvitationOut,
    ResultsOut,
    RoundOut,
    StatusOut,
    StudyOut,
)
from server.desk import NotFoundError
from server.registry import StudyRow
from server.service import Service
from server.studies import RESULT_FILES


def hospitals_view(service: Service) -> HospitalsOut:
    """Every hospital and every open invitation."""
    registry, now = service.desk.registry, service.desk.clock()
    hospitals = []
    for one in registry.hospitals():
        certificates = registry.certificates(one.name)
        hospitals.append(
            HospitalOut(
                name=one.name,
                identity=PublicIdentity.from_text(one.identity).fingerprint,
                enrolled_at=one.enrolled_at,
                revoked_at=one.revoked_at,
                certificate_expires_at=certificates[-1].not_after if certificates else None,
                online=one.node_id is not None and service.driver.nodes.get(one.node_id, False),
            )
        )
    invited = [
        InvitationOut(name=one.name, expires_at=one.expires_at)
        for one in registry.join_codes()
        if one.used_at is None and one.expires_at > now
    ]
    return HospitalsOut(hospitals=hospitals, invited=invited)


def study_view(service: Service, row: StudyRow) -> StudyOut:
    """One study with its answers and its progress."""
    study, standing = service.studies.study(row), service.studies.standing(row)
    rounds = rounds_view(service, row)
    spent = [one.epsilon for one in rounds if one.epsilon is not None]
    return StudyOut(
        id=row.id,
        name=row.name,
        digest=row.digest,
        state=row.state,
        submitted_at=row.submitted_at,
        trust=study.privacy.trust.value,
        epsilon=study.privacy.epsilon,
        delta=study.privacy.delta,
        invited=list(standing.invited),
        approved=list(standing.approved),
        refused=list(standing.refused),
        pending=list(standing.pending),
        missing=standing.missing,
        rounds_finished=sum(one.hospitals > 0 for one in rounds),  # public stages have none
        rounds_planned=_planned(study),
        epsilon_spent=spent[-1] if spent else None,
        failed_attempts=row.attempts,
        next_attempt_at=row.next_attempt_at,
        last_error=row.last_error,
    )


def rounds_view(service: Service, row: StudyRow) -> list[RoundOut]:
    """A study's finished rounds."""
    return [
        RoundOut(
            stage=line["stage"],
            round=line["round"],
            hospitals=line["hospitals"],
            epsilon=line["epsilon"],
        )
        for line in service.studies.folder(row).metrics()
    ]


def results_view(service: Service, row: StudyRow) -> ResultsOut:
    """What a finished study left. Raises NotFoundError for one that is not finished."""
    result = service.studies.result(row)
    if result is None:
        raise NotFoundError(f"study {row.id}: expected a finished one, found it {row.state}")
    folder = service.studies.folder(row)
    return ResultsOut(
        id=row.id,
        result=result,
        privacy=folder.read_json("privacy.json"),
        files=[name for name in RESULT_FILES if (folder.path / name).is_file()],
    )


def status_view(service: Service) -> StatusOut:
    """The federation at a glance."""
    desk = service.desk
    active = [one for one in desk.registry.hospitals() if one.revoked_at is None]
    return StatusOut(
        address=desk.settings.address,
        fingerprint=desk.identity.public.fingerprint,
        ca_fingerprint=desk.authority.fingerprint,
        version=metadata.version("consilium"),
        time=desk.clock(),
        hospitals=len(active),
        online=sum(service.driver.nodes.values()),
        studies=dict(Counter(one.state for one in desk.registry.studies())),
        services=service.processes(),
    )


def _planned(study: Study) -> int:
    distilling = study.distill.rounds if study.distill.on == "patients" else 0
    return (study.scaling == "private") + study.finetune.rounds + distilling
