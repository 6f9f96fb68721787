"""Commands of the coordinator that speak to its running service, on the same machine."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

import typer

from common.errors import RunError
from server.settings import CoordinatorFolder

if TYPE_CHECKING:
    from server.admin_client import AdminClient

FolderOption = Annotated[
    Path, typer.Option("--folder", "-C", envvar="CONSILIUM_COORDINATOR", help="From `init`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
NameArgument = Annotated[str, typer.Argument(help="The hospital's name.")]
StudyArgument = Annotated[str, typer.Argument(help="A study's id, or its name.")]

_ENDED = ("finished", "failed", "stopped")

token_app = typer.Typer(
    no_args_is_help=True,
    help="Who may use the admin interface and the web page.",
    epilog="Example: consilium coordinator token list",
)


def add_admin_commands(app: typer.Typer) -> None:
    """Put this module's commands into the coordinator's family."""
    app.registered_commands.extend(_commands.registered_commands)
    app.add_typer(token_app, name="token")


_commands = typer.Typer()


@_commands.command("enroll", epilog="Example: consilium coordinator enroll north")
def enroll(name: NameArgument, folder: FolderOption = Path(), as_json: JsonOption = False) -> None:
    """Invite a hospital: print its join code, once.

    For a hospital that takes part already, whose certificate expired say, the code lets it come
    back with the same identity.
    """
    with _client(folder) as client:
        made = client.post("hospitals", {"name": name})
    _emit(as_json, made, made["code"])
    if not as_json:  # apart from the code, so that `enroll NAME > FILE` holds the code alone
        typer.echo(
            f"Give this code to {name} alone, by a channel of its own; it is used up by "
            f"`consilium hospital join` and expires at {made['expires_at']}.",
            err=True,
        )


@_commands.command("revoke", epilog="Example: consilium coordinator revoke north")
def revoke(name: NameArgument, folder: FolderOption = Path(), as_json: JsonOption = False) -> None:
    """Shut a hospital out, at once and for good; studies left with too few hospitals stop."""
    with _client(folder) as client:
        done = client.delete(f"hospitals/{quote(name, safe='')}")
    stopped = ", ".join(done["stopped_studies"])
    _emit(as_json, done, f"{name} is shut out." + (f" Stopped: {stopped}." if stopped else ""))


@_commands.command("hospitals", epilog="Example: consilium coordinator hospitals --json")
def hospitals(folder: FolderOption = Path(), as_json: JsonOption = False) -> None:
    """Who takes part, who is online, until when certificates hold, who was invited."""
    with _client(folder) as client:
        found = client.get("hospitals")
    lines = [
        f"{one['name']:<24} {_presence(one):<8} certificate until "
        f"{_day(one['certificate_expires_at'])}  {one['identity'][:16]}…"
        for one in found["hospitals"]
    ]
    lines += [
        f"{one['name']:<24} invited  code until {_day(one['expires_at'])}"
        for one in found["invited"]
    ]
    _emit(as_json, found, "\n".join(lines) or "None yet: `consilium coordinator enroll NAME`.")


@_commands.command(
    "submit", epilog="Example: consilium coordinator submit heart.toml --hospitals north,south"
)
def submit(
    study: Annotated[Path, typer.Argument(help="The study file (TOML).", show_default=False)],
    hospitals: Annotated[
        str, typer.Option(help="Names with commas; all enrolled hospitals if left out.")
    ] = "",
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Offer a study; it begins once all have answered and enough of them approve."""
    try:
        text = study.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{study}: no study can be read ({error})") from None
    names = [one.strip() for one in hospitals.split(",") if one.strip()] or None
    with _client(folder) as client:
        made = client.post("studies", {"toml": text, "hospitals": names})
    _emit(as_json, made, f"Offered {made['id']} to {', '.join(made['invited'])}.")


@_commands.command("begin", epilog="Example: consilium coordinator begin heart")
def begin(study: StudyArgument, folder: FolderOption = Path(), as_json: JsonOption = False) -> None:
    """Begin without those who have not answered, or continue a study that failed or was stopped."""
    with _client(folder) as client:
        done = client.post(f"{_path(study)}/begin")
    _emit(as_json, done, f"{done['id']} begins with {', '.join(done['approved'])}.")


@_commands.command(
    "stop-study", epilog="Example: consilium coordinator stop-study heart --reason 'wrong file'"
)
def stop_study(
    study: StudyArgument,
    reason: Annotated[str, typer.Option(help="For the audit log.")] = "",
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Stop a study; what was spent stays spent, and `begin` continues it."""
    with _client(folder) as client:
        done = client.post(f"{_path(study)}/stop", {"reason": reason})
    _emit(as_json, done, f"{done['id']} is stopped.")


@_commands.command("status", epilog="Example: consilium coordinator status --json")
def status(folder: FolderOption = Path(), as_json: JsonOption = False) -> None:
    """The federation at a glance: hospitals online, studies, rounds, ε."""
    with _client(folder) as client:
        found = client.get("status") | {"list": client.get("studies")["studies"]}
    lines = [
        f"{found['address']}: {found['online']} of {found['hospitals']} hospitals online",
        *(_study_line(one) for one in found["list"]),
    ]
    _emit(as_json, found, "\n".join(lines))


@_commands.command("watch", epilog="Example: consilium coordinator watch heart")
def watch(
    study: Annotated[
        str, typer.Argument(help="Watch this one until it ends; all, until Ctrl-C, if left out.")
    ] = "",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between looks.")] = 2.0,
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Show studies as they change; with --json one object a change.

    With a study, the exit code is 0 once it is finished and 1 if it ended otherwise.
    """
    shown: dict[str, str] = {}
    with _client(folder) as client:
        while True:
            one_or_all = [client.get(_path(study))] if study else client.get("studies")["studies"]
            for one in one_or_all:
                line = _study_line(one)
                if shown.get(one["id"]) != line:
                    shown[one["id"]] = line
                    print(json.dumps(one) if as_json else line, flush=True)
            if study and one_or_all[0]["state"] in _ENDED:
                raise typer.Exit(0 if one_or_all[0]["state"] == "finished" else 1)
            time.sleep(every)


@_commands.command("results", epilog="Example: consilium coordinator results heart --to heart/")
def results(
    study: StudyArgument,
    to: Annotated[Path | None, typer.Option(help="A folder for its files.")] = None,
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """A finished study's result and privacy statement; with --to also its files."""
    with _client(folder) as client:
        found = client.get(f"{_path(study)}/results")
        if to is not None:
            _download(client, study, found["files"], to)
    hospitals = ", ".join(found["result"].get("hospitals", ()))
    privacy = found["privacy"]
    text = f"{found['id']}: {hospitals}"
    if privacy.get("epsilon_spent") is not None:
        text += f"; ε {privacy['epsilon_spent']:.3f} at δ {privacy['delta']} per {privacy['unit']}"
    if to is not None:
        text += f"\n{len(found['files'])} files in {to}"
    _emit(as_json, found, text)


@_commands.command("renew-certificate", epilog="Example: consilium coordinator renew-certificate")
def renew_certificate(folder: FolderOption = Path(), as_json: JsonOption = False) -> None:
    """Replace the coordinator's own TLS key and certificate now; it also happens in time."""
    with _client(folder) as client:
        done = client.post("certificate")
    _emit(as_json, done, f"In use: certificate {done['serial']}.")


@_commands.command("start", epilog="Example: consilium coordinator start -C /srv/coordinator")
def start(folder: FolderOption = Path()) -> None:
    """Run the coordinator's services until stopped; what dies is started again."""
    import logging

    from server.coordinator import run_coordinator

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settings = CoordinatorFolder(folder).load_settings()
    page = f"http://127.0.0.1:{settings.admin_port}/"
    run_coordinator(
        folder,
        lambda: print(f"Hospitals: {settings.address}. Page: {page}", flush=True),
    )


@_commands.command("stop", epilog="Example: consilium coordinator stop")
def stop(folder: FolderOption = Path(), as_json: JsonOption = False) -> None:
    """Stop the service; studies go on from their last finished round at the next start."""
    from server.coordinator import stop_coordinator

    stop_coordinator(CoordinatorFolder(folder))
    _emit(as_json, {"stopped": str(folder)}, "Stopped.")


@token_app.command(
    "create", epilog="Example: consilium coordinator token create anna --role operator"
)
def token_create(
    name: Annotated[str, typer.Argument(help="Whose token it is.")],
    role: Annotated[
        Literal["viewer", "operator", "admin"],
        typer.Option(help="viewer reads; operator runs studies; admin decides who takes part."),
    ] = "viewer",
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it, once."""
    with _client(folder) as client:
        made = client.post("tokens", {"name": name, "role": role})
    _emit(as_json, made, made["token"])


@token_app.command("list", epilog="Example: consilium coordinator token list")
def token_list(folder: FolderOption = Path(), as_json: JsonOption = False) -> None:
    """Who holds tokens, with which role."""
    with _client(folder) as client:
        found = client.get("tokens")
    lines = [
        f"{one['name']:<24} {one['role']:<9} "
        + (f"revoked {_day(one['revoked_at'])}" if one["revoked_at"] else "in force")
        for one in found["tokens"]
    ]
    _emit(as_json, found, "\n".join(lines))


@token_app.command("revoke", epilog="Example: consilium coordinator token revoke anna")
def token_revoke(
    name: Annotated[str, typer.Argument(help="Whose token it is.")],
    folder: FolderOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Let a token count no longer."""
    with _client(folder) as client:
        client.delete(f"tokens/{quote(name, safe='')}")
    _emit(as_json, {"revoked": name}, f"The token of {name} counts no longer.")


def _client(folder: Path) -> AdminClient:
    from server.admin_client import AdminClient

    return AdminClient(CoordinatorFolder(folder), os.environ)


def _download(client: AdminClient, study: str, names: list[str], to: Path) -> None:
    from common.files import write_atomically

    for name in names:
        data = client.download(f"{_path(study)}/files/{quote(name, safe='')}")
        try:
            write_atomically(to / Path(name).name, data)
        except OSError as error:
            raise RunError(f"{to}: cannot be written ({error.strerror})") from None


def _path(study: str) -> str:
    return f"studies/{quote(study, safe='')}"


def _presence(hospital: dict[str, Any]) -> str:
    if hospital["revoked_at"]:
        return "revoked"
    return "online" if hospital["online"] else "offline"


def _day(stamp: str | None) -> str:
    return stamp[:10] if stamp else "—"


def _study_line(one: dict[str, Any]) -> str:
    spent = "" if one["epsilon_spent"] is None else f"  ε {one['epsilon_spent']:.3f}"
    waiting = f"  waiting for {', '.join(one['pending'])}" if one["state"] == "offered" else ""
    error = f"  {one['last_error']}" if one["last_error"] else ""
    rounds = f"{one['rounds_finished']:>4} of {one['rounds_planned']} rounds"
    return f"{one['id']:<32} {one['state']:<9}{rounds}{spent}{waiting}{error}"


def _emit(as_json: bool, value: Any, text: str) -> None:
    print(json.dumps(value) if as_json else text)
