"""Whole studies of images: several views of each in a step, a transformer, an averaged teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.summands import summand_of
from client.training import read_assignment
from common.features import FeatureMap, range_scaling, scaling_tensor
from common.models import build_student, build_teacher
from common.randomness import SeededNoise, Stream
from common.secagg.plan import encoding_of
from common.study import Study, parse_study
from common.tensors import get_vector
from common.wire import AggregateTask
from server.store import RunFolder
from simulations.hospitals import build_world, open_world, seeded_noise
from simulations.simulate import resume, simulate
from simulations.summary import summarise
from tests.e2e.interruptions import Interrupted, stopping_at

SIDE = 8
DISTRIBUTED = {
    "privacy__trust": "distributed",
    "federation__hospitals": 3,
    "federation__tolerated_colluders": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 grainy squares, the left or the right half of which is brighter, of 120 patients."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    labels = np.repeat(generator.integers(0, 2, 120), 2)
    images = generator.integers(0, 120, (240, SIDE, SIDE))
    images[labels == 0, :, : SIDE // 2] += 80
    images[labels == 1, :, SIDE // 2 :] += 80
    patients = np.repeat([f"p{one}" for one in range(120)], 2)
    np.savez(folder / "squares.npz", x=images.astype(np.uint8), y=labels, who=patients)
    return folder


@pytest.fixture
def study() -> Study:
    sgd = {"kind": "sgd", "learning_rate": 0.3}
    return parse_study(
        {
            "name": "squares",
            "task": "imaging",
            "simulation": {"hospitals": 3, "source": {"kind": "npz", "path": "squares.npz"}},
            "dictionary": {
                "patient_id": "who",
                "label": {"name": "y", "classes": [[0], [1]]},
                "columns": [{"name": "x", "kind": "image", "shape": [SIDE, SIDE]}],
            },
            "public": {"kind": "held_apart", "fraction": 0.2},
            "teacher": {"kind": "vit", "patch": 4, "width": 8, "depth": 1, "heads": 2},
            "student": {"kind": "cnn", "hidden": [3]},
            "pretrain": {"steps": 5, "optimiser": sgd},
            "finetune": {
                "rounds": 4,
                "sampling_rate": 0.5,
                "trainable": "all",
                "views": 3,
                "augment": {"shift": 1.0},
                "optimiser": sgd,
            },
            "distill": {"steps": 5, "augment": {"shift": 1.0}, "optimiser": sgd},
            "privacy": {"trust": "local", "epsilon": 8.0, "delta": 1e-5},
            "federation": {"ema": 0.8, "rule": "fedavgm"},
            "evaluation": {"folds": 4},
        },
        origin="test",
    )


@pytest.mark.parametrize("changes", [{}, DISTRIBUTED], ids=["local", "distributed"])
def test_interrupted_and_resumed_to_the_same_models(
    study: Study, data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    study = study.revised(**changes)
    simulate(study, tmp_path / "whole", data, lambda _: None, noise_seed=5, debug=True)
    with pytest.raises(Interrupted):
        simulate(study, tmp_path / "run", data, stopping_at(4), noise_seed=5, debug=True)
    resume(tmp_path / "run", lambda _: None)
    for name in ("teacher.safetensors", "student.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_squares_are_told_apart(study: Study, data: Path, tmp_path: Path) -> None:
    study = study.revised(
        finetune__rounds=20,
        finetune__local_steps=3,
        finetune__optimiser={"kind": "adam", "learning_rate": 0.01},
        federation__rule="fedavg",
        distill__steps=300,
        distill__optimiser={"kind": "adam", "learning_rate": 0.01},
        privacy__trust="none",
        privacy__epsilon=None,
        privacy__delta=None,
    )
    run = simulate(study, tmp_path / "run", data, lambda _: None, noise_seed=5)
    found = summarise(RunFolder(run.path))["all"]
    assert found["teacher"]["auc"] > 0.9
    assert found["student"]["auc"] > 0.9


def test_in_a_secure_sum_a_patients_views_are_averaged_before_the_one_clip(
    study: Study, data: Path
) -> None:
    study = study.revised(**DISTRIBUTED, finetune__sampling_rate=1.0)
    world = build_world(study, data)
    hospital, *_ = open_world(world, seeded_noise(1, [site.name for site in world.sites]))
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    teacher = build_teacher(study, features)
    task = AggregateTask(
        study_digest=study.digest(),
        stage="finetune",
        round=0,
        attempt=0,
        teacher=dict(teacher.state_dict()),
        student=dict(build_student(study, features).state_dict()),
        scaling=scaling_tensor(study.dictionary, features.scaling),
    )
    encoding = encoding_of(study, "finetune", len(get_vector(teacher)))
    found = summand_of(hospital, task).integers(hospital.train, encoding, stream())
    # By hand: the same draws, autograd's gradient of each patient's views, their mean, one clip.
    assignment, drawn = read_assignment(study, task), stream()
    plan, records = assignment.charge.plan, assignment.records(hospital.train)
    rows, owners = records.rows_of(plan.sample(drawn, records.units), plan.records_per_unit, drawn)
    assert len(rows) == 3 * len(hospital.train)
    views, model = records.look(rows, drawn), assignment.model
    expected = np.zeros(encoding.length)
    for patient in range(records.units):
        part = owners == patient
        mean = assignment.loss(model(views[part]), records.targets[rows[part]]).mean()
        gradients = torch.autograd.grad(mean, list(model.parameters()))
        gradient = torch.cat([one.reshape(-1) for one in gradients]).double().numpy()
        norm = np.linalg.norm(gradient)
        expected += gradient * min(1.0, plan.clip_norm / norm)
    # Each patient's numbers are rounded once; gradients are float32.
    np.testing.assert_allclose(
        found / encoding.scale, expected, rtol=1e-4, atol=0.6 * records.units / encoding.scale
    )


def stream() -> Stream:
    return SeededNoise(0, "here").stream("step")
