"""What may leave a hospital, field by field; and nothing foreign gets in."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from client import rounds, training
from client.hospital import Hospital
from common import wire
from common.errors import MessageError, RefusalError
from common.features import FeatureMap, range_scaling, scaling_tensor
from common.flower import Unsent, pack, read, serialised, unpack
from common.study import Study
from common.wire import (
    AggregateReply,
    AggregateStep,
    AggregateTask,
    EvaluateReply,
    EvaluateTask,
    Exposure,
    Hello,
    HelloReply,
    StatisticsReply,
    StatisticsTask,
    TrainReply,
    TrainTask,
    from_parts,
    to_parts,
)
from simulations.grid import InProcessGrid
from simulations.traffic import parcel_of

ROOT = Path(__file__).parents[2]
MakeHospital = Callable[..., Hospital]
MESSAGES = (
    Hello,
    HelloReply,
    StatisticsTask,
    StatisticsReply,
    TrainTask,
    TrainReply,
    AggregateTask,
    AggregateStep,
    AggregateReply,
    EvaluateTask,
    EvaluateReply,
)

# The whole of what a hospital ever says. Whoever adds a field must write here what it tells.
EXPECTED = {
    "HelloReply": {
        "hospital": "public",
        "study_digest": "public",
        "declared_patients": "public",
        "secret_noise": "public",
        "identity": "public",
    },
    "StatisticsReply": {"hospital": "public", "sums": "noised"},
    "TrainReply": {"hospital": "public", "stage": "public", "round": "public", "update": "noised"},
    "AggregateReply": {"hospital": "public", "message": "masked"},
    "EvaluateReply": {"hospital": "public", "histogram": "noised"},
}


def exposures(kind: type[Any]) -> dict[str, str]:
    return {one.name: str(one.metadata["exposure"]) for one in fields(kind)}


def test_every_field_of_every_message_says_what_it_tells() -> None:
    defined = {
        name
        for name, kind in vars(wire).items()
        if isinstance(kind, type)
        and kind.__module__ == wire.__name__
        and hasattr(kind, "__dataclass_fields__")
    }
    assert defined == {kind.__name__ for kind in MESSAGES}
    for kind in MESSAGES:
        for one in fields(kind):
            assert isinstance(one.metadata.get("exposure"), Exposure), (kind, one.name)


def test_the_replies_hold_these_fields_and_no_others() -> None:
    assert {kind.__name__: exposures(kind) for kind in wire.REPLIES} == EXPECTED


def tasks(study: Study) -> dict[str, Any]:
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    teacher = dict(training.build_teacher(study, features).state_dict())
    student = dict(training.build_student(study, features).state_dict())
    scaling = scaling_tensor(study.dictionary, range_scaling(study.dictionary))
    digest = study.digest()
    return {
        "hello": Hello(study_digest=digest),
        "statistics": StatisticsTask(study_digest=digest, attempt=0),
        "train": TrainTask(
            study_digest=digest,
            stage="finetune",
            round=0,
            attempt=0,
            teacher=teacher,
            student=student,
            scaling=scaling,
        ),
        "evaluate": EvaluateTask(study_digest=digest, student=student, scaling=scaling),
    }


@pytest.fixture
def full(small: Study) -> Study:
    return small.revised(scaling="private", evaluation__epsilon=1.0, distill__on="patients")


def test_what_a_hospital_says_is_accounted_for(full: Study, make_hospital: MakeHospital) -> None:
    """No public field of a reply follows the rows: other patients, the same public words."""
    one = make_hospital(full, patients=60)
    other = replace(make_hospital(full, patients=40, seed=5), declared_patients=60)
    for action, task in tasks(full).items():
        reply, twin = getattr(rounds, action)(one, task), getattr(rounds, action)(other, task)
        known = EXPECTED[type(reply).__name__]
        assert exposures(type(reply)) == known
        for name, exposure in known.items():
            if exposure == "public":
                assert getattr(reply, name) == getattr(twin, name)
            else:
                assert not torch.equal(getattr(reply, name), getattr(twin, name))
                assert getattr(reply, name).shape == getattr(twin, name).shape


def test_without_a_budget_no_score_leaves(small: Study, make_hospital: MakeHospital) -> None:
    reply = rounds.evaluate(make_hospital(small), tasks(small)["evaluate"])
    assert reply.histogram.shape == (0, 0)


def test_a_hospital_refuses_another_study(full: Study, make_hospital: MakeHospital) -> None:
    hospital = make_hospital(full)
    for action, task in tasks(full.revised(privacy__epsilon=100.0)).items():
        with pytest.raises(RefusalError, match="expected the study it holds"):
            getattr(rounds, action)(hospital, task)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stage": "pretrain"}, "no charged stage 'pretrain'"),
        ({"round": 3}, "rounds 0 to 2, found round 3"),
        ({"round": -1}, "found round -1"),
    ],
)
def test_a_hospital_refuses_rounds_that_nobody_paid_for(
    small: Study, make_hospital: MakeHospital, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(RefusalError, match=says):
        rounds.train(make_hospital(small), replace(tasks(small)["train"], **changes))


def test_free_distillation_and_scaling_are_refused_at_hospitals(
    small: Study, make_hospital: MakeHospital
) -> None:
    hospital, asked = make_hospital(small), tasks(small)
    with pytest.raises(RefusalError, match="no charged stage 'distill'"):
        rounds.train(hospital, replace(asked["train"], stage="distill"))
    with pytest.raises(RefusalError, match="no charged stage 'statistics'"):
        rounds.statistics(hospital, asked["statistics"])


def test_messages_round_trip(full: Study, make_hospital: MakeHospital) -> None:
    hospital = make_hospital(full)
    for action, task in tasks(full).items():
        for message in (task, getattr(rounds, action)(hospital, task)):
            kind = type(message)
            for copy in (from_parts(kind, *to_parts(message)), unpack(kind, pack(message))):
                for one in fields(kind):
                    sent, got = getattr(message, one.name), getattr(copy, one.name)
                    torch.testing.assert_close(got, sent, rtol=0, atol=0) if isinstance(
                        sent, torch.Tensor | dict
                    ) else None
                    assert isinstance(sent, torch.Tensor | dict) or got == sent
                    assert type(got) is type(sent)


def test_empty_tensors_travel() -> None:
    reply = EvaluateReply(hospital="n", histogram=torch.zeros(0, 0))
    assert unpack(EvaluateReply, pack(reply)).histogram.shape == (0, 0)


def parts() -> tuple[dict[str, Any], dict[str, Any]]:
    reply = TrainReply(hospital="n", stage="finetune", round=1, update=torch.ones(3))
    values, arrays = to_parts(reply)
    return dict(values), dict(arrays)


@pytest.mark.parametrize(
    ("values", "arrays", "says"),
    [
        ({"round": None}, {}, "'round' of type int, found NoneType"),
        ({"round": "1"}, {}, "'round' of type int, found str"),
        ({"round": True}, {}, "'round' of type int, found bool"),
        ({"stage": 3}, {}, "'stage' of type str, found int"),
        ({"true_patients": 31}, {}, "unknown field 'true_patients'"),
        ({"update": 5}, {}, "unknown field 'update'"),
        ({}, {"rows": np.ones(3, np.float32)}, "unknown field 'rows'"),
        ({}, {"round": np.ones(3, np.float32)}, "unknown field 'round'"),
        ({}, {"update": None}, "expected array 'update', found none"),
        ({}, {"update": np.ones(3)}, "expected float32, found float64"),
        ({}, {"update": np.ones(3, np.int32)}, "expected float32, found int32"),
        ({}, {"update": np.array(["x"])}, "expected float32, found <U1"),
        ({}, {"update": np.array([1, np.nan], np.float32)}, "not finite"),
        ({}, {"update": np.array([np.inf], np.float32)}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(
    values: dict[str, Any], arrays: dict[str, Any], says: str
) -> None:
    plain, named = parts()
    plain, named = plain | values, named | arrays
    plain = {name: value for name, value in plain.items() if value is not None}
    named = {name: value for name, value in named.items() if value is not None}
    with pytest.raises(MessageError, match=says):
        from_parts(TrainReply, plain, named)


def test_foreign_weights_are_refused(full: Study) -> None:
    values, arrays = to_parts(tasks(full)["train"])
    with pytest.raises(MessageError, match="unknown field 'pupil/x'"):
        from_parts(TrainTask, values, arrays | {"pupil/x": np.ones(1, np.float32)})


def test_records_of_another_form_are_refused() -> None:
    for content in (RecordDict(), RecordDict({"values": ArrayRecord(), "arrays": ConfigRecord()})):
        with pytest.raises(MessageError, match="expected records 'values' and 'arrays'"):
            unpack(Hello, content)

    def block_of(data: bytes) -> Array:
        return Array("uint8", (len(data),), "safetensors", data)

    block = block_of(save({"more": np.ones(2, np.float32)}))
    for arrays, says in (
        ({"more": Array(np.ones(2, np.float32))}, "expected arrays in one block"),
        ({"tensors": block_of(b"not safetensors")}, "cannot be read"),
        ({"tensors": Array(np.ones(2, np.float32))}, "stored as 'numpy.ndarray'"),
        ({"tensors": block}, "unknown field 'more'"),
    ):
        strange = RecordDict(
            {"values": ConfigRecord({"study_digest": "x"}), "arrays": ArrayRecord(arrays)}
        )
        with pytest.raises(MessageError, match=says):
            unpack(Hello, strange)


def test_an_unpacked_array_belongs_to_its_receiver() -> None:
    update = torch.ones(3)
    content = pack(TrainReply(hospital="n", stage="finetune", round=1, update=update))
    unpack(TrainReply, content).update[0] = 9
    update[0] = 7
    assert unpack(TrainReply, content).update.tolist() == [1, 1, 1]


def answered(update: torch.Tensor) -> tuple[Message, Message]:
    """One reply twice: as it would be sent, and as it stays in its process."""
    InProcessGrid(1, lambda _: iter(()))  # this process is the one that Flower stamps messages with
    question = Message(pack(Hello(study_digest="d")), 1, "train")
    reply = TrainReply(hospital="n", stage="finetune", round=1, update=update)
    return Message(pack(reply), reply_to=question), Unsent(reply, reply_to=question)


def test_a_reply_that_is_not_sent_holds_the_bytes_that_would_be() -> None:
    sent, kept = answered(torch.arange(5.0))
    assert parcel_of(kept) == parcel_of(sent)
    assert kept.has_content()
    assert read(TrainReply, kept).update.tolist() == read(TrainReply, sent).update.tolist()
    parts, would = (get_all_nested_objects(one.content) for one in (sent, kept))
    assert [one.deflate() for one in would.values()] == [one.deflate() for one in parts.values()]
    assert kept.content is kept.content
    assert read(TrainReply, kept).update.tolist() == [0, 1, 2, 3, 4]
    kept.content = pack(replace(unpack(TrainReply, kept.content), hospital="other"))
    assert read(TrainReply, kept).hospital == "other"


def test_forms_of_different_size_are_measured_apart() -> None:
    sizes = {parcel_of(answered(torch.zeros(length))[1]).size for length in (3, 4, 5)}
    assert len(sizes) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reply_that_is_not_sent_is_checked_all_the_same(bad: float) -> None:
    for one in answered(torch.tensor([0.0, bad, -bad])):
        with pytest.raises(MessageError, match="TrainReply: array 'update' holds values"):
            read(TrainReply, one)


def test_a_reply_that_is_not_sent_holds_float32_as_well() -> None:
    sent, _ = answered(torch.zeros(2))
    wide = TrainReply(hospital="n", stage="s", round=1, update=torch.zeros(2).double())
    with pytest.raises(MessageError, match="expected float32"):
        read(TrainReply, Unsent(wide, reply_to=sent))


def test_a_reply_of_another_kind_is_refused_whether_sent_or_not() -> None:
    for one in answered(torch.zeros(2)):
        with pytest.raises(MessageError, match="EvaluateReply"):
            read(EvaluateReply, one)


def test_large_numbers_whose_sum_overflows_are_sound() -> None:
    huge = torch.full((3,), 3e38)
    for one in answered(huge):
        assert torch.equal(read(TrainReply, one).update, huge)


LAYOUTS = st.dictionaries(
    st.text(max_size=8),
    st.lists(st.integers(0, 3), max_size=3),
    min_size=1,
    max_size=6,
)


@given(LAYOUTS, st.integers(0, 9))
def test_arrays_are_serialised_as_the_library_does_it(
    layout: dict[str, list[int]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    arrays = {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in layout.items()
    }
    for _ in range(2):  # with a header made for these, and with one that is there
        assert serialised(arrays) == save(arrays)


def test_other_numbers_than_float32_are_not_sent() -> None:
    with pytest.raises(ValueError, match="float32"):
        pack(EvaluateReply(hospital="n", histogram=torch.zeros(2, 2, dtype=torch.float64)))


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _unsafe(source: str) -> list[str]:
    """Every way in which a file could be unpickled."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found += [
            name
            for name in names
            if name.split(".")[0]
            in {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
        ]
    for call in _calls(tree):
        name = ast.unparse(call.func)
        keywords = {one.arg: ast.unparse(one.value) for one in call.keywords}
        if name in {"torch.load", "torch.save"} and keywords.get("weights_only") != "True":
            found.append(name)
        if keywords.get("allow_pickle") == "True" or name.endswith("read_pickle"):
            found.append(name)
    return found


def test_nothing_is_ever_unpickled() -> None:
    sources = [
        path
        for package in ("common", "client", "server", "simulations")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert len(sources) > 30
    assert {
        str(path): _unsafe(path.read_text()) for path in sources if _unsafe(path.read_text())
    } == {}


def test_the_scan_finds_what_it_looks_for() -> None:
    for bad in (
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
    ):
        assert _unsafe(bad), bad
    assert not _unsafe("np.load(path, allow_pickle=False); torch.load(p, weights_only=True)")
