"""What those who run the federation talk to: JSON under /api/v1, a page, health and figures.

Roles: a viewer reads; an operator also submits, begins and stops studies; an admin also decides who
takes part and who holds tokens. The page and its files hold nothing by themselves.
"""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.middleware.trustedhost import TrustedHostMiddleware

from common.auditlog import Fact
from server.api import models
from server.api.metrics import Metrics, Timed
from server.api.views import (
    hospitals_view,
    results_view,
    rounds_view,
    status_view,
    study_view,
)
from server.api.web import BodyLimit, Headers, add_error_handlers
from server.desk import NotFoundError
from server.registry import Role, TokenRow
from server.service import Service
from server.tokens import allows, find_token, make_token

API = "/api/v1"

_LARGEST_BODY = 2**21
_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
# A page of another site, resolving its own name to this machine, stops here.
_HOSTS = ["127.0.0.1", "localhost", "[::1]", "testserver"]
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": models.ErrorOut} for code in (400, 401, 403, 404, 409, 422, 503)
}
_BEARER = HTTPBearer(auto_error=False, description="From `consilium coordinator token create`.")


def admin_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application on loopback."""
    app = FastAPI(
        title="Consilium coordinator",
        version=metadata.version("consilium"),
        description="Hospitals, studies, rounds and results of one federation.",
        openapi_url=f"{API}/openapi.json",
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    add_error_handlers(app)
    app.add_middleware(Timed, metrics=metrics, app_name="admin")
    app.add_middleware(BodyLimit, limit=_LARGEST_BODY)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS)
    app.add_middleware(Headers)
    _add_hospitals(app, service)
    _add_studies(app, service)
    _add_tokens(app, service)
    _add_overview(app, service, metrics)
    return app


def _needs(service: Service, role: Role) -> Callable[..., str]:
    """A dependency: the name behind a token that may do what takes ``role``."""

    def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> str:
        token: TokenRow | None = (
            find_token(service.desk.registry, given.credentials) if given else None
        )
        if token is None:
            raise HTTPException(
                401,
                "token: expected one that is in force (Authorization: Bearer …), found none; "
                "see `consilium coordinator token create`",
                {"WWW-Authenticate": "Bearer"},
            )
        if not allows(token.role, role):
            raise HTTPException(403, f"token: this takes role {role}, found {token.role}")
        return token.name

    return check


def _add_hospitals(app: FastAPI, service: Service) -> None:
    desk, admission = service.desk, service.admission
    Viewer = Annotated[str, Depends(_needs(service, "viewer"))]  # noqa: N806
    Admin = Annotated[str, Depends(_needs(service, "admin"))]  # noqa: N806

    @app.get(f"{API}/hospitals", tags=["hospitals"])
    def hospitals(_: Viewer) -> models.HospitalsOut:
        """Who takes part, and who was invited."""
        return hospitals_view(service)

    @app.post(f"{API}/hospitals", tags=["hospitals"], status_code=201)
    def enroll(actor: Admin, wish: models.EnrollIn) -> models.EnrollOut:
        """Invite a hospital: a join code, shown this once."""
        code = admission.enroll(wish.name, actor=actor)
        kept = desk.registry.join_code(wish.name)
        if kept is None:
            raise NotFoundError(f"join code of {wish.name}: expected the one just made")
        return models.EnrollOut(name=code.name, code=code.text(), expires_at=kept.expires_at)

    @app.delete(f"{API}/hospitals/{{name}}", tags=["hospitals"])
    def revoke(actor: Admin, name: str) -> models.RevokedOut:
        """Shut a hospital out, at once and for good."""
        return models.RevokedOut(name=name, stopped_studies=service.revoke(name, actor=actor))

    @app.post(f"{API}/certificate", tags=["hospitals"])
    def renew_certificate(actor: Admin) -> models.ServerCertificateOut:
        """Renew the coordinator's own key and certificate now; this also happens by itself."""
        return models.ServerCertificateOut(serial=admission.renew_server(actor=actor))


def _add_studies(app: FastAPI, service: Service) -> None:
    studies = service.studies
    Viewer = Annotated[str, Depends(_needs(service, "viewer"))]  # noqa: N806
    Operator = Annotated[str, Depends(_needs(service, "operator"))]  # noqa: N806

    @app.get(f"{API}/studies", tags=["studies"])
    def all_studies(_: Viewer) -> models.StudiesOut:
        """All studies, the newest first."""
        rows = service.desk.registry.studies()
        return models.StudiesOut(studies=[study_view(service, row) for row in rows])

    @app.post(f"{API}/studies", tags=["studies"], status_code=201)
    def submit(actor: Operator, wish: models.SubmitIn) -> models.StudyOut:
        """Offer a study to hospitals; it begins once all have answered and enough approve."""
        return study_view(service, studies.submit(wish.toml, wish.hospitals, actor=actor))

    @app.get(f"{API}/studies/{{study_id}}", tags=["studies"])
    def one_study(_: Viewer, study_id: str) -> models.StudyOut:
        """One study, by its id or by a name that only it has."""
        return study_view(service, studies.find(study_id))

    @app.post(f"{API}/studies/{{study_id}}/begin", tags=["studies"])
    def begin(actor: Operator, study_id: str) -> models.StudyOut:
        """Begin without the hospitals that have not answered, or continue an ended study."""
        return study_view(service, studies.begin(study_id, actor=actor))

    @app.post(f"{API}/studies/{{study_id}}/stop", tags=["studies"])
    def stop(actor: Operator, study_id: str, wish: models.StopIn | None = None) -> models.StudyOut:
        """Stop a study; what was spent stays spent, and `begin` continues it."""
        reason = wish.reason if wish else ""
        return study_view(service, studies.stop(study_id, actor=actor, reason=reason))

    @app.get(f"{API}/studies/{{study_id}}/rounds", tags=["studies"])
    def rounds(_: Viewer, study_id: str) -> models.RoundsOut:
        """Finished rounds: how many hospitals took part, and ε so far."""
        return models.RoundsOut(rounds=rounds_view(service, studies.find(study_id)))

    @app.get(f"{API}/studies/{{study_id}}/results", tags=["studies"])
    def results(_: Viewer, study_id: str) -> models.ResultsOut:
        """A finished study's result and privacy statement."""
        return results_view(service, studies.find(study_id))

    @app.get(f"{API}/studies/{{study_id}}/files/{{name}}", tags=["studies"])
    def files(_: Viewer, study_id: str, name: str) -> FileResponse:
        """One of a finished study's files."""
        path = studies.result_file(studies.find(study_id), name)
        return FileResponse(path, media_type="application/octet-stream", filename=name)


def _add_tokens(app: FastAPI, service: Service) -> None:
    desk = service.desk
    Admin = Annotated[str, Depends(_needs(service, "admin"))]  # noqa: N806

    @app.get(f"{API}/tokens", tags=["tokens"])
    def tokens(_: Admin) -> models.TokensOut:
        """Who may use this interface."""
        listed = [
            models.TokenOut(
                name=one.name,
                role=one.role,
                created_at=one.created_at,
                revoked_at=one.revoked_at,
            )
            for one in desk.registry.tokens()
        ]
        return models.TokensOut(tokens=listed)

    @app.post(f"{API}/tokens", tags=["tokens"], status_code=201)
    def create(actor: Admin, wish: models.TokenIn) -> models.NewTokenOut:
        """Make a token, shown this once."""
        with desk.lock:
            token = make_token(desk.registry, wish.name, wish.role, desk.clock())
            facts: dict[str, Fact] = {"name": wish.name, "role": wish.role}
            desk.record("token_created", wish.name, actor=actor, facts=facts)
        return models.NewTokenOut(name=wish.name, role=wish.role, token=token)

    @app.delete(f"{API}/tokens/{{name}}", tags=["tokens"], status_code=204)
    def revoke(actor: Admin, name: str) -> None:
        """Let a token count no longer."""
        with desk.lock:
            if not desk.registry.revoke_token(name, desk.clock()):
                raise NotFoundError(f"token {name!r}: expected one in force, found none so named")
            desk.record("token_revoked", name, actor=actor, facts={"name": name})


def _add_overview(app: FastAPI, service: Service, metrics: Metrics) -> None:
    Viewer = Annotated[str, Depends(_needs(service, "viewer"))]  # noqa: N806

    @app.get(f"{API}/status", tags=["overview"])
    def status(_: Viewer) -> models.StatusOut:
        """The federation at a glance."""
        return status_view(service)

    @app.get(f"{API}/events", tags=["overview"])
    def events(_: Viewer, newest: Annotated[int, Query(ge=1, le=1000)] = 50) -> models.EventsOut:
        """What happened last."""
        listed = [
            models.EventOut(time=one.time, kind=one.kind, subject=one.subject, actor=one.actor)
            for one in service.desk.registry.events(newest)
        ]
        return models.EventsOut(events=listed)

    @app.get("/health", tags=["overview"], responses={503: {"model": models.HealthOut}})
    def health() -> JSONResponse:
        """200 while the service answers and its database does; needs no token."""
        service.desk.registry.events(1)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", include_in_schema=False)
    def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html", media_type="text/html; charset=utf-8")

    @app.get("/page/{name}", include_in_schema=False)
    def page_file(name: str) -> FileResponse:
        if name not in _PAGE_FILES:
            raise NotFoundError(f"page: expected one of its files, found {name[:40]!r}")
        return FileResponse(_PAGE / name, media_type=_PAGE_FILES[name])
