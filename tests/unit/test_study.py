"""The study file: what is unknown or impossible is refused in one line; what is kept, is kept."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StudyError
from common.privacy.units import Trust
from common.study import Study, load_study, parse_study

Tree = dict[str, Any]


def refused(tree: Tree) -> str:
    with pytest.raises(StudyError) as caught:
        parse_study(tree, origin="study.toml")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("study.toml: ")
    return line


def again(study: Study) -> Study:
    return parse_study(tomllib.loads(study.to_toml()), origin="again")


@pytest.mark.parametrize(
    ("where", "key", "meant"),
    [
        ((), "privcy", "privacy"),
        (("privacy",), "epsilom", "epsilon"),
        (("finetune", "optimiser"), "learning_rat", "learning_rate"),
        (("dictionary", "columns", 1), "rnage", "range"),
        (("dictionary", "label"), "clases", "classes"),
        (("public",), "fractoin", "fraction"),
    ],
)
def test_an_unknown_key_names_the_nearest(
    tree: Tree, where: tuple[Any, ...], key: str, meant: str
) -> None:
    node: Any = tree
    for part in where:
        node = node[part]
    node[key] = node.pop(meant, 1)
    line = refused(tree)
    assert ".".join(str(part) for part in (*where, key)) in line
    assert f"did you mean '{meant}'?" in line


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("finetune__rounds", "ten", ["finetune.rounds", "integer", "'ten'"]),
        ("finetune__rounds", 2.5, ["finetune.rounds", "integer", "2.5"]),
        ("finetune__rounds", 0, ["finetune.rounds", "1", "found 0"]),
        ("finetune__rounds", True, ["finetune.rounds", "integer", "True"]),
        ("privacy__epsilon", "3", ["privacy.epsilon", "number", "'3'"]),
        ("privacy__epsilon", -1.0, ["privacy.epsilon", "greater than 0", "-1.0"]),
        ("privacy__epsilon", math.inf, ["privacy.epsilon", "finite", "inf"]),
        ("privacy__epsilon", math.nan, ["privacy.epsilon", "nan"]),
        ("privacy__delta", 0.5, ["privacy.delta", "1 / patients", "0.5"]),
        ("privacy__clip_norm", 0.0, ["privacy.clip_norm", "greater than 0"]),
        ("finetune__sampling_rate", 1.5, ["finetune.sampling_rate", "1.5"]),
        ("teacher__hidden", [], ["teacher.hidden", "at least 1"]),
        ("name", "Has Spaces", ["name", "'Has Spaces'"]),
        ("finetune__optimiser__kind", "admw", ["found 'admw'", "did you mean 'adam"]),
        ("privacy__unit", "patients", ["privacy.unit", "did you mean 'patient'?"]),
        ("privacy__trust", "locale", ["privacy.trust", "did you mean 'local'?"]),
        ("federation__rule", "fedsgd", ["federation.rule", "fedavg", "'fedsgd'"]),
        ("task", "diagnose", ["task", "did you mean 'diagnosis'?"]),
    ],
)
def test_a_wrong_value_names_key_expected_and_found(
    tree: Tree, path: str, value: Any, says: list[str]
) -> None:
    *parents, leaf = path.split("__")
    node: Any = tree
    for part in parents:
        node = node.setdefault(part, {})
    node[leaf] = value
    line = refused(tree)
    for words in says:
        assert words in line, line


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"kind": "cvs", "path": "x"}, "source.kind: expected one of csv, parquet"),
        ({"kind": "cvs", "path": "x"}, "found 'cvs'; did you mean 'csv'?"),
        ({"path": "x"}, "simulation.source.kind: missing"),
        ({"kind": "csv"}, "simulation.source.path: missing"),
        ({"kind": "csv", "path": "x", "pth": 1}, "source.pth: unknown key; did you mean 'path'?"),
        (
            {"kind": "fhir", "path": "x", "columns": {"bmi": {"observatio": ["1"]}}},
            "source.columns.bmi.observatio: unknown key; did you mean 'observation'?",
        ),
        (
            {
                "kind": "csv",
                "path": "x",
                "derive": {"age": {"start": "a", "end": "b", "unit": "y"}},
            },
            "source.derive.age.unit: expected one of hours, days, years",
        ),
    ],
)
def test_a_wrong_source_is_named_as_it_was_written(tree: Tree, source: Any, says: str) -> None:
    tree["simulation"] = {"source": source, "hospitals": 3}
    assert says in refused(tree)


def test_a_missing_section_is_named(tree: Tree) -> None:
    del tree["finetune"]
    assert "finetune: missing" in refused(tree)


def _columns(tree: Tree, **changes: Any) -> None:
    column = tree["dictionary"]["columns"][0]
    for key, value in changes.items():
        if value is None:
            column.pop(key, None)
        else:
            column[key] = value


_CSV = {"kind": "csv", "path": "x.csv"}
_IMPOSSIBLE: dict[str, tuple[Callable[[Tree], Any], str]] = {
    "none with epsilon": (lambda t: t["privacy"].update(trust="none"), "makes no promise"),
    "local without delta": (lambda t: t["privacy"].pop("delta"), "needs both epsilon and delta"),
    "records per patient by record": (
        lambda t: t["privacy"].update(unit="record", records_per_patient=2),
        "no meaning with unit = 'record'",
    ),
    "fold out of range": (lambda t: t["evaluation"].update(fold=4), "from 0 to 3, found 4"),
    "mu without fedprox": (
        lambda t: t.update(federation={"proximal_mu": 0.1}),
        "belongs to rule = 'fedprox'",
    ),
    "fedprox without mu": (
        lambda t: t.update(federation={"rule": "fedprox"}),
        "belongs to rule = 'fedprox'",
    ),
    "file without source": (lambda t: t["public"].update(kind="file"), "kind = 'file'"),
    "source without file": (lambda t: t["public"].update(source=_CSV), "kind = 'file'"),
    "simulation of nothing": (lambda t: t.update(simulation={}), "not both and not neither"),
    "simulation of both": (
        lambda t: t.update(
            simulation={
                "hospital": [{"name": "n", "source": _CSV}],
                "source": _CSV,
                "hospitals": 2,
            }
        ),
        "not both and not neither",
    ),
    "source without number": (
        lambda t: t.update(simulation={"source": _CSV}),
        "hospitals = N belongs",
    ),
    "twins": (
        lambda t: t.update(simulation={"hospital": [{"name": "n", "source": _CSV}] * 2}),
        "hospital names must differ",
    ),
    "a hospital's name is a folder": (
        lambda t: t.update(simulation={"hospital": [{"name": "../up", "source": _CSV}]}),
        "'../up'",
    ),
    "header without csv": (
        lambda t: t["public"].update(
            kind="file", source={"kind": "npz", "path": "x", "header": ["a"]}
        ),
        "public.source.header: unknown key",
    ),
    "imaging without image": (lambda t: t.update(task="imaging"), "expected records of kind image"),
    "image in a diagnosis": (
        lambda t: t["dictionary"].update(columns=[{"name": "x", "kind": "image", "shape": [8, 8]}]),
        "expected records of kind table, found image; did you mean task = 'imaging'?",
    ),
    "cnn on a table": (
        lambda t: t.update(teacher={"kind": "cnn", "hidden": [4]}),
        "teacher.kind: expected 'mlp'",
    ),
    "student with skip": (lambda t: t["student"].update(skip=True), "one plain network"),
    "public scaling without public records": (
        lambda t: t.update(scaling="public"),
        "needs a public corpus of real records",
    ),
    "private scaling without numbers": (
        lambda t: (
            t.update(scaling="private"),
            t["dictionary"].update(columns=[{"name": "s", "kind": "binary", "categories": [0, 1]}]),
        ),
        "needs a numeric column",
    ),
    "plateau on patients": (
        lambda t: t["finetune"]["optimiser"].update(schedule="plateau"),
        "did you mean 'cosine'?",
    ),
    "plateau on patients' distillation": (
        lambda t: (
            t["distill"].update(on="patients"),
            t["distill"]["optimiser"].update(schedule="plateau"),
        ),
        "distill.optimiser.schedule",
    ),
    "a number without range": (lambda t: _columns(t, range=None), "range = [lowest, highest]"),
    "a range upside down": (lambda t: _columns(t, range=[4.0, -4.0]), "lowest below highest"),
    "a code that clipping makes": (lambda t: _columns(t, missing=[4]), "both ends of range"),
    "no spread": (lambda t: _columns(t, typical=[0.0, 0.0]), "standard deviation above 0"),
    "one category": (
        lambda t: _columns(t, kind="categorical", categories=[1]),
        "two different categories",
    ),
    "binary of three": (
        lambda t: _columns(t, kind="binary", categories=[1, 2, 3]),
        "exactly two categories",
    ),
    "image without shape": (lambda t: _columns(t, kind="image"), "shape = [height, width]"),
    "image beside a number": (
        lambda t: _columns(t, kind="image", shape=[4, 4]),
        "its only column",
    ),
    "columns of one name": (lambda t: _columns(t, name="b"), "'b' twice"),
    "a column named as the label": (lambda t: _columns(t, name="ill"), "'ill' twice"),
    "a column named as the patient": (lambda t: _columns(t, name="who"), "'who' twice"),
    "classes that overlap": (
        lambda t: t["dictionary"]["label"].update(classes=[[0, 1], [1]]),
        "share no value",
    ),
    "a class of nothing": (
        lambda t: t["dictionary"]["label"].update(classes=[[0], []]),
        "non-empty",
    ),
    "names for other classes": (
        lambda t: t["dictionary"]["label"].update(class_names=["well"]),
        "expected 2 class_names",
    ),
}


@pytest.mark.parametrize("case", _IMPOSSIBLE)
def test_an_impossible_combination_is_refused(tree: Tree, case: str) -> None:
    spoil, says = _IMPOSSIBLE[case]
    spoil(tree)
    assert says in refused(tree)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scaling": "public"}, "expected 'ranges' for images"),
        ({"public": {"kind": "dictionary"}}, "cannot draw images"),
        ({"teacher": {"kind": "cnn", "hidden": [4, 4], "skip": True}}, "teacher.skip: unknown key"),
        ({"student": {"kind": "mlp", "hidden": [4]}}, "student.kind: expected 'cnn'"),
    ],
)
def test_impossible_combinations_of_images(tree: Tree, changes: Tree, says: str) -> None:
    tree["task"] = "imaging"
    tree["dictionary"]["columns"] = [{"name": "x", "kind": "image", "shape": [8, 8]}]
    tree["teacher"] = {"kind": "cnn", "hidden": [4, 4]}
    tree["student"] = {"kind": "cnn", "hidden": [4]}
    tree["public"] = {"kind": "held_apart"}
    parse_study(tree, origin="valid as it stands")
    assert says in refused(tree | changes)


def test_a_key_with_line_breaks_still_gives_one_line(tree: Tree) -> None:
    tree["first\nsecond"] = 1
    assert "first second: unknown key" in refused(tree)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    for content, says in ((b"a = [", "not valid TOML"), (b"\xff\xfe", "cannot be read as text")):
        path = tmp_path / "study.toml"
        path.write_bytes(content)
        with pytest.raises(StudyError, match=says) as caught:
            load_study(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(StudyError, match="no such study file"):
        load_study(tmp_path / "absent.toml")


def test_every_example_round_trips(examples: list[Path]) -> None:
    assert examples
    for path in examples:
        study = load_study(path)
        assert again(study) == study
        assert again(study).digest() == study.digest()
        assert again(study).to_toml() == study.to_toml()


_VARIANTS: list[Tree] = [
    {
        "privacy__trust": "none",
        "privacy__epsilon": None,
        "privacy__delta": None,
        "evaluation__epsilon": None,
    },
    {"privacy__unit": "record"},
    {"privacy__relation": "replace_one"},
    {"evaluation__epsilon": None},
    {"simulation": None},
    {"distill__on": "patients", "scaling": "private"},
    {"public": {"kind": "file", "source": {"kind": "csv", "path": "p.csv", "missing": ["?"]}}},
    {"federation__rule": "fedprox", "federation__proximal_mu": 0.1},
    {"privacy__trust": "distributed", "federation__hospitals": 12, "privacy__spare_attempts": 2},
]


@pytest.mark.parametrize("changes", _VARIANTS, ids=lambda one: ",".join(one))
def test_every_variant_round_trips(examples: list[Path], changes: Tree) -> None:
    for path in examples:
        study = load_study(path)
        if study.dictionary.modality != "table" and "scaling" in changes:
            continue  # images and molecules have no scaling to estimate
        if study.privacy.trust is Trust.DISTRIBUTED and changes.keys() & {
            "privacy__unit",
            "scaling",
            "federation__rule",
        }:
            continue  # secure sums and repeated patients rule these out, in a line of their own
        if path.stem == "scenario" and "federation__hospitals" in changes:
            continue  # a secure sum shows a curious coordinator no single update
        study = study.revised(**changes)
        assert again(study) == study
        assert again(study).digest() == study.digest()


_NUMBERS = st.floats(min_value=1e-12, max_value=1e12)
_WORDS = st.text(min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    clip=_NUMBERS,
    epsilon=st.none() | _NUMBERS,
    unit=st.sampled_from(["patient", "record"]),
    fold=st.integers(0, 4),
    unit_word=_WORDS,
    categories=st.lists(
        st.integers(-5, 5) | st.text(max_size=5).map(lambda text: "c" + text),
        min_size=2,
        max_size=5,
        unique=True,
    ),
    recode=st.dictionaries(_WORDS, st.integers() | st.booleans() | _WORDS, max_size=3),
)
def test_any_valid_study_round_trips(
    clip: float,
    epsilon: float | None,
    unit: str,
    fold: int,
    unit_word: str,
    categories: list[Any],
    recode: Tree,
) -> None:
    privacy: Tree = {"trust": "none", "unit": unit, "clip_norm": clip}
    if epsilon is not None:
        privacy |= {"trust": "local", "epsilon": epsilon, "delta": 1e-6}
    rates = {"kind": "sgd", "learning_rate": clip}
    study = parse_study(
        {
            "name": "any",
            "task": "diagnosis",
            "dictionary": {
                "label": {"name": "y", "classes": [["a", 1], ["b"]]},
                "columns": [
                    {"name": "n", "kind": "numeric", "range": [0, clip], "unit": unit_word},
                    {"name": "c", "kind": "categorical", "categories": categories},
                ],
            },
            "public": {
                "kind": "file",
                "source": {"kind": "csv", "path": unit_word, "recode": {"c": recode}},
            },
            "teacher": {"hidden": [3]},
            "student": {"hidden": [2]},
            "pretrain": {"optimiser": rates},
            "finetune": {"rounds": 1, "optimiser": rates},
            "distill": {"optimiser": rates},
            "privacy": privacy,
            "evaluation": {"folds": 5, "fold": fold},
        },
        origin="any",
    )
    assert again(study) == study
    assert again(study).digest() == study.digest()


def test_the_digest_binds_all_but_the_simulation(wisconsin: Study) -> None:
    digest = wisconsin.digest()
    assert wisconsin.revised(simulation__hospitals=5).digest() == digest
    assert wisconsin.revised(simulation=None).digest() == digest
    for changes in (
        {"privacy__epsilon": 2.999},
        {"seed": 1},
        {"finetune__rounds": 4},
        {"evaluation__fold": 1},
        {"federation__tail_average": 0.4},
    ):
        assert wisconsin.revised(**changes).digest() != digest


def test_revised_validates_and_leaves_the_original(small: Study) -> None:
    tighter = small.revised(privacy__epsilon=1.0)
    assert (tighter.privacy.epsilon, small.privacy.epsilon) == (1.0, 4.0)
    assert small.revised(federation__rule="fedavgm").federation.rule == "fedavgm"
    assert "federation" not in small.model_fields_set
    with pytest.raises(StudyError, match="did you mean 'epsilon'"):
        small.revised(privacy__epsilonn=1.0)
    with pytest.raises(StudyError, match="needs both epsilon and delta"):
        small.revised(privacy__epsilon=None)


def test_a_study_cannot_be_changed_in_place(small: Study) -> None:
    with pytest.raises(ValueError, match="frozen"):
        small.privacy.epsilon = 100.0
