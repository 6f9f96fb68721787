"""Four hospitals and a coordinator on separate hosts: the simulation's result, and no trace."""

from __future__ import annotations

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from client.linkfolder import LinkFolder
from common.secretfiles import WrappingKey
from tests.e2e.federation import COORDINATOR_IP, ROOT, Host, wait_for
from tests.e2e.heart_federation import (
    NAMES,
    HeartFederation,
    as_deployed,
    assert_equal,
    heart,
    heart_federation,
    needs_federation,
    simulated,
)

pytestmark = needs_federation

CANARY = "canary-5b1f"
TAPPED = "cleveland"


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeartFederation]:
    with heart_federation(tmp_path_factory.mktemp("deployed"), canary=CANARY) as running:
        yield running


@dataclass(frozen=True)
class Evidence:
    """All bytes that left a hospital in the clear, as the coordinator could read them."""

    wire: Path
    plain: Path


@contextmanager
def watched(fed: HeartFederation, folder: Path) -> Iterator[Evidence]:
    """The whole network recorded, and one hospital's connection opened by a tap."""
    wire, plain = folder / "wire.pcap", folder / "plain"
    plain.mkdir()
    host = fed.made.hospitals[TAPPED]
    dump = subprocess.Popen(
        [
            *("ip", "netns", "exec", fed.made.network.switch),
            *("tcpdump", "-i", "br0", "-U", "-w", str(wire), "tcp"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    tap = start_tap(fed, host, plain, folder)
    link = host.folder / "link" / "link.json"
    before = link.read_text()
    try:
        host.stop()
        link.write_text(before.replace(f"{COORDINATOR_IP}:8443", f"{COORDINATOR_IP}:9443"))
        fed.made.start_hospital(TAPPED)
        wait_for(lambda: fed.made.status()["online"] == len(NAMES), 90, "all online, one tapped")
        yield Evidence(wire, plain)
    finally:
        host.stop()
        link.write_text(before)
        fed.made.start_hospital(TAPPED)
        for one in (tap, dump):
            one.terminate()
            one.communicate(timeout=20)


def start_tap(
    fed: HeartFederation, host: Host, kept: Path, folder: Path
) -> subprocess.Popen[bytes]:
    link, pki = LinkFolder(host.folder), fed.made.coordinator.folder / "pki"
    key = link.read_key(WrappingKey.of_folder(host.folder, {}))
    opened = folder / "opened.key"
    opened.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    plan = folder / "plan.json"
    plan.write_text(
        json.dumps(
            {
                "server_certificate": str(pki / "server.pem"),
                "server_key": str(pki / "server.key"),
                "ca": str(pki / "ca.pem"),
                "client_certificate": str(link.certificate),
                "client_key": str(opened),
                "host": COORDINATOR_IP,
                "port": 8443,
                "listen": COORDINATOR_IP,
                "listen_port": 9443,
                "kept": str(kept),
            }
        )
    )
    tap = subprocess.Popen(
        [*fed.made.coordinator.inside, sys.executable, "-m", "tests.e2e.recorder", str(plan)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert tap.stdout is not None
    assert tap.stdout.readline() == b"ready\n"
    return tap


def traces(folder: Path) -> dict[str, bytes]:
    """What would betray a patient: identifiers, and pairs of a patient's values as floats."""
    with (folder / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {"an identifier": CANARY.encode()}
    for row in rows[:40]:
        pair = [float(row["chol"] or 0), float(row["thalach"] or 0)]
        if all(value > 1 for value in pair):
            for kind, code in (("float32", "<ff"), ("float64", "<dd")):
                found[f"{kind} values of {row['patient']}"] = struct.pack(code, *pair)
            found[f"cells of {row['patient']}"] = ",".join(
                row[name] for name in ("age", "sex", "cp", "trestbps", "chol")
            ).encode()
    return found


def search(content: bytes, wanted: dict[str, bytes], place: str) -> None:
    for what, trace in wanted.items():
        assert trace not in content, f"{what} in {place}"


def test_result_equals_the_simulation(fed: HeartFederation, tmp_path: Path) -> None:
    study = heart(1)
    study_id = fed.submit(study)
    fed.wait_finished(study_id)
    assert set(fed.hospitals_by_round(study_id)) == {len(NAMES)}
    assert_equal(fed.student(study_id), simulated(study, tmp_path / "simulated"))
    statement = fed.made.ask("results", study_id)["privacy"]
    assert "guarantee" in json.dumps(statement)  # test noise: it says that nothing is guaranteed


def test_a_secure_sum_between_real_hospitals(fed: HeartFederation, tmp_path: Path) -> None:
    """Five exchanges a round; the coordinator holds nothing but the noised sum."""
    study = heart(
        4,
        rounds=2,
        privacy__trust="distributed",
        federation__hospitals=len(NAMES),
        federation__tolerated_dropouts=1,
    )
    study_id = fed.submit(study)
    fed.wait_finished(study_id)
    assert fed.hospitals_by_round(study_id) == [len(NAMES)] * 2
    assert_equal(fed.student(study_id), simulated(study, tmp_path / "simulated"))


def test_nothing_of_a_patient_leaves_its_hospital(fed: HeartFederation, tmp_path: Path) -> None:
    study = heart(2, dictionary__patient_id="patient")
    with watched(fed, tmp_path) as evidence:
        study_id = fed.submit(study)
        fed.wait_finished(study_id)
        time.sleep(1)
        pieces = sorted(evidence.plain.glob("*.sent"))
        plain = b"".join(piece.read_bytes() for piece in pieces)
    # The tap did see the hospital's answers: its name, and the study it speaks of.
    assert TAPPED.encode() in plain
    assert as_deployed(study).digest().encode() in plain
    assert evidence.wire.stat().st_size > len(plain)
    wanted = traces(fed.made.hospitals[TAPPED].folder)
    assert len(wanted) > 20
    search(plain, wanted, "what the hospital sent")
    search(evidence.wire.read_bytes(), wanted | {"a model in clear": b"safetensors"}, "the wire")
    for host in [fed.made.coordinator, *fed.made.hospitals.values()]:
        for log in [*host.folder.rglob("logs/*"), host.folder.parent / f"{host.name}.out"]:
            search(log.read_bytes(), wanted, str(log))
        if host is not fed.made.coordinator:
            search((host.folder / "audit.log").read_bytes(), wanted, "an audit log")
            search((host.folder / "ledger.db").read_bytes(), wanted, "a ledger")


def test_the_search_would_find_a_trace(fed: HeartFederation) -> None:
    folder = fed.made.hospitals[TAPPED].folder
    with pytest.raises(AssertionError, match="an identifier in"):
        search((folder / "records.csv").read_bytes(), traces(folder), "the records themselves")


HOSTILE = """
import pathlib, sys
pathlib.Path({marker!r} + "-" + {where!r}).write_text(sys.argv[0])
from flwr.serverapp import ServerApp
from flwr.clientapp import ClientApp
from flwr.app import Message, RecordDict, ConfigRecord, ArrayRecord
import time
client = ClientApp()
@client.query("hello")
def hello(message, context):
    pathlib.Path({marker!r} + "-ran").write_text("x")
    return Message(RecordDict(), reply_to=message)
app = ServerApp()
@app.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    content = RecordDict({{"values": ConfigRecord({{"study_digest": {digest!r}}}),
                           "arrays": ArrayRecord({{}})}})
    ids = set(grid.push_messages([
        Message(content=content, dst_node_id=node, message_type="query.hello") for node in nodes
    ]))
    found = []
    deadline = time.time() + 60
    while ids and time.time() < deadline:
        for reply in grid.pull_messages(ids):
            ids.discard(reply.metadata.reply_to_message_id)
            told = reply.error.reason if reply.has_error() else str(dict(reply.content["values"]))
            found.append(told)
        time.sleep(0.2)
    pathlib.Path({marker!r} + "-replies").write_text("\\n".join(found))
"""

SUBMIT = """
import hashlib, sys, tomli_w
from pathlib import Path
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
root, ca = Path(sys.argv[1]), Path(sys.argv[2])
files = {str(one.relative_to(root)): one.read_bytes() for one in root.rglob("*") if one.is_file()}
data, _ = build_fab_from_files(files)
client = ControlHttpClient.from_server_address("127.0.0.1:8441", insecure=False,
    root_certificates=ca.read_bytes(),
    interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")])
fab = Fab(hashlib.sha256(data).hexdigest(), data, {})
print(client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id)
client.close()
"""


def test_a_hostile_bundle_is_never_run_at_a_hospital(fed: HeartFederation, tmp_path: Path) -> None:
    """A coordinator gone bad ships code that would shadow the installed one, and runs its half."""
    study = heart(3)
    fed.wait_finished(fed.submit(study))
    digest = as_deployed(study).digest()
    marker = str(tmp_path / "marker")
    bundle = tmp_path / "bundle"
    for where in ("evil/app.py", "client/app.py", "common/flower.py", "common/__init__.py"):
        file = bundle / where
        file.parent.mkdir(parents=True, exist_ok=True)
        text = HOSTILE.format(marker=marker, where=where.replace("/", "_"), digest=digest)
        file.write_text(text if where != "common/__init__.py" else "")
    (bundle / "evil" / "__init__.py").write_text("")
    (bundle / "client" / "__init__.py").write_text("")
    (bundle / "pyproject.toml").write_text(
        '[project]\nname = "evil"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "evil"\n'
        '[tool.flwr.app.components]\nserverapp = "evil.app:app"\nclientapp = "client.app:client"\n'
        "[tool.flwr.app.config]\n"
    )
    coordinator = fed.made.coordinator
    runner = coordinator.pid_of("server.runner")
    os.kill(runner, signal.SIGSTOP)  # ours would refuse: a hostile one takes its place
    superexec = None
    try:
        ca = coordinator.folder / "run" / "loopback-ca.pem"
        subprocess.run(
            [*coordinator.inside, sys.executable, "-c", SUBMIT, str(bundle), str(ca)],
            check=True,
            timeout=60,
        )
        superexec = subprocess.Popen(
            [
                *coordinator.inside,
                str(Path(sys.executable).with_name("flower-superexec")),
                *("--runtime-api-address", "127.0.0.1:8441", "--root-certificates", str(ca)),
                *("--superexec-auth-secret-file", str(ca.with_name("superexec.secret"))),
            ],
            env=coordinator.environ
            | {
                "FLWR_HOME": str(tmp_path / "flwr"),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        replies = Path(f"{marker}-replies")
        wait_for(replies.exists, 90, "the hostile coordinator has its replies")
    finally:
        os.kill(runner, signal.SIGCONT)
        if superexec is not None:
            os.killpg(superexec.pid, signal.SIGKILL)
            superexec.wait(20)
    # Its own half ran, at the coordinator; at the hospitals only what is installed there answered.
    assert Path(f"{marker}-evil_app.py").exists()
    found = replies.read_text().splitlines()
    assert len(found) == len(NAMES)
    assert sorted(name for name in NAMES for line in found if f"'{name}'" in line) == sorted(NAMES)
    for where in ("client_app.py", "common_flower.py", "ran"):
        assert not Path(f"{marker}-{where}").exists(), where


def test_the_coordinators_own_runner_runs_no_shipped_code(
    fed: HeartFederation, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    bundle = tmp_path / "bundle"
    (bundle / "evil").mkdir(parents=True)
    (bundle / "evil" / "__init__.py").write_text("")
    (bundle / "evil" / "app.py").write_text(
        f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    )
    (bundle / "pyproject.toml").write_text(
        '[project]\nname = "evil"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "evil"\n'
        '[tool.flwr.app.components]\nserverapp = "evil.app:app"\nclientapp = "evil.app:app"\n'
        "[tool.flwr.app.config]\n"
    )
    coordinator = fed.made.coordinator
    log = coordinator.folder / "logs" / "runner.log"
    told = log.read_text().count("no study")
    ca = coordinator.folder / "run" / "loopback-ca.pem"
    subprocess.run(
        [*coordinator.inside, sys.executable, "-c", SUBMIT, str(bundle), str(ca)],
        check=True,
        timeout=60,
    )
    wait_for(lambda: log.read_text().count("no study") > told, 60, "the run is refused")
    assert not marker.exists()


def test_it_stops_when_told_and_leaves_nothing_running(fed: HeartFederation) -> None:
    """Last: everything ends within its time, with exit code 0."""
    hosts = [*fed.made.hospitals.values(), fed.made.coordinator]
    least = {host.name: 4 if host is fed.made.coordinator else 3 for host in hosts}
    wait_for(
        lambda: all(len(host.processes()) >= least[host.name] for host in hosts), 60, "all run"
    )
    below = {pid: line for host in hosts for pid, line in host.processes().items()}
    for host in fed.made.hospitals.values():
        assert host.stop() == 0
    assert fed.made.coordinator.stop() == 0
    left = [line for pid, line in below.items() if Path(f"/proc/{pid}").exists()]
    assert left == []
