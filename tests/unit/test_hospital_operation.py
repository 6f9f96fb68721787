"""An operator's day: join, check, studies, approve, pause, status; over real TLS to a fake."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner

from client.check import Examination
from client.cli import hospital_app
from client.describe import costs
from client.hospital import open_hospital
from client.hospitalfile import load_hospital_file, write_template
from client.linkfolder import LinkFolder
from client.policyfile import sign_policy
from client.safe import open_safe
from client.visits import Visitor
from common.checkpoint import Checkpoint, verify_log_against
from common.enrolment import Offered
from common.errors import ConsiliumError, LinkError, RefusalError, StudyError
from common.identity import Identity
from common.study import Study, parse_study
from tests.coordinators import FakeCoordinator
from tests.offers import offer_of

CELL = "CANARY-CELL-77"


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator().serving() as world:
        yield world


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("CONSILIUM_KEY", "CONSILIUM_KEY_FILE", "CONSILIUM_PASSPHRASE"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "north"
    monkeypatch.setenv("CONSILIUM_HOSPITAL", str(path))
    run("init", str(path))
    rows = [f"CANARY-{one},{one % 7 - 3},{one % 5 - 2},{one % 2}" for one in range(80)]
    (path / "data.csv").write_text("\n".join(["who,a,b,ill", *rows]) + "\n")
    settings = {
        "name": "north",
        "declared_patients": 80,
        "safe": ".",
        "source": {"kind": "csv", "path": "data.csv"},
    }
    (path / "hospital.toml").write_text(tomli_w.dumps(settings))
    policy = tomllib.loads((path / "policy.toml").read_text())
    policy["release"] |= {
        "smallest_cohort": 10,
        "fewest_peers": 1,
        "smallest_noise_multiplier": 0.1,
    }
    policy["budget"] |= {"epsilon_lifetime": 9.0, "epsilon_per_year": 6.0, "delta": 1e-5}
    (path / "policy.toml").write_text(tomli_w.dumps(policy))
    run("policy", "sign")
    return path


@pytest.fixture
def joined(folder: Path, coordinator: FakeCoordinator, tmp_path: Path) -> Path:
    code = tmp_path / "code.txt"
    code.write_text(coordinator.code().text() + "\n")
    told = json.loads(run("join", "--file", str(code), "--json"))
    assert told["coordinator"] == coordinator.identity.public.fingerprint
    return folder


def run(*arguments: str, code: int = 0, text: str | None = None) -> str:
    result = CliRunner().invoke(hospital_app, arguments, input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def offer(folder: Path, world: FakeCoordinator, study: Study) -> Offered:
    with open_safe(folder, {}) as safe:
        mine = safe.identity.public.text()
    keys = {"north": mine, "south": SOUTH.public.text()}
    made = Offered(offer=offer_of(study, keys, world.identity), state="offered")
    world.offers.append(made)
    return made


SOUTH = Identity.generate()


def test_a_code_comes_from_a_file_or_by_hand_and_is_no_argument(
    folder: Path, coordinator: FakeCoordinator
) -> None:
    assert "Joined localhost" in run("join", text=coordinator.code().text() + "\n")
    run("join", coordinator.code().text(), code=2)
    with pytest.raises(ConsiliumError, match="paste it again"):
        run("join", text="consilium-join:abc\n")


def test_the_template_is_sound_once_filled_in(tmp_path: Path) -> None:
    path = write_template(tmp_path)
    with pytest.raises(StudyError, match="missing, and it has no default"):
        load_hospital_file(tmp_path)
    lines = path.read_text().splitlines()
    filled = [
        line.removeprefix("# ") if " = " in line or line.startswith("# [") else line
        for line in lines
    ]
    path.write_text("\n".join(filled))
    settings = load_hospital_file(tmp_path)
    assert (settings.safe, settings.name, set(settings.sources)) == (".", "north", {"heart"})
    write_template(tmp_path)
    assert path.read_text() == "\n".join(filled)


def test_studies_in_words_then_approved_then_withdrawn(
    joined: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    offer(joined, coordinator, small)
    text = run("studies")
    for words in (
        "small (",
        "here: open",
        "diagnosis: ill",
        "reads      a, b; patients by who",
        "finetune 3 rounds × 1",
        "local trust, per patient",
        SOUTH.public.fingerprint,
        "ε 4 at δ 1e-05 for train patients",
        "80 rows of 80 patients",
        "✓ the policy in force permits it",
    ):
        assert words in text, words
    assert "CANARY" not in text
    (facts,) = json.loads(run("studies", "small", "--json"))["studies"]
    assert facts["permitted"]
    assert facts["hospitals"]["south"] == SOUTH.public.fingerprint
    run("approve", "small", text="n\n", code=1)
    assert coordinator.answers == []
    assert "coordinator knows" in run("approve", "small", text="y\n")
    assert [one.decision for one in coordinator.answers] == ["approve"]
    with open_hospital(joined, small.digest()) as hospital:
        assert hospital.aggregator is not None
    run("refuse", "small", "--reason", "not now")
    assert coordinator.answers[-1].reason == "not now"
    with pytest.raises(RefusalError), open_hospital(joined, small.digest()):
        pass
    assert "here: refused" in run("studies", "small")


def test_a_coordinators_words_do_not_move_the_terminal(
    joined: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    tree = small.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    tree["dictionary"]["columns"][0]["name"] = "a\x1b[2Jb"
    offer(joined, coordinator, parse_study(tree, origin="test"))
    assert "\x1b" not in run("studies")


def test_the_costs_are_what_the_ledger_will_charge(
    joined: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    """After the whole study, what the ledger has left is what was said beforehand."""
    from client import rounds
    from client.budget import budget_report
    from common.auditlog import utc_now
    from tests.unit.test_guard import task_of

    offer(joined, coordinator, small)
    run("studies")
    with open_safe(joined, {}) as safe:
        limits = safe.policy().limits()
        (before,) = costs(small, safe.ledger, limits, utc_now())
    run("approve", "small", "--yes")
    with open_hospital(joined, small.digest()) as hospital:
        for number in range(small.finetune.rounds):
            rounds.train(hospital, task_of(small, round=number))
    with open_safe(joined, {}) as safe:
        report = budget_report(safe.ledger, limits, utc_now())
        (again,) = costs(small, safe.ledger, limits, utc_now())
        (another,) = costs(small.revised(name="next"), safe.ledger, limits, utc_now())
    assert report.cohorts[0].left_year == pytest.approx(before.left_year, abs=1e-6)
    assert again.left_year == pytest.approx(before.left_year, abs=1e-6)
    assert another.left_year < before.left_year - 1


def test_what_the_policy_forbids_is_said_before_anything_is_signed(
    joined: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    offer(joined, coordinator, small.revised(name="greedy", privacy__epsilon=20.0))
    offer(joined, coordinator, small)
    greedy = json.loads(run("studies", "greedy", "--json"))["studies"][0]
    assert not greedy["permitted"]
    assert {one["rule"] for one in greedy["refusals"]} == {"budget.epsilon_lifetime"}
    text = run("studies", "greedy")
    assert "✗ train: budget.epsilon_lifetime" in text
    policy = (joined / "policy.toml").read_text()
    (joined / "policy.toml").write_text(
        policy.replace("smallest_cohort = 10", "smallest_cohort = 70")
    )
    with open_safe(joined, {}) as safe:
        sign_policy(safe.folder.policy, safe.identity, safe.log)
    facts = json.loads(run("studies", "small", "--json"))["studies"][0]
    assert {one["rule"] for one in facts["refusals"]} == {"release.smallest_cohort"}
    (joined / "data.csv").unlink()  # data that are not there yet are no reason to refuse
    facts = json.loads(run("studies", "small", "--json"))["studies"][0]
    assert facts["permitted"]
    assert not facts["data"]["fits"]


def findings(folder: Path, **options: object) -> dict[str, tuple[bool, str]]:
    found = Examination(folder, **options).findings()  # type: ignore[arg-type]
    return {one.name: (one.is_well, one.text) for one in found}


def test_check_finds_all_in_order(joined: Path, coordinator: FakeCoordinator, small: Study) -> None:
    offer(joined, coordinator, small)
    run("studies")
    run("approve", "small", "--yes")
    text = run("check")
    assert "✗" not in text
    assert "small: 80 rows, 0 cells missing, 0 odd" in text
    assert "for 30 more days" in text
    assert all(one["ok"] for one in json.loads(run("check", "--json"))["findings"])


def test_check_says_what_is_wrong_and_exits_with_two(
    joined: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    def trouble(words: str, name: str) -> None:
        well, text = findings(joined)[name]
        assert not well
        assert words in text
        assert f"✗ {name}" in run("check", code=2)

    settings = (joined / "hospital.toml").read_text()
    (joined / "hospital.toml").write_text("test_noise_seed = 3\n" + settings)
    trouble("NOBODY IS PROTECTED", "noise")
    (joined / "hospital.toml").write_text(settings.replace('"north"', '"nord"'))
    trouble("expected name = 'north'", "link")
    (joined / "hospital.toml").write_text(settings)
    coordinator.clock = lambda: datetime.now(UTC) + timedelta(seconds=90)
    trouble("s behind the coordinator's", "clock")
    coordinator.clock = lambda: datetime.now(UTC) - timedelta(seconds=90)
    trouble("s ahead of the coordinator's", "clock")
    coordinator.clock = lambda: datetime.now(UTC)
    coordinator.revoked = True
    trouble("was revoked or has expired", "connection")
    coordinator.revoked = False
    (joined / "identity").chmod(0o644)
    trouble("expected mode 600", "keys")
    (joined / "identity").chmod(0o600)
    joined.chmod(0o755)
    trouble("chmod 700", "keys")
    joined.chmod(0o700)
    policy = (joined / "policy.toml").read_text()
    (joined / "policy.toml").write_text(policy + "# edited\n")
    trouble("changed after signing", "policy")
    (joined / "policy.toml").write_text(policy)
    offer(joined, coordinator, small)
    run("studies")
    run("approve", "small", "--yes")
    (joined / "data.csv").write_text(f"who,a,ill\nCANARY,{CELL},1\n")
    trouble("b", "data")
    (place,) = (joined / "studies").iterdir()
    answer = (place / "answer.json").read_text()
    (place / "answer.json").write_text(answer.replace("approve", "refuse"))
    trouble("decide again", "studies")
    late = findings(joined, clock=lambda: datetime.now(UTC) + timedelta(days=25))
    assert "expires in 5.0 days" in late["certificate"][1]
    gone = findings(joined, clock=lambda: datetime.now(UTC) + timedelta(days=35))
    assert "has expired; ask the coordinator for a new code" in gone["link"][1]
    log = (joined / "audit.log").read_bytes()
    (joined / "audit.log").write_bytes(log[:-300] + log[-299:])
    trouble("", "ledger")


def test_a_folder_that_has_not_joined(folder: Path) -> None:
    found = findings(folder)
    assert "ask the coordinator for a code" in found["link"][1]
    assert found["policy"][0]
    assert found["ledger"][0]
    for command in (("studies",), ("approve", "x"), ("rotate-key",)):
        with pytest.raises(LinkError, match="has not joined"):
            run(*command)


def test_pause_stops_rounds_and_resume_lets_them_in(
    joined: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    offer(joined, coordinator, small)
    run("studies")
    run("approve", "small", "--yes")
    run("pause")
    with pytest.raises(RefusalError) as refusal, open_hospital(joined, small.digest()):
        pass
    assert refusal.value.rule == "hospital.paused"
    assert json.loads(run("status", "--json", code=2)) == {"running": False, "paused": True}
    run("resume")
    with open_hospital(joined, small.digest()):
        pass
    assert "not running" in run("stop")


def test_visits_countersign_the_log_renew_and_keep_answers_until_they_arrive(
    joined: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    offer(joined, coordinator, small)
    first = Visitor(joined, {}).visit()
    assert first.problems == []
    assert first.studies.new == [small.digest()]
    assert first.is_countersigned
    second = Visitor(joined, {}).visit()
    assert not second.is_countersigned
    coordinator_word = Checkpoint.load(LinkFolder(joined).checkpoint)
    with open_safe(joined, {}) as safe:
        public = safe.identity.public
    verify_log_against(
        joined / "audit.log",
        coordinator_word,
        hospital=public,
        coordinator=coordinator.identity.public,
    )
    serial = LinkFolder(joined).read_certificate().serial_number
    run("studies")
    run("approve", "small", "--yes")
    later = Visitor(joined, {}, clock=lambda: datetime.now(UTC) + timedelta(days=21)).visit()
    assert later.is_renewed
    assert later.is_countersigned
    assert LinkFolder(joined).read_certificate().serial_number != serial
    assert Checkpoint.load(LinkFolder(joined).checkpoint).seq > coordinator_word.seq


def test_while_the_clock_is_off_nothing_is_signed(
    joined: Path, coordinator: FakeCoordinator, small: Study
) -> None:
    offer(joined, coordinator, small)
    run("studies")
    before = (joined / "audit.log").read_bytes()
    coordinator.clock = lambda: datetime.now(UTC) - timedelta(seconds=600)
    visit = Visitor(joined, {}).visit()
    assert visit.is_clock_off
    assert 595 < visit.clock_offset_s < 605
    with pytest.raises(ConsiliumError, match="nothing is signed under a wrong time"):
        run("approve", "small", "--yes")
    assert (joined / "audit.log").read_bytes() == before
    assert coordinator.answers == []
    assert "small (" in run("studies")  # looking is allowed


def test_a_log_cut_behind_the_coordinators_checkpoint_is_a_problem(
    joined: Path, coordinator: FakeCoordinator
) -> None:
    Visitor(joined, {}).visit()
    coordinator.identity = Identity.generate()  # another signer
    LinkFolder(joined).checkpoint.unlink()
    visit = Visitor(joined, {}).visit()
    assert any("checkpoint:" in one for one in visit.problems)
    assert not LinkFolder(joined).checkpoint.exists()


def test_a_rotated_key_connects(joined: Path, coordinator: FakeCoordinator) -> None:
    before = LinkFolder(joined).read_certificate().public_key()
    assert "new key is in use" in run("rotate-key")
    assert LinkFolder(joined).read_certificate().public_key() != before
    assert Visitor(joined, {}).visit().problems == []
