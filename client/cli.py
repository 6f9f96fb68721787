"""`consilium hospital …`: what a hospital's operator runs beside the data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from client.operate_cli import AsJson, Folder, operate_app, show
from common.auditlog import Fact, read_records, utc_now, verify_log
from common.checkpoint import Checkpoint, make_checkpoint, verify_checkpoint, verify_log_against
from common.errors import AuditError, PolicyError
from common.identity import PublicIdentity

if TYPE_CHECKING:
    from client.budget import BudgetReport

hospital_app = typer.Typer(
    name="hospital",
    help="Run beside a hospital's data: daemon, studies, keys, policy, budget, log, consent.",
    epilog="Example: consilium hospital check",
    no_args_is_help=True,
    rich_markup_mode=None,
)
policy_app = typer.Typer(
    help="What this hospital permits.",
    epilog="Example: consilium hospital policy show",
    no_args_is_help=True,
    rich_markup_mode=None,
)
log_app = typer.Typer(
    help="What happened, signed.",
    epilog="Example: consilium hospital log verify",
    no_args_is_help=True,
    rich_markup_mode=None,
)
hospital_app.add_typer(policy_app, name="policy")
hospital_app.add_typer(log_app, name="log")
hospital_app.registered_commands += operate_app.registered_commands


@hospital_app.command(epilog="Example: consilium hospital init /srv/consilium")
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    as_json: AsJson = False,
) -> None:
    """Create a hospital: keys, a signed default policy, an empty ledger, a log, a hospital.toml."""
    from client.hospitalfile import write_template
    from client.safe import create_safe

    created = create_safe(folder)
    settings = write_template(folder)
    fingerprint = created.public().fingerprint
    show(
        {"folder": str(folder), "fingerprint": fingerprint},
        as_json,
        f"Created {folder}. Fingerprint, for the coordinator: {fingerprint}\n"
        f"Next: move {folder / 'key'} off this disk (set CONSILIUM_KEY_FILE), fill in {settings}, "
        f"edit {created.policy}, then `consilium hospital policy sign` and `join`.",
    )


@policy_app.command(
    "show", epilog="Example: consilium hospital policy show --folder /srv/consilium"
)
def policy_show(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Print the policy in force."""
    from client.safe import SafeFolder, open_safe

    with open_safe(folder) as safe:
        policy = safe.policy()
    show(policy.model_dump(mode="json"), as_json, SafeFolder(folder).policy.read_text())


@policy_app.command(
    "sign", epilog="Example: consilium hospital policy sign --folder /srv/consilium"
)
def policy_sign(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Check the policy, sign it and put it in force."""
    from client.policyfile import sign_policy
    from client.safe import open_safe

    with open_safe(folder) as safe:
        digest = sign_policy(safe.folder.policy, safe.identity, safe.log)
    show({"policy_digest": digest}, as_json, f"In force: policy {digest[:16]}…")


@policy_app.command("check", epilog="Example: consilium hospital policy check draft.toml")
def policy_check(
    draft: Annotated[Path | None, typer.Argument(help="A draft; else the one in force.")] = None,
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Check a draft, or that the policy in force is the one signed last."""
    from client.policyfile import parse_policy
    from client.safe import open_safe

    if draft is None:
        with open_safe(folder) as safe:
            safe.policy()
        found = "signed, in force"
    else:
        try:
            parse_policy(draft.read_bytes(), str(draft))
        except OSError as error:
            raise PolicyError(f"{draft}: cannot be read ({error.strerror})") from None
        found = "valid, not signed"
    show({"policy": found}, as_json, f"Policy: {found}.")


@hospital_app.command(epilog="Example: consilium hospital budget --json")
def budget(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Show what was spent, by which study, what remains and how many more rounds fit."""
    from client.budget import budget_report
    from client.safe import open_safe

    with open_safe(folder) as safe:
        report = budget_report(safe.ledger, safe.policy().limits(), utc_now())
    if as_json:
        show(asdict(report), as_json, "")
    else:
        _print_budget(report)


@hospital_app.command(epilog="Example: consilium hospital withdraw --file withdrawn-today.txt")
def withdraw(
    patients: Annotated[list[str] | None, typer.Argument(help="Patient ids.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file of ids, one a line.")] = None,
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Leave patients out of every round from now on.

    Ids on the command line stay in the shell's history; a file does not.
    """
    from client.consent import withdraw as withdraw_consent
    from client.safe import open_safe

    try:
        listed = file.read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{file}: cannot be read ({error})") from None
    ids = [*(patients or []), *(line for line in listed if line.strip())]
    with open_safe(folder) as safe:
        path = safe.withdrawals(safe.policy())
        new = withdraw_consent(path, ids, ledger=safe.ledger, log=safe.log)
    show({"withdrawn": new}, as_json, f"{new} more patients are left out from now on.")


@log_app.command("show", epilog="Example: consilium hospital log show --last 5")
def log_show(
    folder: Folder = Path(),
    last: Annotated[int, typer.Option(min=1, help="How many of the newest records.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Print the newest records of the audit log."""
    from client.safe import SafeFolder

    records = list(read_records(SafeFolder(folder).audit_log))[-last:]
    lines = [
        f"{one.seq:>6} {one.time:%Y-%m-%d %H:%M:%S} {one.kind:<15} "
        + " ".join(f"{name}={str(fact)[:40]}" for name, fact in sorted(one.facts.items()))
        for one in records
    ]
    found = [{**asdict(one), "time": one.time.isoformat()} for one in records]
    show({"records": found}, as_json, "\n".join(lines))


@log_app.command(
    "verify",
    epilog="Example: consilium hospital log verify --checkpoint cp.json --coordinator co.pub",
)
def log_verify(
    folder: Folder = Path(),
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint countersigned by the coordinator.")
    ] = None,
    coordinator: Annotated[Path | None, typer.Option(help="The coordinator's key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find any edit, deletion or reordering; with a checkpoint also a cut end. Needs no secret."""
    from client.safe import SafeFolder

    place = SafeFolder(folder)
    if (checkpoint is None) != (coordinator is None):
        raise AuditError("verify: expected --checkpoint and --coordinator together")
    if checkpoint is None or coordinator is None:
        heads = verify_log(place.audit_log, place.public())
        scope = "a cut end is not excluded: give a countersigned --checkpoint"
    else:
        heads = verify_log_against(
            place.audit_log,
            Checkpoint.load(checkpoint),
            hospital=place.public(),
            coordinator=PublicIdentity.load(coordinator),
        )
        scope = "complete up to the checkpoint"
    facts = {"records": len(heads), "head": heads[-1], "scope": scope}
    show(facts, as_json, f"{len(heads)} records verified; {scope}.")


@log_app.command(
    "checkpoint", epilog="Example: consilium hospital log checkpoint > checkpoint.json"
)
def log_checkpoint(
    countersigned: Annotated[
        Path | None, typer.Argument(help="The coordinator's answer, to be recorded.")
    ] = None,
    coordinator: Annotated[Path | None, typer.Option(help="The coordinator's key.")] = None,
    folder: Folder = Path(),
) -> None:
    """Print a signed checkpoint for the coordinator, or record its countersigned answer."""
    from client.safe import open_safe

    if (countersigned is None) != (coordinator is None):
        raise AuditError("checkpoint: expected the answer and --coordinator together")
    with open_safe(folder) as safe:
        if countersigned is None or coordinator is None:
            typer.echo(make_checkpoint(safe.log, safe.identity).text())
            return
        answer = Checkpoint.load(countersigned)
        verify_checkpoint(
            answer,
            hospital=safe.identity.public,
            coordinator=PublicIdentity.load(coordinator),
        )
        facts: dict[str, Fact] = {
            "checkpoint_seq": answer.seq,
            "checkpoint_head": answer.head,
            "coordinator": answer.coordinator,
        }
        safe.log.append("checkpoint", facts)
    typer.echo(json.dumps(facts))


def _print_budget(report: BudgetReport) -> None:
    limits = report.limits
    typer.echo(
        f"Limits per patient: ε {limits.epsilon_lifetime:g} in all, {limits.epsilon_per_year:g} "
        f"in 365 days, at δ {limits.delta:g} ({limits.relation}). {report.patients} patients."
    )
    cohorts = Table("cohort", "patients", "ε spent", "ε this year", "ε left", "rounds left")
    studies = Table("cohort", "study", "stage", "releases", "unresolved", "ε alone")
    for row in report.cohorts:
        left = min(row.left_lifetime, row.left_year)
        spent = (f"{value:.3g}" for value in (row.spent_lifetime, row.spent_year, left))
        cohorts.add_row(row.cohort, str(row.patients), *spent, str(row.rounds_left))
        for one in row.studies:
            counts = (str(one.releases), str(one.unresolved), f"{one.epsilon_alone:.3g}")
            studies.add_row(row.cohort, one.study, one.stage, *counts)
    shares = Table("share of patients", "ε spent at most", "ε this year at most")
    for share in report.quantiles:
        figures = (f"{share.spent_lifetime:.3g}", f"{share.spent_year:.3g}")
        shares.add_row(f"{share.share:.0%}", *figures)
    Console().print(cohorts, studies, shares)
