"""Who is let in: one-time codes, identities, keys, revocation, and crashes between the steps."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from common.auditlog import read_records, verify_log
from common.enrolment import JoinRequest, RenewRequest
from common.errors import ConsiliumError, MessageError, RefusalError, RunError, SignatureError
from common.identity import Identity
from server.desk import UnavailableError, open_desk
from tests.unit.coordinator import FakeClock, FakeHospital, World, world_at


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with world_at(tmp_path / "desk", FakeClock()) as world:
        yield world


def crl(world: World) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl((world.service.desk.folder.pki / "crl.pem").read_bytes())


def is_revoked(world: World, serial: str) -> bool:
    return crl(world).get_revoked_certificate_by_serial_number(int(serial, 16)) is not None


def test_a_hospital_joins_and_is_bound_everywhere(world: World) -> None:
    north = world.join("north")
    known = world.service.admission.active("north")
    assert north.certificate.subject.rfc4514_string() == "CN=north"
    assert world.federation.keys == {known.node_id: north.public_pem}
    assert world.edge.keys == {"north": north.public_pem}
    assert north.reply is not None
    assert north.reply.coordinator == world.service.desk.identity.public.text()
    assert world.service.admission.arrived("north", north.serial) == known


def test_a_code_is_used_once(world: World) -> None:
    admission = world.service.admission
    code = admission.enroll("north", actor="local")
    first = FakeHospital("north")
    admission.join(first.join_request(code))
    with pytest.raises(RefusalError, match="unused one"):
        admission.join(FakeHospital("north").join_request(code))
    # The same key with another identity is no repetition, nor the reverse.
    with pytest.raises(RefusalError, match="unused one"):
        admission.join(FakeHospital("north", key=first.key).join_request(code))
    with pytest.raises(RefusalError, match="unused one"):
        admission.join(FakeHospital("north", identity=first.identity).join_request(code))


def test_a_code_expires_and_a_newer_one_replaces_it(world: World) -> None:
    admission = world.service.admission
    old = admission.enroll("north", actor="local")
    new = admission.enroll("north", actor="local")
    with pytest.raises(RefusalError, match="newest"):
        admission.join(FakeHospital("north").join_request(old))
    world.clock.pass_by(hours=73)
    with pytest.raises(RefusalError, match="expired"):
        admission.join(FakeHospital("north").join_request(new))


def test_a_wrong_secret_and_an_unknown_name_look_alike(world: World) -> None:
    admission = world.service.admission
    code = admission.enroll("north", actor="local")
    from dataclasses import replace

    for wrong in (replace(code, secret=b"x" * 20), replace(code, secret=b"")):
        with pytest.raises(RefusalError, match="newest for this hospital"):
            admission.join(FakeHospital("north").join_request(wrong))
    with pytest.raises(RefusalError, match="newest for this hospital"):
        admission.join(FakeHospital("south").join_request(replace(code, name="south")))


def test_the_identity_must_have_signed_the_request(world: World) -> None:
    code = world.service.admission.enroll("north", actor="local")
    request = FakeHospital("north").join_request(code)
    other = Identity.generate().public.text()
    with pytest.raises(SignatureError):
        world.service.admission.join(request.model_copy(update={"identity": other}))
    with pytest.raises(SignatureError):
        changed = FakeHospital("north").request()
        world.service.admission.join(request.model_copy(update={"certificate_request": changed}))
    assert world.service.desk.registry.hospitals() == []


def test_names_identities_and_keys_are_each_hospitals_own(world: World) -> None:
    admission = world.service.admission
    north = world.join("north")
    with pytest.raises(RunError, match="enrolled already"):
        admission.enroll("North", actor="local")
    code = admission.enroll("south", actor="local")
    with pytest.raises(RunError, match="enrolled already"):
        admission.join(FakeHospital("south", identity=north.identity).join_request(code))
    with pytest.raises(RefusalError, match="key of this hospital's own"):
        admission.join(FakeHospital("south", key=north.key).join_request(code))
    admission.join(FakeHospital("south").join_request(code))  # none of these used the code up


def test_a_join_interrupted_anywhere_is_repeated_by_the_same_hospital(tmp_path: Path) -> None:
    clock = FakeClock()
    with world_at(tmp_path / "desk", clock) as world:
        code = world.service.admission.enroll("north", actor="local")
        north = FakeHospital("north")
        request = north.join_request(code)
        world.federation.is_away = True  # the registry has it, Flower has not
        with pytest.raises(UnavailableError):
            world.service.admission.join(request)
        assert world.service.admission.active("north").node_id is None
    with world_at(tmp_path / "desk", clock) as world:  # and the coordinator was restarted
        with pytest.raises(RefusalError, match="unused one"):
            world.service.admission.join(FakeHospital("north").join_request(code))
        first = world.service.admission.join(request)
        again = world.service.admission.join(north.join_request(code))
        assert first == again
        assert list(world.federation.keys.values()) == [north.public_pem]
        assert world.edge.keys == {"north": north.public_pem}


def test_the_driver_completes_an_interrupted_join(tmp_path: Path) -> None:
    with world_at(tmp_path / "desk", FakeClock()) as world:
        code = world.service.admission.enroll("north", actor="local")
        north = FakeHospital("north")
        world.federation.is_away = True
        with pytest.raises(UnavailableError):
            world.service.admission.join(north.join_request(code))
        world.federation.is_away = False
        world.federation.keys[7] = "a node that nobody enrolled"
        assert len(world.service.admission.reconcile()) == 1
        assert list(world.federation.keys.values()) == [north.public_pem]


def test_renewal_for_the_same_key_ends_the_old_certificate_on_first_use(world: World) -> None:
    admission = world.service.admission
    north = world.join("north")
    old = north.serial
    node = admission.active("north").node_id
    world.clock.pass_by(days=200)
    north.reply = admission.renew("north", RenewRequest.make(north.request(), north.identity))
    assert north.serial != old
    assert admission.active("north").node_id == node
    # The reply may have been lost: until the new one is used, both count.
    admission.arrived("north", old)
    assert not is_revoked(world, old)
    admission.arrived("north", north.serial)
    assert is_revoked(world, old)
    assert not is_revoked(world, north.serial)
    with pytest.raises(RefusalError, match="replaced"):
        admission.arrived("north", old)


def test_a_hospital_rotates_its_key(world: World) -> None:
    admission = world.service.admission
    north = world.join("north")
    old_serial, old_node = north.serial, admission.active("north").node_id
    north.key = ec.generate_private_key(ec.SECP256R1())
    request = RenewRequest.make(north.request(), north.identity)
    north.reply = admission.renew("north", request)
    known = admission.active("north")
    assert known.node_id != old_node
    assert world.federation.keys == {known.node_id: north.public_pem}
    assert world.edge.keys == {"north": north.public_pem}
    # A lost reply is asked for again, with the old certificate.
    admission.arrived("north", old_serial)
    north.reply = admission.renew("north", request)
    admission.arrived("north", north.serial)
    assert is_revoked(world, old_serial)


def test_only_the_hospital_itself_renews(world: World) -> None:
    north, south = world.join("north"), world.join("south")
    with pytest.raises(SignatureError):
        world.service.admission.renew("north", RenewRequest.make(south.request(), south.identity))
    with pytest.raises(RefusalError, match="own"):
        world.service.admission.renew("north", RenewRequest.make(south.request(), north.identity))
    with pytest.raises(MessageError):
        world.service.admission.renew("north", RenewRequest.make("x", north.identity))


def test_a_hospital_whose_certificate_expired_comes_back_with_its_identity(world: World) -> None:
    admission = world.service.admission
    north = world.join("north")
    world.clock.pass_by(days=400)
    code = admission.enroll("north", actor="local")
    with pytest.raises(RefusalError, match="identity it is enrolled with"):
        admission.join(FakeHospital("north").join_request(code))
    north.key = ec.generate_private_key(ec.SECP384R1())
    north.reply = admission.join(north.join_request(code))
    assert north.certificate.not_valid_after_utc > world.clock() + timedelta(days=364)
    assert list(world.federation.keys.values()) == [north.public_pem]
    admission.arrived("north", north.serial)


def test_a_revoked_hospital_is_out_at_every_door(world: World) -> None:
    north, south = world.join("north"), world.join("south")
    world.service.revoke("north", actor="local")
    assert is_revoked(world, north.serial)
    assert not is_revoked(world, south.serial)
    assert world.edge.keys == {"south": south.public_pem}
    assert list(world.federation.keys.values()) == [south.public_pem]
    with pytest.raises(RefusalError, match="was revoked"):
        world.service.admission.arrived("north", north.serial)
    with pytest.raises(RunError, match="was revoked"):
        world.service.admission.enroll("north", actor="local")


def test_revocation_does_not_wait_for_flower(world: World) -> None:
    north = world.join("north")
    world.federation.is_away = True
    with pytest.raises(UnavailableError, match="is shut out"):
        world.service.revoke("north", actor="local")
    assert is_revoked(world, north.serial)
    assert world.edge.keys == {}
    world.federation.is_away = False
    assert world.service.admission.reconcile() == {}
    assert world.federation.keys == {}


def test_the_revocation_list_and_the_certificate_are_renewed_by_themselves(world: World) -> None:
    before = crl(world).last_update_utc
    published = world.edge.published
    assert not world.service.admission.maintain()
    world.clock.pass_by(days=4)
    assert world.service.admission.maintain()
    assert crl(world).last_update_utc > before
    assert world.edge.published == published + 1
    server = world.service.desk.folder.pki / "server.pem"
    old = server.read_bytes()
    world.clock.pass_by(days=60)
    assert world.service.admission.maintain()
    assert server.read_bytes() != old


def test_what_happened_is_in_the_signed_log(world: World) -> None:
    world.join("north")
    world.service.revoke("north", actor="local")
    desk = world.service.desk
    verify_log(desk.folder.audit_log, desk.identity.public)
    kinds = [one.kind for one in read_records(desk.folder.audit_log)]
    assert kinds == [
        "opened",
        "token_created",
        "code_issued",
        "certificate_issued",
        "hospital_joined",
        "hospital_revoked",
    ]
    assert desk.registry.events(3)[0].kind == "hospital_revoked"


def test_a_folder_is_opened_by_one_process(world: World) -> None:
    with (
        pytest.raises(ConsiliumError, match="not running"),
        open_desk(world.service.desk.folder.path, {}),
    ):
        pass


def test_secrets_of_codes_are_not_stored(world: World) -> None:
    code = world.service.admission.enroll("north", actor="local")
    request = JoinRequest.make(code, "x", Identity.generate())
    folder = world.service.desk.folder.path
    for path in (*folder.glob("store.db*"), folder / "audit.log"):
        content = path.read_bytes()
        assert code.secret not in content
        assert request.secret.encode() not in content
