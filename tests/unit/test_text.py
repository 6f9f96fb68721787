"""Texts: ids, small transformers, corrections of low rank, and what is refused with its reason."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.columns import KINDS
from common.dictionary import Column, Dictionary
from common.errors import DataError, PrivacyError, StudyError
from common.features import FeatureMap, range_scaling
from common.learning.capture import Capture
from common.learning.distill import mixtures
from common.learning.gradients import PerRecordGradients
from common.learning.pretrain import mask_for, pretrain
from common.localmodels import HOME, file_of
from common.models import build_student, build_teacher, learner
from common.models.checks import check_private, check_records_apart
from common.models.lora import LoraLinear, add_lora
from common.models.transformer import TokenEncoder
from common.modelspec import LoraSpec
from common.pins import Pinned
from common.sources import ColumnMapping
from common.study import Study, parse_study
from common.tensors import get_vector
from common.text import HashedWords

SGD = {"kind": "sgd", "learning_rate": 0.5}
PINNED = {"kind": "pretrained", "folder": "m", "sha256": "0" * 64}
COLUMN = {"name": "said", "kind": "text", "length": 12, "vocabulary": 64}


def a_study(**changes: Any) -> Study:
    return parse_study(
        {
            "name": "texts",
            "task": "notes",
            "dictionary": {
                "label": {"name": "part", "classes": [["a"], ["b"], ["c"]]},
                "columns": [COLUMN],
            },
            "public": {"kind": "held_apart"},
            "teacher": {"kind": "transformer", "width": 16, "layers": 1, "heads": 2},
            "student": {"kind": "transformer", "width": 8, "layers": 0, "heads": 1},
            "pretrain": {"steps": 0, "optimiser": SGD},
            "finetune": {"rounds": 2, "optimiser": SGD},
            "distill": {"optimiser": SGD},
            "privacy": {"trust": "local", "epsilon": 3.0, "delta": 1e-5},
        },
        origin="texts",
    ).revised(**changes)


def features_of(study: Study) -> FeatureMap:
    return FeatureMap(study.dictionary, range_scaling(study.dictionary))


def some_texts(rows: int = 24) -> torch.Tensor:
    words = HashedWords(64).encode(
        [" ".join(f"w{(row * 7 + one) % 11}" for one in range(3 + row % 9)) for row in range(rows)],
        12,
    )
    return torch.from_numpy(words.astype(np.int64))


def test_hashed_words_are_sha256_of_the_lower_case_word() -> None:
    ids = HashedWords(1000).encode(["Aspirin 20mg, b.i.d.", ""], 6)
    wanted = [
        1 + int.from_bytes(hashlib.sha256(one.encode()).digest()[:8], "big") % 999
        for one in ("aspirin", "20", "mg", ",", "b", ".")
    ]
    assert ids.tolist() == [wanted, [0] * 6]
    assert ids.dtype == np.int32


def test_a_text_column_becomes_ids_and_ids_are_read_back() -> None:
    reading = KINDS["text"](Column.model_validate(COLUMN), ColumnMapping())
    ids = reading.read(np.array(["chest pain", "?", None], dtype=object))
    assert ids.shape == (3, 12)
    assert reading.report().missing == 2
    assert (reading.read(ids) == ids).all()
    with pytest.raises(DataError, match="12 token ids below 64"):
        reading.read(np.full((2, 12), 64))


def test_padding_changes_no_answer() -> None:
    torch.manual_seed(0)
    encoder = TokenEncoder(vocabulary=64, length=12, width=16, layers=2, heads=2).eval()
    texts = some_texts()
    short = texts[:1]  # six tokens: w 0 w 1 w 2
    torch.testing.assert_close(encoder(short), encoder(short[:, :6]))
    torch.testing.assert_close(encoder(texts)[:1], encoder(short))
    assert torch.isfinite(encoder(torch.zeros(2, 12, dtype=torch.int64))).all()


def test_a_bag_holds_the_mean_and_the_largest_of_its_words() -> None:
    bag = TokenEncoder(vocabulary=5, length=4, width=2, layers=0, heads=1)
    with torch.no_grad():
        bag.words.weight[1:4] = torch.tensor([[1.0, -6.0], [-4.0, -2.0], [9.0, 9.0]])
    texts = torch.tensor([[1, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]])
    wanted = torch.tensor([[-1.5, -4.0, 1.0, -2.0], [-4.0, -2.0, -4.0, -2.0], [0.0] * 4])
    torch.testing.assert_close(bag(texts), wanted)
    torch.testing.assert_close(bag(texts[1:2]), wanted[1:2])  # padded less


def test_a_bags_gradient_of_each_text_is_its_own() -> None:
    """As autograd finds it, text by text; a word that stands twice is largest twice."""
    study = a_study()
    student = build_student(study, features_of(study))
    texts, targets = some_texts(), torch.arange(24) % 3
    texts[0] = 0
    texts[1, 1:3] = texts[1, 0]
    found = PerRecordGradients(student, nn.CrossEntropyLoss(reduction="none"))(
        get_vector(student), texts, targets
    )
    for row in range(len(texts)):
        loss = nn.functional.cross_entropy(student(texts[[row]]), targets[[row]])
        own = torch.autograd.grad(loss, list(student.parameters()))
        torch.testing.assert_close(found[row], torch.cat([one.flatten() for one in own]))
    assert found[0].isfinite().all()


def test_a_bag_learns_the_hidden_tokens() -> None:
    study = a_study(teacher__layers=0, pretrain={"steps": 3, "optimiser": SGD})
    teacher = build_teacher(study, features_of(study))
    before = get_vector(teacher)
    assert math.isfinite(pretrain(study, teacher, features_of(study), some_texts()))
    assert not get_vector(teacher).equal(before)


class MixesTexts(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        codes = tokens.double()
        return codes - codes.mean(dim=0)


def test_a_model_that_mixes_texts_is_found_out() -> None:
    with pytest.raises(PrivacyError, match="depends on the other records"):
        check_records_apart(MixesTexts(), some_texts())


def test_hidden_tokens_are_learnt_and_padding_is_never_hidden() -> None:
    study = a_study(pretrain={"steps": 60, "optimiser": {"kind": "adam", "learning_rate": 1e-2}})
    features, texts = features_of(study), some_texts()
    mask = mask_for(features, texts, 0.5, torch.Generator().manual_seed(0))
    assert mask.any()
    assert not (mask & (texts == 0)).any()
    untrained = pretrain(a_study(), build_teacher(study, features), features, texts)
    assert pretrain(study, build_teacher(study, features), features, texts) < 0.6 * untrained


def test_texts_are_not_mixed_in_distillation() -> None:
    texts = some_texts()
    drawn = mixtures(texts, 50, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in texts.tolist()}


@pytest.mark.parametrize("kind", ["ffa", "lora"])
def test_lora_trains_its_corrections_and_the_head_alone(kind: str) -> None:
    study = a_study(finetune__trainable="lora", finetune__lora={"kind": kind, "rank": 2})
    features = features_of(study)
    teacher = build_teacher(study, features)
    names = {name for name, one in teacher.named_parameters() if one.requires_grad}
    ups = {f"encoder.blocks.0.attention.{layer}.up.weight" for layer in ("query", "value")}
    downs = {name.replace(".up.", ".down.") for name in ups}
    heads = {"head.weight", "head.bias"}
    assert names == heads | ups | (downs if kind == "lora" else set())
    again = build_teacher(study, features)
    torch.testing.assert_close(get_vector(again), get_vector(teacher), rtol=0, atol=0)


def test_pretraining_goes_through_corrections_that_learn_nothing_yet() -> None:
    study = a_study(
        finetune__trainable="lora",
        finetune__lora={},
        pretrain={"steps": 3, "optimiser": SGD},
    )
    features = features_of(study)
    teacher = build_teacher(study, features)
    before = {name: one.detach().clone() for name, one in teacher.named_parameters()}
    learning = [one.requires_grad for one in teacher.parameters()]
    pretrain(study, teacher, features, some_texts())
    moved = {name for name, one in teacher.named_parameters() if not one.equal(before[name])}
    assert "encoder.blocks.0.attention.query.base.weight" in moved
    assert not {
        name for name in moved if "query.up" in name or "query.down" in name or "head" in name
    }
    assert [one.requires_grad for one in teacher.parameters()] == learning


def test_the_mean_of_ffa_factors_is_the_mean_of_corrections() -> None:
    """Sun et al. 2024, section 3: with both factors trained it is not."""

    def layers(kind: str) -> list[LoraLinear]:
        found = []
        for seed in (1, 2):
            base = nn.Linear(6, 5)
            made = nn.Sequential()
            made.add_module("query", base)
            add_lora(made, LoraSpec.model_validate({"kind": kind, "rank": 2}), seed=0)
            layer = made.get_submodule("query")
            assert isinstance(layer, LoraLinear)
            generator = torch.Generator().manual_seed(seed)
            for one in layer.parameters():
                if one.requires_grad:
                    nn.init.normal_(one, generator=generator)
            found.append(layer)
        return found

    def error(kind: str) -> float:
        one, other = layers(kind)
        mean = sum(layer.up.weight @ layer.down.weight for layer in (one, other)) / 2
        averaged = ((one.up.weight + other.up.weight) / 2) @ (
            (one.down.weight + other.down.weight) / 2
        )
        return float(((mean - averaged).norm() / mean.norm()).detach())

    assert error("ffa") < 1e-6
    assert error("lora") > 0.1


@pytest.mark.parametrize("trainable", ["head", "lora", "all"])
def test_every_trainable_weight_moves(trainable: str) -> None:
    """None is left out of the sum, and none is dead: the start of LoRA, up = 0, excepted."""
    lora = {"lora": {"kind": "lora", "rank": 2}} if trainable == "lora" else {}
    study = a_study(finetune={"rounds": 2, "optimiser": SGD, "trainable": trainable, **lora})
    teacher = build_teacher(study, features_of(study))
    model = learner(study, teacher)
    torch.manual_seed(0)
    for one in model.parameters():
        if one.requires_grad:
            nn.init.normal_(one, std=0.3)
    texts = some_texts()
    inputs = texts if model is teacher else teacher.represent(texts).detach()
    each = PerRecordGradients(model, nn.CrossEntropyLoss(reduction="none"))
    gradients = each(get_vector(model), inputs, torch.arange(len(texts)) % 3)
    start = 0
    for name, one in model.named_parameters():
        if not one.requires_grad:
            continue
        found = gradients[:, start : start + one.numel()]
        start += one.numel()
        # A key's shift is added to all scores alike, which softmax takes away again.
        assert found.abs().max() > (0 if "key.bias" in name else 1e-6), name
    assert start == each.size


def test_a_student_is_small_and_trains_privately() -> None:
    study = a_study()
    student = build_student(study, features_of(study))
    assert student(some_texts()).shape == (24, 3)
    check_private(student)


class TiedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.decoder = nn.Linear(8, 16, bias=False)
        self.decoder.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.words(tokens).mean(dim=1))


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(PrivacyError, match="tied"):
        Capture(TiedDecoder())


def test_gradient_checkpointing_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    model.gradient_checkpointing = True  # type: ignore[assignment]
    with pytest.raises(PrivacyError, match="runs a layer twice"):
        check_private(model)


def test_dora_is_refused_with_its_reason() -> None:
    with pytest.raises(StudyError, match="DoRA divides a layer's weight by its norm"):
        a_study(finetune__trainable="lora", finetune__lora={"kind": "dora"})


def test_lora_on_embeddings_is_refused() -> None:
    study = a_study(finetune__trainable="lora", finetune__lora={"layers": ["words"]})
    with pytest.raises(StudyError, match="'words' is an Embedding"):
        build_teacher(study, features_of(study))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"public": {"kind": "dictionary"}}, "cannot draw texts"),
        ({"scaling": "public"}, "expected 'ranges' for texts"),
        ({"finetune__trainable": "lora"}, "belongs to trainable = 'lora'"),
        ({"teacher": {"kind": "mlp", "hidden": [4]}}, "expected 'transformer' or 'pretrained'"),
        ({"teacher__heads": 3}, "heads: expected a divisor of width"),
        ({"teacher": PINNED, "pretrain__steps": 5}, "comes trained"),
        ({"student": PINNED}, "is for teachers"),
        ({"teacher": {**PINNED, "folder": "../m"}}, "folder"),
    ],
)
def test_a_study_says_what_texts_need(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        a_study(**changes)


def test_a_text_is_a_studys_only_column() -> None:
    number = {"name": "n", "kind": "numeric", "range": [0, 1]}
    with pytest.raises(ValueError, match="a study on texts has the text as its only column"):
        Dictionary.model_validate(
            {"label": {"name": "y", "classes": [[0], [1]]}, "columns": [COLUMN, number]},
            strict=False,
        )


def test_a_pinned_file_is_the_very_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    path = tmp_path / "small" / "model.safetensors"
    path.write_bytes(b"weights")
    pinned = Pinned(folder="small", sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.delenv(HOME, raising=False)
    with pytest.raises(StudyError, match="set CONSILIUM_MODELS"):
        file_of(pinned, "model.safetensors", what="teacher")
    monkeypatch.setenv(HOME, str(tmp_path))
    assert file_of(pinned, "model.safetensors", what="teacher") == path
    path.write_bytes(b"weightz")
    with pytest.raises(StudyError, match="expected SHA-256"):
        file_of(pinned, "model.safetensors", what="teacher")
    with pytest.raises(StudyError, match="no such file"):
        file_of(pinned, "tokenizer.json", what="column 'said'")
