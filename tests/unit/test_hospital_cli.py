"""The hospital's commands, from creation to the report, and its consent list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from client.budget import budget_report, rounds_left
from client.cli import hospital_app
from client.consent import Withdrawals, apply_consent, read_withdrawals
from client.ledger import Ledger
from client.safe import create_safe, open_safe
from client.spend import Limits
from common.auditlog import utc_now
from common.checkpoint import Checkpoint, countersign
from common.errors import (
    AuditError,
    ConsiliumError,
    PolicyError,
    RefusalError,
    SecretError,
)
from common.identity import Identity, PublicIdentity
from common.privacy.accounting import GaussianEvent, epsilon
from common.privacy.units import PrivacyUnit, Relation

EVENT = GaussianEvent(noise_multiplier=12.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("CONSILIUM_KEY", "CONSILIUM_KEY_FILE", "CONSILIUM_PASSPHRASE"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "hospital"
    monkeypatch.setenv("CONSILIUM_HOSPITAL", str(path))
    create_safe(path, {})
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(hospital_app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def spend(ledger: Ledger, limits: Limits, study: str, patients: range, rounds: int) -> None:
    for number in range(rounds):
        ledger.reserve(
            study=study,
            study_digest="0" * 64,
            stage="finetune",
            round_number=number,
            attempt=0,
            request_digest=f"{study} {number}",
            unit=PrivacyUnit.PATIENT,
            relation=Relation.ADD_REMOVE,
            records_per_patient=1,
            cohort=ledger.cohort(f"p{i}" for i in patients),
            events=[EVENT],
            limits=limits,
        )


def commands(app: typer.Typer, prefix: str = "") -> list[str]:
    found = [
        prefix + (command.name or command.callback.__name__)  # type: ignore[union-attr]
        for command in app.registered_commands
    ]
    for group in app.registered_groups:
        assert group.typer_instance is not None
        found += commands(group.typer_instance, f"{prefix}{group.name} ")
    return found


@pytest.mark.parametrize("command", commands(hospital_app))
def test_every_commands_help_ends_with_an_example(command: str) -> None:
    page = run(*command.split(), "--help")
    last_words = " ".join(page.split()).rsplit("Example: ", 1)[1]
    assert last_words.startswith(f"consilium hospital {command}")


def test_a_new_hospital_is_private_and_whole(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    public = {"identity.pub", "policy.toml.sig"}
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == (0o644 if path.name in public else 0o600)
    assert "signed, in force" in run("policy", "check")
    assert json.loads(run("policy", "show", "--json"))["budget"]["epsilon_lifetime"] == 8.0
    assert json.loads(run("log", "verify", "--json"))["records"] == 3
    with pytest.raises(SecretError, match="expected a new or empty folder"):
        run("init", str(folder))


def test_the_key_may_live_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "key").rename(tmp_path / "safe")
    with pytest.raises(SecretError, match="key: cannot be read"), open_safe(folder, {}):
        pass
    with open_safe(folder, {"CONSILIUM_KEY_FILE": str(tmp_path / "safe")}) as safe:
        first = safe.noise()
    encoded = (tmp_path / "safe").read_text().strip()
    with open_safe(folder, {"CONSILIUM_KEY": encoded}) as safe:
        assert safe.noise() == first
        assert safe.log.latest("key_used") is not None


def test_a_hospital_may_be_created_under_a_passphrase(tmp_path: Path) -> None:
    environ = {"CONSILIUM_PASSPHRASE": "correct horse"}
    create_safe(tmp_path / "h", environ)
    assert not (tmp_path / "h" / "key").exists()
    with (
        pytest.raises(SecretError, match="does not open it"),
        open_safe(tmp_path / "h", {"CONSILIUM_PASSPHRASE": "wrong"}),
    ):
        pass


def test_the_budget_shows_who_spent_what_and_what_is_left(folder: Path) -> None:
    with open_safe(folder, {}) as safe:
        limits = safe.policy().limits()
        spend(safe.ledger, limits, "heart", range(100), 4)
        spend(safe.ledger, limits, "lung", range(50, 200), 2)
    report = json.loads(run("budget", "--json"))
    heart, lung = report["cohorts"]

    def cost(rounds: int) -> float:
        event = GaussianEvent(noise_multiplier=12.0, steps=rounds)
        return epsilon([event], delta=1e-6, relation=Relation.ADD_REMOVE)

    assert report["patients"] == 200
    assert (heart["patients"], lung["patients"]) == (100, 150)
    # The worst-off patient of either cohort was in both studies.
    assert heart["spent_lifetime"] == lung["spent_lifetime"] == pytest.approx(cost(6))
    assert heart["left_year"] == pytest.approx(3.0 - cost(6))
    assert heart["studies"][0]["epsilon_alone"] == pytest.approx(cost(4))
    assert (heart["studies"][0]["releases"], heart["studies"][0]["unresolved"]) == (4, 4)
    shares = {one["share"]: one["spent_lifetime"] for one in report["quantiles"]}
    assert shares[0.0] == shares[0.5] == pytest.approx(cost(2))
    assert shares[0.75] == pytest.approx(cost(4))
    assert shares[1.0] == pytest.approx(cost(6))
    left = heart["rounds_left"]
    assert cost(6 + left) <= 3.0 < cost(7 + left)
    words = run("budget").replace("│", " ").split()
    assert words[words.index("heart") : words.index("heart") + 4] == ["heart", "finetune", "4", "4"]
    # The forecast keeps its word.
    with open_safe(folder, {}) as safe:
        spend(safe.ledger, limits, "more", range(100), left)
        with pytest.raises(RefusalError):
            spend(safe.ledger, limits, "too much", range(100), 1)
        again = budget_report(safe.ledger, limits, utc_now())
        assert again.cohorts[0].rounds_left == 0
        charge = safe.ledger.entries()[0].charge
        assert rounds_left([], charge, limits, utc_now()) == 6 + left


def test_withdrawals_are_kept_applied_and_logged_as_hashes(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "today.txt"
    listed.write_text("CANARY-2\n\n")
    assert json.loads(run("withdraw", "CANARY-1", "--file", str(listed), "--json")) == {
        "withdrawn": 2
    }
    assert "0 more patients" in run("withdraw", " CANARY-1 ")
    with open_safe(folder, {}) as safe:
        left = apply_consent(
            safe.withdrawals(safe.policy()),
            ["p1", "CANARY-1", "p2", " CANARY-2"],
            ledger=safe.ledger,
            log=safe.log,
            study="s",
            round_number=1,
        )
    assert left == ["p1", "p2"]
    log = (folder / "audit.log").read_text()
    assert "CANARY" not in log
    assert '"withdrawn":2' in log
    assert "CANARY" not in repr(Withdrawals(frozenset({"CANARY"})))
    with pytest.raises(PolicyError, match="one line that does not start with #"):
        run("withdraw", "#1")
    (folder / "withdrawals.txt").unlink()
    with pytest.raises(PolicyError, match="an empty file says that nobody withdrew"):
        read_withdrawals(folder / "withdrawals.txt")


def test_a_checkpoint_goes_to_the_coordinator_and_back(folder: Path, tmp_path: Path) -> None:
    coordinator = Identity.generate()
    coordinator.public.save(tmp_path / "coordinator.pub")
    sent = Checkpoint.from_text(run("log", "checkpoint"))
    answer = countersign(
        sent,
        coordinator=coordinator,
        hospital=PublicIdentity.load(folder / "identity.pub"),
        previous=None,
    )
    (tmp_path / "answer.json").write_text(answer.text())
    with_key = ("--coordinator", str(tmp_path / "coordinator.pub"))
    run("log", "checkpoint", str(tmp_path / "answer.json"), *with_key)
    assert "checkpoint" in run("log", "show", "--last", "1")
    verify = ("log", "verify", "--checkpoint", str(tmp_path / "answer.json"), *with_key)
    assert "complete up to the checkpoint" in run(*verify)
    lines = (folder / "audit.log").read_bytes().splitlines(keepends=True)
    (folder / "audit.log").write_bytes(b"".join(lines[:2]))
    with pytest.raises(AuditError, match="the end was cut off"):
        run(*verify)
    for half in (("log", "verify", *with_key), ("log", "checkpoint", *with_key)):
        with pytest.raises(AuditError, match="together"):
            run(*half)


def test_a_draft_is_checked_without_being_signed(folder: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft.toml"
    text = (folder / "policy.toml").read_text()
    draft.write_text(text)
    assert "valid, not signed" in run("policy", "check", str(draft))
    draft.write_text(text.replace("stages", "stage"))
    with pytest.raises(ConsiliumError, match="did you mean 'stages'"):
        run("policy", "check", str(draft))
    (folder / "policy.toml").write_text(text.replace("fewest_peers = 2", "fewest_peers = 0"))
    with pytest.raises(PolicyError, match="changed after signing"):
        run("policy", "check")
    assert "In force" in run("policy", "sign")
    assert "fewest_peers = 0" in run("policy", "show")
