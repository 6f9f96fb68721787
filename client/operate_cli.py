"""`consilium hospital …`: the link to the coordinator, studies, and the daemon."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConsiliumError, LinkError, MessageError

if TYPE_CHECKING:
    from client.safe import Safe
    from client.studies import Decision, Member

operate_app = typer.Typer()

Folder = Annotated[
    Path,
    typer.Option("--folder", "-C", envvar="CONSILIUM_HOSPITAL", help="The hospital's folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StudyWord = Annotated[str, typer.Argument(help="Its name, or the start of its digest.")]


@operate_app.command(epilog="Example: consilium hospital join --file code.txt")
def join(
    file: Annotated[
        Path | None, typer.Option(help="Holds the join code; else it is asked for.")
    ] = None,
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Join the coordinator that gave the code. May be repeated after an interruption.

    The code is a secret until it is used, so it is no argument: those can be seen by others.
    """
    from client.link import join as join_coordinator
    from client.safe import open_safe
    from common.enrolment import JoinCode
    from common.secretfiles import WrappingKey

    code = JoinCode.from_text(_code(file))
    with open_safe(folder) as safe:
        wrapping = WrappingKey.of_folder(folder, os.environ)
        facts = join_coordinator(folder, code, safe.identity, wrapping)
        fingerprint = safe.identity.public.fingerprint
    show(
        {
            "address": facts.address,
            "name": facts.name,
            "coordinator": facts.identity.fingerprint,
            "fingerprint": fingerprint,
        },
        as_json,
        f"Joined {facts.address} as {facts.name}.\n"
        f"Compare by telephone: theirs {facts.identity.fingerprint}\n"
        f"                      ours   {fingerprint}\n"
        f'Next: name = "{facts.name}" in {folder / "hospital.toml"}, then '
        f"`consilium hospital check`.",
    )


@operate_app.command(epilog="Example: consilium hospital check --json")
def check(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Look at data, policy, keys, ledger, log, clock and connection; say what to do.

    Exits with code 2 when anything is not in order.
    """
    from client.check import Examination

    findings = Examination(folder).findings()
    facts = [{"name": one.name, "ok": one.is_well, "text": one.text} for one in findings]
    show({"findings": facts}, as_json, "\n".join(one.line for one in findings))
    if not all(one.is_well for one in findings):
        raise typer.Exit(2)


@operate_app.command(epilog="Example: consilium hospital start --folder /srv/consilium")
def start(
    folder: Folder = Path(),
    health_port: Annotated[
        int, typer.Option(help="Loopback port of /health and /metrics; 0 takes a free one.")
    ] = 8450,
    drain_s: Annotated[
        float, typer.Option(help="How long the message in hand may take when stopping.")
    ] = 90.0,
) -> None:
    """Take part: run until stopped. SIGTERM finishes the message in hand, a second one does not."""
    from client.daemon import Daemon, DaemonOptions

    Daemon(folder, DaemonOptions(health_port=health_port, drain_s=drain_s)).run()


@operate_app.command(epilog="Example: consilium hospital stop --wait 300")
def stop(
    folder: Folder = Path(),
    wait: Annotated[float, typer.Option(help="Seconds to wait for its end.")] = 120.0,
    now: Annotated[bool, typer.Option("--now", help="Do not finish the message in hand.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop the daemon."""
    from client.running import stop_daemon

    was_running = stop_daemon(folder, wait_s=wait, at_once=now)
    show({"stopped": was_running}, as_json, "Stopped." if was_running else "It was not running.")


@operate_app.command(epilog="Example: consilium hospital status --json")
def status(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Say how the daemon is doing. Exits with code 2 when it is not running or not well."""
    from client.running import PAUSED, daemon_state

    found = daemon_state(folder)
    paused = (folder / PAUSED).exists()
    facts = {"running": found is not None, "paused": paused} | (asdict(found) if found else {})
    lines = [f"Daemon: {found.state if found else 'not running'}" + ("; paused" * paused)]
    if found is not None:
        lines += [
            f"  {name:<10} {'ready' if one['ready'] else 'not ready'}, {one['restarts']} restarts"
            for name, one in found.services.items()
        ]
        lines.append(f"  coordinator: {found.coordinator}")
        if found.certificate_days is not None:
            lines.append(f"  certificate: {found.certificate_days:.0f} more days")
        if found.test_noise:
            lines.append("  ✗ TEST NOISE: hospital.toml sets test_noise_seed; NOBODY IS PROTECTED")
    show(facts, as_json, "\n".join(lines))
    if found is None or not found.is_well:
        raise typer.Exit(2)


@operate_app.command(epilog="Example: consilium hospital pause --folder /srv/consilium")
def pause(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Answer no round until `resume`; the coordinator learns the rule hospital.paused."""
    from client.running import PAUSED
    from common.secretfiles import replace_file

    replace_file(folder / PAUSED, b"")
    show({"paused": True}, as_json, "Paused: rounds are refused from now on.")


@operate_app.command(epilog="Example: consilium hospital resume --folder /srv/consilium")
def resume(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Answer rounds again."""
    from client.running import PAUSED

    (folder / PAUSED).unlink(missing_ok=True)
    show({"paused": False}, as_json, "Rounds are answered again.")


@operate_app.command(epilog="Example: consilium hospital studies heart")
def studies(
    study: Annotated[
        str, typer.Argument(help="One study, by name or start of digest; else all.")
    ] = "",
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Show what is offered: what it reads, who takes part, what it costs, whether it is permitted.

    Everything is worked out here; nothing is sent. New offers are fetched if the coordinator can
    be reached.
    """
    from client.approvals import study_folders
    from client.describe import describe_study, printable, study_lines
    from client.studies import find_study
    from common.auditlog import utc_now

    with _membership(folder) as (safe, member):
        try:
            trouble = _sync(folder, safe, member)
        except ConsiliumError as error:
            trouble = str(error)  # what is here can be shown all the same
        places = [find_study(folder, study)] if study else list(study_folders(folder))
        found = [describe_study(folder, place, safe, utc_now()) for place in places]
    lines = [line for facts in found for line in (*study_lines(facts), "")]
    if trouble:
        print(f"consilium: {printable(trouble)}", file=sys.stderr)
    show({"studies": found}, as_json, "\n".join(lines).rstrip() or "No study was offered yet.")


@operate_app.command(epilog="Example: consilium hospital approve heart")
def approve(
    study: StudyWord,
    new_key: Annotated[
        list[str] | None,
        typer.Option(help="A hospital whose changed key you have compared by telephone."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Let a study in: signed, logged, and sent to the coordinator. `refuse` takes it back."""
    _decide(folder, study, "approve", "", new_key or [], ask=not (yes or as_json), as_json=as_json)


@operate_app.command(epilog="Example: consilium hospital refuse heart --reason 'no consent'")
def refuse(
    study: StudyWord,
    reason: Annotated[str, typer.Option(help="For the coordinator; it is public.")] = "",
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Keep a study out, also one that was approved: its rounds end at once."""
    _decide(folder, study, "refuse", reason, [], ask=False, as_json=as_json)


@operate_app.command("rotate-key", epilog="Example: consilium hospital rotate-key")
def rotate_key(folder: Folder = Path(), as_json: AsJson = False) -> None:
    """Replace the key that this hospital connects with; a running daemon takes it up."""
    from client.link import connect, renew
    from common.secretfiles import WrappingKey

    with _membership(folder) as (safe, _):
        wrapping = WrappingKey.of_folder(folder, os.environ)
        with connect(folder, wrapping) as coordinator:
            made = renew(folder, coordinator, safe.identity, wrapping, with_new_key=True)
    until = made.not_valid_after_utc
    show({"expires": until.isoformat()}, as_json, f"A new key is in use, certified to {until:%F}.")


def show(facts: Any, as_json: bool, text: str) -> None:
    """Print one of the two."""
    typer.echo(json.dumps(_finite(facts), indent=2) if as_json else text)


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return "infinite" if isinstance(value, float) and math.isinf(value) else value


def _code(file: Path | None) -> str:
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        if not sys.stdin.isatty():
            return sys.stdin.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise MessageError(f"join code: cannot be read ({error})") from None
    return str(typer.prompt("Join code", hide_input=True))


@contextmanager
def _membership(folder: Path) -> Iterator[tuple[Safe, Member]]:
    from client.linkfolder import LinkFolder
    from client.safe import open_safe
    from client.studies import Member

    facts = LinkFolder(folder).facts()
    with open_safe(folder) as safe:
        yield (
            safe,
            Member(name=facts.name, coordinator=facts.identity, identity=safe.identity),
        )


def _decide(
    folder: Path,
    word: str,
    decision: Decision,
    reason: str,
    new_keys: list[str],
    *,
    ask: bool,
    as_json: bool,
) -> None:
    from client.studies import decide, find_study
    from common.auditlog import utc_now

    with _membership(folder) as (safe, member):
        trouble = _sync(folder, safe, member)
        place = find_study(folder, word)
        if ask:
            from client.describe import describe_study, study_lines

            typer.echo("\n".join(study_lines(describe_study(folder, place, safe, utc_now()))))
            typer.confirm("Let this study in?", abort=True)
        answer = decide(
            folder,
            place.digest,
            decision,
            member,
            safe.log,
            now=utc_now(),
            reason=reason,
            new_keys=new_keys,
        )
        trouble = trouble or _sync(folder, safe, member)
    word = {"approve": "Approved", "refuse": "Refused"}[answer.decision]
    sent = f"The coordinator will be told: {trouble}" if trouble else "The coordinator knows."
    show(
        {"digest": answer.digest, "decision": answer.decision, "sent": not trouble},
        as_json,
        f"{word}: {answer.digest[:12]}… {sent}",
    )


def _sync(folder: Path, safe: Safe, member: Member) -> str:
    """Fetch offers and hand in answers; why not, if the coordinator cannot be reached."""
    from client.link import connect
    from client.studies import sync_studies
    from client.visits import LARGEST_OFFSET_S
    from common.secretfiles import WrappingKey

    try:
        with connect(folder, WrappingKey.of_folder(folder, os.environ)) as coordinator:
            offset = coordinator.clock_offset_s()
            if abs(offset) > LARGEST_OFFSET_S:
                raise ConsiliumError(
                    f"this machine's clock is {abs(offset):.0f} s off the coordinator's; correct "
                    f"it first: nothing is signed under a wrong time"
                )
            report = sync_studies(folder, coordinator, member, safe.log)
    except LinkError as error:
        return str(error)
    return "; ".join(report.unusable.values())
