"""Flower's own simulation on Ray, with an Opacus client in the usual way: what it costs a round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from common.features import FeatureMap, range_scaling
from common.models import build_teacher
from common.study import Study, parse_study
from common.tasks import task_of
from simulations.bench.processes import family
from simulations.bench.usual import opacus_steps

_ROUNDS = 3
_LONGEST_S = 1800.0


def round_cpu_s(study: Study, hospitals: int, records: int) -> float:
    """CPU seconds of all its processes for one round after the first."""
    asked = {"study": study.to_toml(), "hospitals": hospitals, "records": records}
    done = subprocess.run(
        [sys.executable, "-m", "simulations.bench.flower_ray"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=_LONGEST_S,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def _cpu_s(pid: int) -> float:
    """CPU seconds so far of a process and all below it, those that ended included."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0
    for one in family(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(int(fields[place]) for place in (11, 12, 13, 14))  # utime … cstime
    return total / ticks


def _train(
    study: Study, features: FeatureMap, records: int, message: Message, node: int
) -> Message:
    """What a client in the usual way does: a new engine and loader every round."""
    model = build_teacher(study, features)
    model.load_state_dict(message.content.array_records["model"].to_torch_state_dict())
    inputs, labels = _records(features, records, node)
    trained = opacus_steps(study, model, inputs, labels, task_of(study).loss)
    content = RecordDict({"model": ArrayRecord(trained.state_dict())})
    return Message(content, reply_to=message)


def _records(features: FeatureMap, records: int, node: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(node % 2**31)
    shape = (1, *features.image_shape) if features.image_shape else (features.width,)
    inputs = torch.randn(records, *shape, generator=generator)
    return inputs, torch.randint(0, 2, (records,), generator=generator)


def _main(asked: dict[str, Any]) -> float:
    from flwr.simulation import run_simulation  # noqa: PLC0415  (it needs Ray)

    study = parse_study(tomllib.loads(asked["study"]), origin="bench")
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    client, server = ClientApp(), ServerApp()
    at: list[float] = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return _train(study, features, int(asked["records"]), message, context.node_id)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        state = build_teacher(study, features).state_dict()
        for _ in range(_ROUNDS):
            content = RecordDict({"model": ArrayRecord(state), "values": ConfigRecord()})
            nodes = list(grid.get_node_ids())
            replies = grid.send_and_receive([Message(content, one, "train") for one in nodes])
            parts = [one.content.array_records["model"].to_torch_state_dict() for one in replies]
            if len(parts) != len(nodes):
                raise RuntimeError(f"{len(nodes) - len(parts)} clients failed")
            state = {name: torch.stack([one[name] for one in parts]).mean(0) for name in state}
            at.append(_cpu_s(os.getpid()))

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=int(asked["hospitals"]),
        backend_config={"client_resources": {"num_cpus": 1}},
    )
    return (at[-1] - at[0]) / (_ROUNDS - 1)


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.stdin.read()))))
