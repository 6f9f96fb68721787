"""What hospitals talk to, through nginx and the Unix socket only (see ``common.enrolment``).

nginx says who is calling: it has checked the certificate and sets the two headers itself, whatever
the caller sent. Nobody else can reach the socket, whose folder has mode 700.
"""

from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import FileResponse, PlainTextResponse

from common.checkpoint import Checkpoint
from common.enrolment import PREFIX, Answer, JoinReply, JoinRequest, Offered, RenewRequest
from common.enrolment import parse_message as parse
from common.identity import PublicIdentity
from server.api.metrics import Metrics, Timed
from server.api.web import BodyLimit, Headers, Throttle, add_error_handlers
from server.nginx import HOSPITAL_HEADER, PEER_HEADER, SERIAL_HEADER
from server.notary import countersigned
from server.registry import Hospital
from server.service import Service

_LARGEST_BODY = 2**20
_JOINS_A_MINUTE = 12


def hospital_app(service: Service, metrics: Metrics, throttle: Throttle | None = None) -> FastAPI:
    """The application behind the Unix socket."""
    app = FastAPI(title="Consilium hospital interface", openapi_url=None)
    add_error_handlers(app)
    app.add_middleware(Timed, metrics=metrics, app_name="hospital")
    app.add_middleware(Headers)
    app.add_middleware(BodyLimit, limit=_LARGEST_BODY)
    joins = throttle or Throttle(_JOINS_A_MINUTE, 60.0)

    def caller(
        caller_name: Annotated[str, Header(alias=HOSPITAL_HEADER)] = "",
        serial: Annotated[str, Header(alias=SERIAL_HEADER)] = "",
    ) -> Hospital:
        if not caller_name or not serial:
            raise HTTPException(
                401, "certificate: expected one of an enrolled hospital, found none"
            )
        return service.admission.arrived(caller_name, _serial(serial))

    Caller = Annotated[Hospital, Depends(caller)]  # noqa: N806
    Body = Annotated[bytes, Depends(_body)]  # noqa: N806

    @app.get(f"{PREFIX}/ca", response_class=PlainTextResponse)
    def ca() -> str:
        return service.desk.authority.pem

    @app.post(f"{PREFIX}/join")
    def join(body: Body, peer: Annotated[str, Header(alias=PEER_HEADER)] = "") -> JoinReply:
        if not joins.admit(peer):
            raise HTTPException(429, "join: too many attempts; wait a minute and try again")
        return service.admission.join(parse(JoinRequest, body))

    @app.post(f"{PREFIX}/renew")
    def renew(hospital: Caller, body: Body) -> JoinReply:
        return service.admission.renew(hospital.name, parse(RenewRequest, body))

    @app.get(f"{PREFIX}/studies")
    def studies(hospital: Caller) -> list[Offered]:
        return service.studies.offered_to(hospital.name)

    @app.post(f"{PREFIX}/answers")
    def answers(hospital: Caller, body: Body) -> dict[str, str]:
        service.studies.answer(hospital, parse(Answer, body))
        return {}

    @app.post(f"{PREFIX}/checkpoints", response_class=PlainTextResponse)
    def checkpoints(hospital: Caller, body: Body) -> str:
        desk = service.desk
        checkpoint = Checkpoint.from_text(body.decode(errors="replace"))
        identity = PublicIdentity.from_text(hospital.identity)
        with desk.lock:
            return countersigned(desk.folder.path, checkpoint, identity, desk.identity).text()

    @app.get(f"{PREFIX}/studies/{{digest}}/files/{{name}}")
    def files(hospital: Caller, digest: str, name: str) -> FileResponse:
        return FileResponse(service.studies.file_for(hospital.name, digest, name))

    return app


async def _body(request: Request) -> bytes:
    return await request.body()


def _serial(text: str) -> str:
    """As the registry writes it: hexadecimal, lower case, no leading zeros."""
    try:
        return f"{int(text, 16):x}"
    except ValueError:
        raise HTTPException(401, "certificate: expected a serial number") from None
