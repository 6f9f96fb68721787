"""A whole federation on one machine: coordinator and hospitals as separate hosts and processes.

Each host has its own network namespace (root and ``ip`` needed), joined by a bridge in another one;
nothing of it reaches outside. Hosts only ever use the public command line.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONSILIUM = (sys.executable, "-m", "simulations.cli")
DISK_MIB = 256
COORDINATOR_IP = "192.0.2.1"  # TEST-NET-1 (RFC 5737), inside the namespaces alone


def why_not() -> str:
    """Why this machine cannot hold a federation; empty when it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for program in ("ip", "nginx"):
        if shutil.which(program) is None:
            return f"needs {program}"
    probe = f"cp{secrets.token_hex(3)}"
    if (
        subprocess.run(["ip", "netns", "add", probe], check=False, capture_output=True).returncode
        != 0
    ):
        return "cannot make network namespaces here"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return ""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def wait_for(found: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while (began := time.monotonic()) < deadline:
        if value := found():
            return value
        # To look may take a command of its own: most of the machine is left to what is waited for.
        time.sleep(max(0.25, 2 * (time.monotonic() - began)))
    raise AssertionError(f"did not happen within {seconds:.0f} s: {what}")


def children(pid: int) -> dict[int, str]:
    """All processes below ``pid``, with their command lines."""
    found: dict[int, str] = {}
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(OSError):
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
                found[int(child)] = line.decode(errors="replace")
                found |= children(int(child))
    return found


@dataclass
class Host:
    """A machine: its namespace, its address, its folder, and the service that runs on it."""

    name: str
    namespace: str
    address: str
    folder: Path
    environ: dict[str, str]
    service: subprocess.Popen[bytes] | None = None

    @property
    def inside(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def command(self, *arguments: str, fails: bool = False, timeout_s: float = 120) -> str:
        """A command's output; it must succeed, or fail where that is expected."""
        done = subprocess.run(
            [*self.inside, *CONSILIUM, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environ,
            cwd=self.folder.parent,
        )
        if fails:
            assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
            return done.stdout + done.stderr
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.command(*arguments, "--json"))

    def start(self, *arguments: str, **more: str) -> None:
        """Start the service; ``more``: environment variables of its own."""
        log = (self.folder.parent / f"{self.name}.out").open("ab")
        self.service = subprocess.Popen(
            [*self.inside, *CONSILIUM, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environ | more,
            cwd=self.folder.parent,
            start_new_session=True,
        )
        log.close()

    def processes(self) -> dict[int, str]:
        return children(self.service.pid) if self.service else {}

    def pid_of(self, part: str) -> int:
        """The first process whose command line holds ``part``."""
        return int(
            wait_for(
                lambda: next((pid for pid, line in self.processes().items() if part in line), None),
                30,
                f"{self.name}: a process with {part!r}",
            )
        )

    def kill(self, part: str) -> int:
        """SIGKILL to it; the process that was killed."""
        pid = self.pid_of(part)
        os.kill(pid, signal.SIGKILL)
        return pid

    def crash(self) -> None:
        """SIGKILL to the service; the kernel ends what it started."""
        assert self.service is not None
        below = self.processes()
        self.service.kill()
        self.service.wait(30)
        wait_for(lambda: not any(_alive(pid) for pid in below), 30, f"{self.name} is gone")
        self.service = None

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM to the service; its exit code."""
        assert self.service is not None
        self.service.terminate()
        try:
            code = self.service.wait(seconds)
        except subprocess.TimeoutExpired:
            self.crash()
            raise
        self.service = None
        return code

    def cut(self, *, off: bool) -> None:
        """Pull the network cable, or put it back."""
        ip("-n", self.namespace, "link", "set", "eth0", "down" if off else "up")


@dataclass
class Network:
    """The namespaces: one with a bridge, one for each host."""

    tag: str = field(default_factory=lambda: f"c{secrets.token_hex(3)}")
    hosts: int = 0

    def __post_init__(self) -> None:
        self.switch = f"{self.tag}sw"
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")

    def attach(self, address: str) -> str:
        """A new namespace with ``address`` on the bridge."""
        self.hosts += 1
        name, port = f"{self.tag}h{self.hosts}", f"p{self.hosts}"
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", port, "netns", self.switch, "type", "veth", "peer", "eth0", "netns", name)
        ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        return name

    def remove(self) -> None:
        names = [self.switch, *(f"{self.tag}h{one + 1}" for one in range(self.hosts))]
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@dataclass
class Federation:
    """One coordinator and its hospitals."""

    folder: Path
    network: Network
    coordinator: Host
    hospitals: dict[str, Host]

    def start_coordinator(self) -> None:
        self.coordinator.start("coordinator", "start", "--folder", str(self.coordinator.folder))
        wait_for(self.answers, 90, f"the coordinator is up; see {self.coordinator.folder}/logs")

    def answers(self) -> bool:
        with suppress(AssertionError, ValueError):
            self.status()
            return True
        return False

    def status(self) -> Any:
        return self.ask("status")

    def ask(self, *arguments: str) -> Any:
        return self.coordinator.json(
            "coordinator", *arguments, "--folder", str(self.coordinator.folder)
        )

    def enrol(self, name: str) -> Host:
        """A hospital's host joins: keys made there, code used up."""
        host = self.hospitals[name]
        code = host.folder.parent / "join-code"
        code.touch(mode=0o600)
        code.write_text(self.ask("enroll", name)["code"])
        host.command("hospital", "init", str(host.folder))
        host.command("hospital", "join", "--file", str(code), "--folder", str(host.folder))
        return host

    def start_hospital(self, name: str, **more: str) -> None:
        host = self.hospitals[name]
        host.start("hospital", "start", "--folder", str(host.folder), **more)

    def study(self, study_id: str) -> Any:
        return next(one for one in self.ask("studies") if one["id"] == study_id)

    def stop(self) -> None:
        """All hospitals at once, which takes as long as one; the coordinator last."""

        def stop(host: Host) -> None:
            if host.service is not None and host.service.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    host.stop(45)

        with ThreadPoolExecutor() as operators:
            list(operators.map(stop, self.hospitals.values()))
        stop(self.coordinator)


@contextmanager
def federation(folder: Path, names: list[str]) -> Iterator[Federation]:
    """Hosts with a network, an initialised coordinator, and nothing running yet."""
    network = Network()
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("CONSILIUM_")
    } | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    hosts: list[Host] = []
    disk = folder / "coordinator"
    try:
        disk.mkdir(mode=0o700)
        # A disk of its own, so that it can be filled up.
        tmpfs = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "tmpfs", str(disk)]
        subprocess.run(tmpfs, check=True)
        for number, name in enumerate(["coordinator", *names]):
            address = f"192.0.2.{number + 1}"
            home = folder / name
            home.mkdir(mode=0o700, exist_ok=True)
            hosts.append(Host(name, network.attach(address), address, home / "data", environ))
        made = Federation(folder, network, hosts[0], {one.name: one for one in hosts[1:]})
        made.coordinator.command(
            *("coordinator", "init", str(made.coordinator.folder), "--host", COORDINATOR_IP),
            *("--listen", COORDINATOR_IP),
        )
        try:
            yield made
        finally:
            made.stop()
    finally:
        for host in hosts:
            if host.service is not None and host.service.poll() is None:
                host.crash()
        network.remove()
        subprocess.run(["umount", str(disk)], check=False, capture_output=True)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False
