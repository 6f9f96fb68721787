"""Both HTTP interfaces in memory: who may do what, how errors look, what is never said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w
from fastapi import FastAPI

from client.safe import create_safe, open_safe
from common.checkpoint import Checkpoint, make_checkpoint, verify_checkpoint
from common.enrolment import PREFIX, JoinReply, Offered, RenewRequest, parse_message
from server.api.admin import admin_app
from server.api.hospital import hospital_app
from server.api.metrics import Metrics
from server.api.web import Throttle
from server.nginx import HOSPITAL_HEADER, PEER_HEADER, SERIAL_HEADER
from tests.unit.coordinator import FakeClock, FakeHospital, World, client_of, world_at


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with world_at(tmp_path / "desk", FakeClock()) as world:
        yield world


@pytest.fixture
def metrics(world: World) -> Metrics:
    return Metrics(world.service)


@pytest.fixture
def gate(world: World, metrics: Metrics) -> Iterator[httpx.Client]:
    """The hospital interface, as nginx reaches it."""
    with client_of(hospital_app(world.service, metrics)) as client:
        yield client


@pytest.fixture
def office(world: World, metrics: Metrics) -> FastAPI:
    return admin_app(world.service, metrics)


@pytest.fixture
def admin(world: World, office: FastAPI) -> httpx.Client:
    """The admin interface with the token of the coordinator's machine."""
    token = world.service.desk.folder.admin_token.read_text().strip()
    return client_of(office, token)


def seen_by_nginx(hospital: FakeHospital) -> dict[str, str]:
    # nginx writes serials in capitals, with a leading zero where one is needed.
    return {HOSPITAL_HEADER: hospital.name, SERIAL_HEADER: f"0{hospital.serial.upper()}"}


@pytest.fixture
def text(tree: dict[str, Any]) -> str:
    return tomli_w.dumps(tree)


def test_a_hospital_joins_answers_and_fetches_what_it_took_part_in(
    world: World, gate: httpx.Client, admin: httpx.Client, text: str
) -> None:
    authority = gate.get(f"{PREFIX}/ca")
    assert authority.text == world.service.desk.authority.pem
    hospitals = []
    for name in ("north", "south"):
        made = admin.post("/api/v1/hospitals", json={"name": name})
        assert made.status_code == 201
        hospital = FakeHospital(name)
        from common.enrolment import JoinCode

        code = JoinCode.from_text(made.json()["code"])
        assert code.ca_sha256 == world.service.desk.authority.fingerprint
        reply = gate.post(f"{PREFIX}/join", content=hospital.join_request(code).model_dump_json())
        assert reply.status_code == 200, reply.text
        hospital.reply = parse_message(JoinReply, reply.text)
        hospitals.append(hospital)
    submitted = admin.post("/api/v1/studies", json={"toml": text})
    assert submitted.status_code == 201, submitted.text
    study = submitted.json()
    assert study["pending"] == ["north", "south"]
    for hospital in hospitals:
        listed = gate.get(f"{PREFIX}/studies", headers=seen_by_nginx(hospital)).json()
        offered = parse_message(Offered, json.dumps(listed[0]))
        answer = hospital.answer(offered).model_dump_json()
        done = gate.post(f"{PREFIX}/answers", content=answer, headers=seen_by_nginx(hospital))
        assert (done.status_code, done.json()) == (200, {})
    world.service.driver.tick()
    world.service.driver.tick()
    found = admin.get(f"/api/v1/studies/{study['name']}").json()
    assert (found["state"], found["approved"]) == ("running", ["north", "south"])
    row = world.service.studies.find(study["id"])
    run = world.service.studies.folder(row)
    run.log({"stage": "finetune", "round": 1, "hospitals": 2, "epsilon": 1.5})
    run.write_json("result.json", {"hospitals": ["north", "south"]})
    run.write_json("privacy.json", {"guaranteed": True})
    world.service.driver.tick()
    rounds = admin.get(f"/api/v1/studies/{study['id']}/rounds").json()["rounds"]
    assert rounds == [{"stage": "finetune", "round": 1, "hospitals": 2, "epsilon": 1.5}]
    results = admin.get(f"/api/v1/studies/{study['id']}/results").json()
    assert results["result"] == {"hospitals": ["north", "south"]}
    assert "result.json" in results["files"]
    path = f"{PREFIX}/studies/{study['digest']}/files/result.json"
    assert gate.get(path, headers=seen_by_nginx(hospitals[0])).json() == results["result"]


def test_without_nginx_naming_the_hospital_nothing_opens(world: World, gate: httpx.Client) -> None:
    north = world.join("north")
    for headers in ({}, {HOSPITAL_HEADER: "north"}, {SERIAL_HEADER: north.serial}):
        reply = gate.get(f"{PREFIX}/studies", headers=headers)
        assert reply.status_code == 401
        assert list(reply.json()) == ["error"]
    stranger = {HOSPITAL_HEADER: "nobody", SERIAL_HEADER: north.serial}
    assert gate.get(f"{PREFIX}/studies", headers=stranger).status_code == 404
    south = world.join("south")
    mixed = {HOSPITAL_HEADER: "north", SERIAL_HEADER: south.serial}
    assert gate.get(f"{PREFIX}/studies", headers=mixed).status_code == 403
    world.service.revoke("north", actor="local")
    reply = gate.get(f"{PREFIX}/studies", headers=seen_by_nginx(north))
    assert reply.status_code == 403
    assert "was revoked" in reply.json()["error"]


def test_renewal_over_http(world: World, gate: httpx.Client) -> None:
    north = world.join("north")
    old = seen_by_nginx(north)
    request = RenewRequest.make(north.request(), north.identity).model_dump_json()
    reply = gate.post(f"{PREFIX}/renew", content=request, headers=old)
    north.reply = parse_message(JoinReply, reply.text)
    assert gate.get(f"{PREFIX}/studies", headers=old).status_code == 200
    assert gate.get(f"{PREFIX}/studies", headers=seen_by_nginx(north)).status_code == 200
    assert gate.get(f"{PREFIX}/studies", headers=old).status_code == 403


def test_checkpoints_are_countersigned_once_and_never_backwards(
    world: World, gate: httpx.Client, tmp_path: Path
) -> None:
    create_safe(tmp_path / "north", {})
    with open_safe(tmp_path / "north", {}) as safe:
        older = make_checkpoint(safe.log, safe.identity)
        safe.log.append("study_seen", {"study": "s", "study_digest": "d"})
        newer = make_checkpoint(safe.log, safe.identity)
        north = FakeHospital("north", identity=safe.identity)
    code = world.service.admission.enroll("north", actor="local")
    north.reply = world.service.admission.join(north.join_request(code))
    path, headers = f"{PREFIX}/checkpoints", seen_by_nginx(north)
    signed = gate.post(path, content=newer.text(), headers=headers)
    verify_checkpoint(
        Checkpoint.from_text(signed.text),
        hospital=north.identity.public,
        coordinator=world.service.desk.identity.public,
    )
    back = gate.post(path, content=older.text(), headers=headers)
    assert back.status_code == 409
    assert "cut" in back.json()["error"]
    south = world.join("south")
    foreign = gate.post(path, content=newer.text(), headers=seen_by_nginx(south))
    assert foreign.status_code == 403


def test_joining_is_throttled_and_bodies_are_limited(
    world: World, metrics: Metrics, gate: httpx.Client
) -> None:
    now = [0.0]
    app = hospital_app(world.service, metrics, Throttle(2, 60.0, lambda: now[0]))
    with client_of(app) as client:
        peer = {PEER_HEADER: "192.0.2.1"}

        def status(headers: dict[str, str]) -> int:
            return client.post(f"{PREFIX}/join", content="{}", headers=headers).status_code

        assert [status(peer) for _ in range(3)] == [400, 400, 429]
        assert status({PEER_HEADER: "192.0.2.2"}) == 400
        now[0] = 61.0
        assert status(peer) == 400
    large = gate.post(f"{PREFIX}/join", content=b"x" * (2**20 + 1))
    assert large.status_code == 413


def test_bad_messages_are_one_line_without_the_secret(world: World, gate: httpx.Client) -> None:
    world.service.admission.enroll("north", actor="local")
    body = {"name": "north", "secret": "c2VjcmV0", "identity": "x"}
    reply = gate.post(f"{PREFIX}/join", content=json.dumps(body))
    assert reply.status_code == 400
    assert "\n" not in reply.json()["error"]
    assert "c2VjcmV0" not in reply.text


ROUTES: list[tuple[str, str, Any, str]] = [
    ("GET", "status", None, "viewer"),
    ("GET", "hospitals", None, "viewer"),
    ("GET", "studies", None, "viewer"),
    ("GET", "studies/x", None, "viewer"),
    ("GET", "studies/x/rounds", None, "viewer"),
    ("GET", "studies/x/results", None, "viewer"),
    ("GET", "studies/x/files/result.json", None, "viewer"),
    ("GET", "events", None, "viewer"),
    ("POST", "studies", {"toml": "x"}, "operator"),
    ("POST", "studies/x/begin", None, "operator"),
    ("POST", "studies/x/stop", None, "operator"),
    ("POST", "hospitals", {"name": "west"}, "admin"),
    ("DELETE", "hospitals/x", None, "admin"),
    ("POST", "certificate", None, "admin"),
    ("GET", "tokens", None, "admin"),
    ("POST", "tokens", {"name": "one"}, "admin"),
    ("DELETE", "tokens/x", None, "admin"),
]


@pytest.fixture
def token_of(admin: httpx.Client) -> Callable[[str], str]:
    def make(role: str) -> str:
        made = admin.post("/api/v1/tokens", json={"name": f"a-{role}", "role": role})
        return str(made.json()["token"])

    return make


def test_every_route_asks_for_its_role(
    world: World, office: FastAPI, token_of: Callable[[str], str]
) -> None:
    listed = {
        (
            method.upper(),
            path.removeprefix("/api/v1/").replace("{study_id}", "x").replace("{name}", "x"),
        )
        for path, methods in office.openapi()["paths"].items()
        for method in methods
        if path.startswith("/api/")
    }
    named = {
        (method, path.replace("files/result.json", "files/x")) for method, path, _, _ in ROUTES
    }
    assert listed == named  # a new route belongs into ROUTES
    order = ["viewer", "operator", "admin"]
    tokens = {role: token_of(role) for role in order}
    for method, path, body, needed in ROUTES:
        url = f"/api/v1/{path}"
        for wrong in ("", "consilium-nonsense"):
            reply = client_of(office, wrong).request(method, url, json=body)
            assert reply.status_code == 401, (method, path)
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        for role, token in tokens.items():
            status = client_of(office, token).request(method, url, json=body).status_code
            if order.index(role) < order.index(needed):
                assert status == 403, (method, path, role)
            else:
                assert status not in (401, 403, 422, 500), (method, path, role)


def test_a_revoked_token_opens_nothing(
    office: FastAPI, admin: httpx.Client, token_of: Callable[[str], str]
) -> None:
    viewer = client_of(office, token_of("viewer"))
    assert viewer.get("/api/v1/status").status_code == 200
    assert admin.delete("/api/v1/tokens/a-viewer").status_code == 204
    assert viewer.get("/api/v1/status").status_code == 401
    assert admin.delete("/api/v1/tokens/a-viewer").status_code == 404
    listed = admin.get("/api/v1/tokens").json()["tokens"]
    assert [(one["name"], one["role"]) for one in listed] == [
        ("a-viewer", "viewer"),
        ("local", "admin"),
    ]
    assert "sha256" not in listed[0]


def test_every_route_is_described(office: FastAPI) -> None:
    document = office.openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), (method, path)
    for name, schema in document["components"]["schemas"].items():
        if name not in ("ValidationError", "HTTPValidationError"):
            assert schema.get("description"), name


def test_the_page_is_self_contained_and_locked_down(office: FastAPI) -> None:
    client = client_of(office, "")
    page = client.get("/")
    assert page.status_code == 200
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("page.js", "page.css", "icon.svg"):
        assert f"/page/{name}" in page.text
        found = client.get(f"/page/{name}")
        assert found.status_code == 200
        assert found.headers["X-Content-Type-Options"] == "nosniff"
        for outside in ("http:", "https:"):
            assert outside not in found.text.replace("http://www.w3.org/2000/svg", "")
    assert "<script>" not in page.text
    script = client.get("/page/page.js").text
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert danger not in script
    assert "localStorage" not in script
    assert client.get("/page/../admin.py").status_code == 404
    assert client.get("/page/nonsense").status_code == 404


def test_another_sites_name_for_this_machine_is_refused(office: FastAPI) -> None:
    reply = client_of(office, "").get("/", headers={"Host": "evil.example"})
    assert reply.status_code == 400


def test_health_and_figures_hold_no_names(
    world: World, office: FastAPI, admin: httpx.Client, gate: httpx.Client, text: str
) -> None:
    world.join("north")
    world.join("south")
    admin.post("/api/v1/studies", json={"toml": text})
    admin.get("/api/v1/studies/small")
    gate.get(f"{PREFIX}/studies", headers={HOSPITAL_HEADER: "north"})
    world.service.driver.tick()
    state = {"nginx": {"pid": 7, "ready": True, "restarts": 2}}
    world.service.desk.folder.state.write_text(json.dumps(state))
    assert admin.get("/api/v1/status").json()["services"] == state
    client = client_of(office, "")
    assert client.get("/health").json() == {"status": "ok"}
    figures = client.get("/metrics").text
    assert 'consilium_hospitals{state="online"} 2.0' in figures
    assert 'consilium_hospitals{state="offline"} 0.0' in figures
    assert 'consilium_run_attempts_total{outcome="failed"} 0.0' in figures
    assert "consilium_rounds_finished_total 0.0" in figures
    assert 'consilium_certificate_expiry_days{kind="crl"} 7.0' in figures
    assert 'consilium_certificate_expiry_days{kind="server"} 90.0' in figures
    assert 'consilium_service_restarts_total{service="nginx"} 2.0' in figures
    assert "consilium_disk_free_bytes " in figures
    assert 'consilium_studies{state="offered"} 1.0' in figures
    assert 'route="/api/v1/studies/{study_id}"' in figures
    for name in ("north", "south", "small"):
        assert name not in figures


def test_a_result_that_is_not_there_and_an_unknown_study_are_404(admin: httpx.Client) -> None:
    for path in ("studies/none", "studies/none/results", "studies/none/files/result.json"):
        reply = admin.get(f"/api/v1/{path}")
        assert reply.status_code == 404
        assert "expected one that was submitted" in reply.json()["error"]
    assert admin.get("/api/v1/nonsense").json() == {"error": "Not Found"}
    unknown = admin.post("/api/v1/tokens", json={"name": "x", "rule": "admin"})
    assert unknown.status_code == 422
    assert "rule" in unknown.json()["error"]
