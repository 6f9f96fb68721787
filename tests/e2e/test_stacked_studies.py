"""Whole studies by the stacked engine, against the same studies one hospital at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from client.guard import MemoryGuard
from client.hospital import Hospital
from common.errors import RefusalError
from common.randomness import SecretNoise
from common.study import Study, parse_study
from common.tables import Table, TableReport
from common.tensors import load_tensors
from server import conduct as conduct_module
from server.store import RunFolder
from simulations import engine as engine_module
from simulations import simulate as simulate_module
from simulations.engine import StackedEngine
from simulations.grid import Backend
from simulations.hospitals import Site, World, open_world, seeded_noise
from simulations.simulate import Engine, run_in_process
from simulations.tiles import tiles

quiet: Callable[[object], None] = lambda _: None  # noqa: E731


def a_study(**changes: Any) -> Study:
    sgd = {"kind": "sgd", "learning_rate": 0.3}
    base = parse_study(
        {
            "name": "stacked",
            "task": "diagnosis",
            "dictionary": {
                "patient_id": "who",
                "label": {"name": "ill", "classes": [[0], [1]]},
                "columns": [
                    {"name": one, "kind": "numeric", "range": [-4.0, 4.0]} for one in "abcde"
                ],
            },
            "public": {"kind": "dictionary", "records": 32},
            "teacher": {"kind": "mlp", "hidden": [7, 5], "skip": True},
            "student": {"kind": "mlp", "hidden": [3]},
            "pretrain": {"steps": 3, "optimiser": sgd},
            "finetune": {"rounds": 2, "trainable": "all", "optimiser": sgd},
            "distill": {"on": "public", "steps": 3, "rounds": 2, "optimiser": sgd},
            "privacy": {"trust": "local", "epsilon": 4.0, "delta": 1e-5},
            "federation": {"minimum_hospitals": 2},
            "evaluation": {"folds": 2},
        },
        origin="test",
    )
    return base.revised(**changes)


def images(**changes: Any) -> Study:
    return a_study(
        task="imaging",
        dictionary={
            "patient_id": "who",
            "label": {"name": "ill", "classes": [[0], [1], [2]]},
            "columns": [{"name": "x", "kind": "image", "shape": [8, 8]}],
        },
        public={"kind": "held_apart"},
        **{
            "teacher": {"kind": "cnn", "hidden": [4, 6, 5]},
            "student": {"kind": "cnn", "hidden": [3]},
            **changes,
        },
    )


def a_table(study: Study, name: str, counts: list[int], seed: int) -> Table:
    """Patients with ``counts`` records each."""
    generator = np.random.default_rng(seed)
    owners = np.repeat(np.arange(len(counts)), counts)
    rows = len(owners)
    shape = study.dictionary.image_shape
    return Table(
        dictionary=study.dictionary,
        values={
            column.name: generator.random((rows, *shape), dtype=np.float32)
            if shape
            else generator.normal(size=rows)
            for column in study.dictionary.columns
        },
        labels=generator.integers(0, len(study.dictionary.label.classes), rows),
        patients=np.array([f"{name}-{owner}" for owner in owners], dtype=object),
        report=TableReport(rows=rows, patients=len(counts), unlabelled=0, columns=()),
    )


def a_world(study: Study, sizes: list[int], most_records: int = 1) -> World:
    generator = np.random.default_rng(7)
    sites = []
    for number, size in enumerate(sizes):
        counts = generator.integers(1, most_records + 1, size).tolist()
        name = f"hospital-{number}"
        sites.append(Site(name, a_table(study, name, counts, seed=number)))
    corpus = a_table(study, "public", [1] * 8, seed=99)
    return World(study, tuple(sites), corpus if study.public.kind == "held_apart" else None)


def weights_of(run: RunFolder) -> torch.Tensor:
    """All weights that a run ended with."""
    found = [load_tensors(run.path / f"{name}.safetensors") for name in ("teacher", "student")]
    return torch.cat([one.reshape(-1) for part in found for _, one in sorted(part.items())])


def trained(
    world: World, path: Path, engine: Engine, hospitals: list[Hospital] | None = None
) -> RunFolder:
    run = RunFolder.create(path, world.study)
    if hospitals is None:
        hospitals = open_world(world, seeded_noise(3, [site.name for site in world.sites]))
    run_in_process(world.study, run, hospitals, world.corpus, quiet, engine=engine, debug=True)
    return run


def never(messages: list[Message]) -> Iterator[Message]:
    assert messages[0].metadata.message_type != "train", "one by one, not stacked"
    raise AssertionError


VARIATIONS = some.fixed_dictionaries(
    {
        "seed": some.integers(0, 9),
        "teacher__hidden": some.lists(some.integers(1, 9), min_size=1, max_size=3),
        "teacher__skip": some.booleans(),
        "finetune__trainable": some.sampled_from(["head", "all"]),
        "finetune__local_steps": some.integers(1, 3),
        "finetune__sampling_rate": some.sampled_from([0.05, 0.4, 1.0]),
        "finetune__optimiser__kind": some.sampled_from(["sgd", "momentum", "adam", "adamw"]),
        "finetune__optimiser__schedule": some.sampled_from(["constant", "cosine"]),
        "finetune__optimiser__weight_decay": some.sampled_from([0.0, 0.01]),
        "distill__on": some.sampled_from(["public", "patients"]),
        "distill__sampling_rate": some.sampled_from([0.3, 1.0]),
        "federation__weighting": some.sampled_from(["declared", "uniform"]),
        "privacy__records_per_patient": some.integers(1, 4),
    }
)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    changes=VARIATIONS,
    sizes=some.lists(some.integers(4, 30), min_size=2, max_size=5),
    most_records=some.integers(1, 5),
    private=some.booleans(),
    proximal=some.booleans(),
)
def test_any_study_ends_with_the_same_weights(
    tmp_path_factory: pytest.TempPathFactory,
    changes: dict[str, Any],
    sizes: list[int],
    most_records: int,
    private: bool,
    proximal: bool,
) -> None:
    if not private:
        changes |= {"privacy__epsilon": None, "privacy__delta": None, "privacy__trust": "none"}
    if proximal:
        changes |= {"federation__rule": "fedprox", "federation__proximal_mu": 0.2}
    world = a_world(a_study(**changes), sizes, most_records)
    path = tmp_path_factory.mktemp("runs")
    one, other = (trained(world, path / name, name) for name in ("one-by-one", "stacked"))
    # Adam divides by gradients' own size: where one is nearly 0, rounding shows.
    torch.testing.assert_close(weights_of(other), weights_of(one), rtol=2e-3, atol=2e-4)


KINDS: dict[str, dict[str, Any]] = {
    "views": {
        "finetune__augment": {"flip": True},
        "finetune__views": 3,
        "federation__ema": 0.5,
    },
    "patches": {
        "teacher": {"kind": "vit", "patch": 3, "width": 8, "depth": 1, "heads": 2},
        "student": {"kind": "vit", "patch": 4, "width": 4, "depth": 1, "heads": 1},
    },
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"finetune__local_steps": 3, "finetune__sampling_rate": 0.3},
        {"privacy__unit": "record"},
        {"privacy__relation": "replace_one", "distill__on": "patients"},
        {"privacy__epsilon": None, "privacy__delta": None, "privacy__trust": "none"},
    ],
    ids=lambda one: ",".join(one) or "default",
)
@pytest.mark.parametrize("kind", ["tables", "images", "views", "patches"])
def test_every_kind_of_study_is_stacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, changes: dict[str, Any]
) -> None:
    study = (a_study if kind == "tables" else images)(**KINDS.get(kind, {}), **changes)
    world = a_world(study, [9, 14, 5, 20])
    expected = weights_of(trained(world, tmp_path / "one", "one-by-one"))
    asked: list[str] = []
    plain = simulate_module.one_by_one

    def watched(*arguments: Any, **options: Any) -> Backend:
        backend = plain(*arguments, **options)

        def run(messages: list[Message]) -> Iterator[Message]:
            asked.extend(one.metadata.message_type for one in messages)
            return backend(messages)

        return run

    monkeypatch.setattr(simulate_module, "one_by_one", watched)
    found = weights_of(trained(world, tmp_path / "stacked", "stacked"))
    assert "train" not in asked
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


OWN_LAYER = """
import torch
from torch import nn
from common.models.families import Family

class Gated(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(inputs, width) / inputs**0.5)
        self.mix = nn.Linear(width, width)
        self.cell = nn.GRUCell(width, width)

    def forward(self, inputs):
        code = torch.tanh(inputs @ self.turn)
        return self.cell(self.mix(code), code)

GATED = Family(
    encoder=lambda spec, features: (Gated(features.width, 6), 6),
    student=lambda spec, features, outputs: nn.Sequential(
        Gated(features.width, 4), nn.Linear(4, outputs)
    ),
)
"""


@pytest.mark.parametrize("private", [True, False])
def test_layers_without_a_rule_are_stacked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own_layer.py").write_text(OWN_LAYER)
    monkeypatch.setenv("CONSILIUM_OWN_CODE", str(tmp_path))
    changes: dict[str, Any] = {} if private else {"privacy__epsilon": None, "privacy__delta": None}
    own = {"kind": "own", "family": "own_layer:GATED"}
    study = a_study(
        teacher=own,
        student=own,
        distill__on="patients",
        finetune__local_steps=2,
        finetune__sampling_rate=0.5,
        privacy__trust="local" if private else "none",
        **changes,
    )
    world = a_world(study, [9, 14, 5], most_records=3)
    with caplog.at_level(logging.WARNING):
        one, other = (trained(world, tmp_path / name, name) for name in ("one-by-one", "stacked"))
    assert not any("not stacked" in record.message for record in caplog.records)
    torch.testing.assert_close(weights_of(other), weights_of(one), rtol=1e-4, atol=1e-6)


def test_secure_sums_of_whole_studies_agree(tmp_path: Path) -> None:
    study = a_study(
        privacy__trust="distributed",
        finetune__sampling_rate=0.5,
        federation__hospitals=4,
        federation__tolerated_colluders=1,
    )
    world = a_world(study, [12, 20, 9, 15])
    runs = [trained(world, tmp_path / name, name) for name in ("one-by-one", "stacked")]
    torch.testing.assert_close(weights_of(runs[0]), weights_of(runs[1]), rtol=1e-4, atol=1e-6)


def test_the_order_of_messages_and_replies_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = a_world(a_study(finetune__local_steps=2), [9, 14, 5, 20, 7])
    expected = weights_of(trained(world, tmp_path / "plain", "stacked"))
    straight = StackedEngine.__call__

    def reversed_both(self: StackedEngine, messages: list[Message]) -> Iterator[Message]:
        return iter(list(straight(self, messages[::-1]))[::-1])

    monkeypatch.setattr(StackedEngine, "__call__", reversed_both)
    found = weights_of(trained(world, tmp_path / "shuffled", "stacked"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("batch_bytes", [1, 40_000, 10**9])
def test_the_size_of_a_batch_changes_rounding_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    world = a_world(a_study(finetune__local_steps=2), [9, 14, 5, 20, 7])
    expected = weights_of(trained(world, tmp_path / "one", "one-by-one"))
    monkeypatch.setattr(engine_module, "BATCH_BYTES", batch_bytes)
    found = weights_of(trained(world, tmp_path / "stacked", "stacked"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_less_memory_makes_smaller_batches() -> None:
    roomy, tight = (StackedEngine([], never, memory_bytes=one) for one in (None, 1000))
    sizes = [400] * 10
    assert len(list(tiles(sizes, roomy._batch_bytes))) == 1
    assert len(list(tiles(sizes, tight._batch_bytes))) == 5


def test_a_hospital_that_refuses_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    world = a_world(a_study(), [9, 14, 5])
    hospitals = open_world(world, seeded_noise(3, [site.name for site in world.sites]))

    class Unwilling(MemoryGuard):
        def charge(self, asked: Any) -> Any:
            raise RefusalError(f"no {asked.stage} today", rule="hospital.paused")

    hospitals[1] = Hospital(**{**vars(hospitals[1]), "guard": Unwilling(SecretNoise.generate())})
    run = RunFolder.create(tmp_path / "run", world.study)
    run_in_process(world.study, run, hospitals, None, quiet, engine="stacked")
    took_part = [one["hospitals"] for one in run.metrics() if one["stage"] == "finetune"]
    assert took_part == [2, 2]


def test_every_hospital_is_held_to_its_studys_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stacked engine charges as its twin does; other rounds on top do not fit."""
    world = a_world(a_study(), [9, 14])
    hospitals = open_world(world, seeded_noise(3, [site.name for site in world.sites]))

    def charged() -> list[dict[Any, Any]]:
        return [dict(one.guard._charged) for one in hospitals]  # type: ignore[attr-defined]

    trained(world, tmp_path / "first", "stacked", hospitals)
    before = charged()
    assert [len(one) for one in before] == [world.study.finetune.rounds] * 2
    trained(world, tmp_path / "again", "stacked", hospitals)  # the same requests are free
    assert charged() == before
    # Another start of the teacher makes other requests under the same study.
    with monkeypatch.context() as patched:
        patched.setattr(conduct_module, "pretrain", lambda *_: 0.0)
        with pytest.raises(RefusalError, match="study promised"):
            trained(world, tmp_path / "other", "stacked", hospitals)
    assert charged() == before


def test_what_is_not_stacked_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_module, "obstacle", lambda *_: "it is raining")
    world = a_world(a_study(), [9, 14])
    expected = weights_of(trained(world, tmp_path / "one", "one-by-one"))
    with caplog.at_level(logging.WARNING):
        found = weights_of(trained(world, tmp_path / "stacked", "stacked"))
    said = [one.message for one in caplog.records if "one by one" in one.message]
    assert said == ["one by one, not stacked: it is raining"]
    assert torch.equal(found, expected)
