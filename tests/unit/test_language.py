"""Models that write: what they may look at, what a patient moves, what is released of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import nn

from common.columns import KINDS
from common.dictionary import Column
from common.errors import PrivacyError, StudyError
from common.features import FeatureMap, range_scaling
from common.learning.capture import Capture
from common.learning.distill import distill_publicly
from common.learning.evaluate import answer, predictions
from common.learning.gradients import GhostNorms, PerRecordGradients, clipped_sum
from common.learning.pretrain import pretrain
from common.models import Teacher, build_student, build_teacher, learner
from common.models.causal import CausalEncoder
from common.models.checks import check_private
from common.outcomes import outcome_of
from common.sources import ColumnMapping
from common.study import Study, parse_study
from common.tasks import task_of
from common.tasks.language import Language
from common.tensors import get_vector, trainable
from common.text import Bytes
from tests.unit.zoo import a_plan

LENGTH, VOCABULARY = 12, 258
COLUMN = {
    "name": "said",
    "kind": "text",
    "length": LENGTH,
    "vocabulary": VOCABULARY,
    "tokenizer": "bytes",
}
SGD = {"kind": "sgd", "learning_rate": 0.5}
ADAM = {"kind": "adam", "learning_rate": 1e-2}
TASK = Language("language", VOCABULARY, "byte")


def a_study(**changes: Any) -> Study:
    return parse_study(
        {
            "name": "writes",
            "task": "language",
            "dictionary": {"label": {"kind": "text"}, "columns": [COLUMN]},
            "public": {"kind": "held_apart"},
            "teacher": {"kind": "causal", "width": 16, "layers": 2, "heads": 2},
            "student": {"kind": "causal", "width": 8, "layers": 1, "heads": 1},
            "pretrain": {"steps": 0, "optimiser": SGD},
            "finetune": {"rounds": 2, "optimiser": SGD, "trainable": "lora", "lora": {"rank": 2}},
            "distill": {"optimiser": SGD},
            "privacy": {"trust": "local", "epsilon": 3.0, "delta": 1e-5},
        },
        origin="writes",
    ).revised(**changes)


def features_of(study: Study) -> FeatureMap:
    return FeatureMap(study.dictionary, range_scaling(study.dictionary))


def texts_of(*texts: str) -> torch.Tensor:
    return torch.from_numpy(Bytes().encode(texts, LENGTH).astype(np.int64))


TEXTS = texts_of("pain", "no pain", "fever and cough", "", "a")


def moved(teacher: Teacher) -> Teacher:
    """Every trainable weight somewhere, those that start at zero as well."""
    generator = torch.Generator().manual_seed(0)
    for one in trainable(teacher):
        nn.init.normal_(one, std=0.3, generator=generator)
    return teacher


# Tokens


@settings(max_examples=100)
@given(st.text(max_size=6))
def test_bytes_are_read_again(text: str) -> None:
    ids = Bytes().encode([text], 32)[0]
    assert Bytes().decode(ids.tolist()) == text
    assert (ids > 0).sum() == (len(text.encode()) + 1 if text else 0)


def test_a_text_is_cut_at_its_length_without_an_end() -> None:
    assert Bytes().encode(["abc"], 2).tolist() == [[99, 100]]
    assert Bytes().encode(["abc"], 5).tolist() == [[99, 100, 101, 1, 0]]
    assert Bytes().decode([2 + 0xC3]) == "�"


def test_labels_are_the_records_own_tokens_and_an_empty_text_has_none() -> None:
    reading = KINDS["text"](Column.model_validate(COLUMN), ColumnMapping())
    label = a_study().dictionary.label
    ids = reading.read(np.array(["pain", None, "a"], dtype=object))
    labels, known = outcome_of(label, ColumnMapping()).read(ids)
    assert (labels == ids).all()
    assert known.tolist() == [True, False, True]
    assert label.unknown(3).shape == (3, 0)


# Models


@pytest.mark.parametrize("place", range(8))
def test_a_token_changes_no_answer_up_to_its_own(place: int) -> None:
    """And changes all of those behind it, as far as the text goes."""
    study = a_study()
    teacher = moved(build_teacher(study, features_of(study)))
    other = TEXTS.clone()
    other[2, place] = 77
    before, after = answer(teacher, TEXTS), answer(teacher, other)
    assert before[2, : place + 1].equal(after[2, : place + 1])
    assert (before[2, place + 1 :] != after[2, place + 1 :]).any(dim=1).all()
    kept = [0, 1, 3, 4]
    assert before[kept].equal(after[kept])


def test_padding_changes_nothing() -> None:
    study = a_study()
    teacher = moved(build_teacher(study, features_of(study)))
    whole, cut = answer(teacher, TEXTS[:1]), answer(teacher, TEXTS[:1, :5])
    torch.testing.assert_close(whole[:, :5], cut)
    assert (whole[:, 5:] == 0).all()
    torch.testing.assert_close(TASK.loss(whole, TEXTS[:1]), TASK.loss(cut, TEXTS[:1, :5]))
    short, long = (
        PerRecordGradients(teacher, TASK.loss)(get_vector(teacher), some, some)
        for some in (TEXTS[:1, :5], TEXTS[:1])
    )
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-6)
    assert TASK.loss(answer(teacher, TEXTS), TEXTS)[3] == 0  # a text of no tokens


def test_the_loss_is_the_mean_of_each_token_after_those_before_it() -> None:
    """Against a loop over prefixes, each answered by itself."""
    study = a_study()
    teacher = moved(build_teacher(study, features_of(study)))
    text = TEXTS[1]
    tokens = int((text != 0).sum())
    each = []
    for place in range(tokens):
        prefix = torch.cat([text[:place], torch.tensor([9])])[None]  # whatever stands at its end
        logits = answer(teacher, prefix)[0, -1]
        each.append(-torch.log_softmax(logits, dim=0)[text[place]])
    found = TASK.loss(answer(teacher, TEXTS[1:2]), TEXTS[1:2])[0]
    torch.testing.assert_close(found, torch.stack(each).mean())


@pytest.mark.parametrize("trainable_", ["head", "lora", "all"])
def test_what_learns(trainable_: str) -> None:
    lora = {"rank": 2, "layers": ["query", "head"]} if trainable_ == "lora" else None
    study = a_study(finetune__trainable=trainable_, finetune__lora=lora)
    teacher = build_teacher(study, features_of(study))
    model = learner(study, teacher)
    names = {name for name, one in model.named_parameters() if one.requires_grad}
    queries = {f"encoder.blocks.{one}.attention.query.up.weight" for one in (0, 1)}
    if trainable_ == "head":
        assert names == {"weight"}
    elif trainable_ == "lora":
        assert names == {*queries, "head.up.weight"}
    else:
        assert names == {name for name, _ in teacher.named_parameters()}
    check_private(model)


@pytest.mark.parametrize("engine", [PerRecordGradients, GhostNorms])
def test_clipped_sums_equal_those_of_opacus(
    engine: type[PerRecordGradients] | type[GhostNorms],
) -> None:
    study = a_study(finetune__lora={"kind": "lora", "rank": 2, "layers": ["value", "up", "head"]})
    teacher = moved(build_teacher(study, features_of(study)))
    weights, rows = get_vector(teacher), len(TEXTS)
    hooked = GradSampleModule(teacher, loss_reduction="sum")
    TASK.loss(hooked(TEXTS), TEXTS).sum().backward()
    each = torch.cat([one.grad_sample.reshape(rows, -1) for one in trainable(teacher)], dim=1)
    hooked.remove_hooks()
    norms = torch.linalg.vector_norm(each, dim=1)
    assert norms[3] == 0 and (norms[[0, 1, 2, 4]] > 0).all()
    some_clipped = a_plan(float(norms.median()))
    found = clipped_sum(
        engine(teacher, TASK.loss), weights, TEXTS, TEXTS, torch.arange(rows), rows, some_clipped
    )
    torch.testing.assert_close(found, some_clipped.clipped_sum(each), rtol=1e-3, atol=1e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = CausalEncoder(vocabulary=7, length=5, width=8, layers=1, heads=2)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.encoder.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(tokens))


def test_a_head_that_is_tied_to_the_embeddings_is_refused() -> None:
    with pytest.raises(PrivacyError, match="tied"):
        Capture(Tied())


# Learning on public texts


def test_teacher_and_student_learn_the_next_token_of_public_texts() -> None:
    study = a_study(pretrain={"steps": 60, "optimiser": ADAM, "batch": 16})
    corpus = texts_of(*["no pain", "no fever", "some pain"] * 8)
    features = features_of(study)
    teacher = build_teacher(study, features)
    before = {name: one.detach().clone() for name, one in teacher.named_parameters()}
    assert pretrain(study, teacher, features, corpus) < 0.5 * math.log(VOCABULARY)
    still = {name for name, one in teacher.named_parameters() if one.equal(before[name])}
    corrections = [f".{layer}.{part}." for layer in ("query", "value") for part in ("up", "down")]
    assert still == {name for name in before if any(one in name for one in corrections)}
    student = build_student(study, features)
    taught = study.revised(distill={"steps": 80, "optimiser": ADAM, "temperature": 1.0})
    untaught = TASK.loss(answer(student, corpus), corpus).mean()
    distill_publicly(taught, teacher, student, corpus)
    assert TASK.loss(answer(student, corpus), corpus).mean() < 0.6 * untaught


def test_distillation_compares_the_tokens_that_are_there() -> None:
    """At its lowest where both agree: the teacher's own entropy; padding has no part in it."""
    generator = torch.Generator().manual_seed(0)
    taught = torch.randn(2, 5, 7, generator=generator)
    taught[1, 2:] = 0  # behind a text's end
    small = Language("language", 7)
    law = torch.softmax(taught / 2, dim=2)
    entropy = -(law * law.log()).sum(dim=2)
    wanted = 4 * torch.stack([entropy[0].mean(), entropy[1, :2].mean()])
    torch.testing.assert_close(small.distill_loss(taught, taught, 2.0), wanted)
    other = taught.clone()
    other[1, 2:] = torch.randn(3, 7, generator=generator)
    torch.testing.assert_close(small.distill_loss(other, taught, 2.0), wanted)
    other[0] = torch.randn(5, 7, generator=generator)
    assert small.distill_loss(other, taught, 2.0)[0] > wanted[0] + 0.1


# Figures and what is released


def test_a_model_that_knows_nothing_has_eight_bits_per_byte() -> None:
    found = predictions(TASK, Uniform(), TEXTS)
    figures = TASK.figures(TEXTS.numpy(), found)
    assert figures["bits"] == pytest.approx(math.log2(VOCABULARY))
    assert figures["perplexity"] == pytest.approx(VOCABULARY)


class Uniform(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, VOCABULARY)


def some_predictions(rows: int, seed: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
    tokens = torch.where(torch.arange(LENGTH) < lengths, tokens, 0)
    answers = scale * torch.randn(rows, LENGTH, VOCABULARY, generator=generator)
    answers[:, ::3].scatter_(2, tokens[:, ::3, None], 15.0)  # some are told
    return tokens.numpy(), TASK.predictions(answers, tokens).double().numpy()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 1000), st.integers(1, 5))
def test_a_patient_adds_at_most_one_however_wrong_the_model(
    seed: int, scale: float, each: int
) -> None:
    labels, found = some_predictions(6, seed, scale)
    owners = np.arange(6) // each
    parts = TASK.contributions(labels, found, owners, 20)
    assert parts.shape == (owners.max() + 1, math.prod(TASK.release_shape(20)))
    assert (np.linalg.norm(parts, axis=1) <= 1).all()
    assert (parts >= 0).all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_broken_model_is_the_worst_one_and_hides_nobody(bad: float) -> None:
    labels, found = some_predictions(3, 0)
    sound = TASK.contributions(labels, found, np.arange(3), 20)
    found[1, 0, 0] = bad
    parts = TASK.contributions(labels, found, np.arange(3), 20)
    assert np.isfinite(parts).all()
    assert (np.linalg.norm(parts, axis=1) <= 1).all()
    assert parts[1, 1] == parts[1, 0]
    assert (parts[[0, 2]] == sound[[0, 2]]).all()


def test_what_is_released_without_noise_is_the_figures() -> None:
    labels, found = some_predictions(300, 1, scale=0.5)
    counts = TASK.contributions(labels, found, np.arange(300), 20).sum(axis=0)
    released = TASK.released_figures(counts.reshape(TASK.release_shape(20)))
    for key, value in TASK.figures(labels, found).items():
        assert released[key] == pytest.approx(value, rel=1e-3), key
    nothing = TASK.released_figures(np.array([[-1.0, 2.0, 0.0]]))
    assert all(math.isnan(one) for one in nothing.values())
    assert TASK.released_figures(np.array([[1.0, 9.0, 0.5]]))["perplexity"] <= VOCABULARY + 1e-6


# Studies


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "notes"}, "did you mean task = 'language'"),
        ({"teacher": {"kind": "transformer"}}, "expected 'causal' or 'own'"),
        ({"student": {"kind": "transformer"}}, "expected 'causal' or 'own'"),
        ({"teacher__heads": 3}, "heads: expected a divisor of width"),
        ({"finetune__lora": {"layers": ["words"]}}, "words' is an Embedding"),
        ({"dictionary__columns": [{**COLUMN, "vocabulary": 256}]}, "has vocabulary = 258"),
        ({"dictionary__columns": [{**COLUMN, "tokenizer": "byte"}]}, "tokenizer"),
        ({"dictionary__label": {"name": "y", "classes": [[0], [1]]}}, "found classes"),
    ],
)
def test_a_study_says_what_language_needs(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        study = a_study(**changes)
        build_teacher(study, features_of(study))


def test_a_byte_is_called_one() -> None:
    assert [one.title for one in task_of(a_study()).measures] == [
        "bits per byte", "perplexity", "next-byte accuracy",
    ]  # fmt: skip
    hashed = {**COLUMN, "tokenizer": None}
    assert task_of(a_study(dictionary__columns=[hashed])).measures[0].title == "bits per token"
