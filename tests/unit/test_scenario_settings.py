"""What a scenario may say, what is refused, and that it binds nobody."""

from __future__ import annotations

import json
import tomllib
from typing import Any, get_args

import pytest

from common.errors import StudyError
from common.scenario import ScenarioSpec
from common.simulation import SimulationSpec
from common.study import Study, parse_study
from simulations.arms import under_one_roof
from simulations.catalogue import catalogue, catalogue_tables


def with_scenario(tree: dict[str, Any], **scenario: Any) -> dict[str, Any]:
    tree["simulation"] = {
        "source": {"kind": "csv", "path": "x.csv"},
        "hospitals": 4,
        "scenario": scenario,
    }
    return tree


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ({"participation": {}}, ["either fraction or hospitals"]),
        ({"participation": {"hospitals": 1}}, ["at least 2 hospitals", "minimum_hospitals", "1"]),
        ({"participation": {"fraction": 0.2}}, ["at least 2", "found 1"]),
        ({"dropouts": {"probability": 1.5}}, ["dropouts.probability", "less than 1", "1.5"]),
        ({"dropouts": {"probability": 0.5, "when": "during"}}, ["before, after", "during"]),
        ({"late": {"hospitals": 1, "from_round": 4}}, ["from_round", "at most 3", "found 4"]),
        ({"late": {"hospitals": 3, "from_round": 2}}, ["at least 2 hospitals at the start"]),
        ({"late": {"hospitals": 5, "from_round": 2}}, ["late.hospitals", "at most 4", "found 5"]),
        (
            {"late": {"hospitals": ["hospital-11"], "from_round": 2}},
            ["no hospital 'hospital-11'", "did you mean 'hospital-1'"],
        ),
        ({"stragglers": {"deadline": 3.0}}, ["unknown key", "did you mean 'deadline_s'"]),
        (
            {"missing_columns": {"hospitals": 1, "columns": ["c"]}},
            ["no column 'c'", "choose one of: a, b"],
        ),
        (
            {"missing_columns": {"hospitals": 1, "columns": ["b"]}},
            ["'b' is not optional", "optional = true"],
        ),
        ({"attack": {"kind": "label_flop", "hospitals": 1}}, ["did you mean 'label_flip'"]),
        (
            {"attack": {"kind": "label_flip", "hospitals": 1, "factor": 2.0}},
            ["factor belongs to kind 'sign_flip' or 'scale' or 'wrong_vector'", "'label_flip'"],
        ),
        (
            {"attack": {"kind": "backdoor", "hospitals": 1, "trigger": {"a": 1.0}}},
            ["target_class"],
        ),
        (
            {"attack": {"kind": "backdoor", "hospitals": 1, "target_class": 0}},
            ["either trigger", "patch"],
        ),
        (
            {"attack": {"kind": "backdoor", "hospitals": 1, "target_class": 0, "patch": 2}},
            ["expected trigger", "found patch"],
        ),
        (
            {
                "attack": {
                    "kind": "backdoor",
                    "hospitals": 1,
                    "target_class": 0,
                    "trigger": {"a": 9.0},
                }
            },
            ["trigger.a", "from -4 to 4", "9.0"],
        ),
        (
            {
                "attack": {
                    "kind": "backdoor",
                    "hospitals": 1,
                    "target_class": 2,
                    "trigger": {"a": 1.0},
                }
            },
            ["0 to 1", "found 2"],
        ),
    ],
)
def test_an_impossible_scenario_is_refused_in_one_line(
    tree: dict[str, Any], scenario: dict[str, Any], words: list[str]
) -> None:
    tree["dictionary"]["columns"][1]["optional"] = False
    with pytest.raises(StudyError) as refused:
        parse_study(with_scenario(tree, **scenario), origin="test")
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("scenario", "alternative"),
    [
        ({"attack": {"kind": "sign_flip", "hospitals": 1}}, "'wrong_vector'"),
        ({"attack": {"kind": "scale", "hospitals": 1}}, "'label_flip'"),
        ({"observer": {}}, "trust = 'local'"),
        ({"participation": {"hospitals": 2}}, "federation.hospitals less tolerated_dropouts"),
        ({"late": {"hospitals": 2, "from_round": 2}}, "at least 3 hospitals at the start"),
    ],
)
def test_what_a_secure_sum_rules_out_is_refused_with_what_works(
    tree: dict[str, Any], scenario: dict[str, Any], alternative: str
) -> None:
    tree["privacy"]["trust"] = "distributed"
    tree["federation"] = {"hospitals": 4, "tolerated_dropouts": 1}
    parse_study(with_scenario(tree, attack={"kind": "wrong_vector", "hospitals": 1}), origin="test")
    with pytest.raises(StudyError, match=alternative) as refused:
        parse_study(with_scenario(tree, **scenario), origin="test")
    assert "\n" not in str(refused.value)


def everything() -> dict[str, Any]:
    return {
        "participation": {"hospitals": 3},
        "dropouts": {"probability": 0.1, "when": "after"},
        "late": {"hospitals": ["hospital-4"], "from_round": 2},
        "network": {"uplink_mbit_s": 5.0},
        "stragglers": {"spread": 1.0, "deadline_s": 2.0},
        "missing_columns": {"hospitals": 1, "columns": ["b"]},
        "attack": {"kind": "scale", "hospitals": ["hospital-2"], "factor": 4.0},
        "observer": {"candidates": 10},
    }


def test_a_scenario_binds_nobody_and_survives_the_file(tree: dict[str, Any]) -> None:
    plain = parse_study(with_scenario(tree), origin="test")
    full = parse_study(with_scenario(tree, **everything()), origin="test")
    assert full != plain
    assert full.digest() == plain.digest()
    again = parse_study(tomllib.loads(full.to_toml()), origin="test")
    assert again == full
    assert full.revised(simulation__scenario__attack=None).simulation.scenario.attack is None  # type: ignore[union-attr]


def test_a_single_hospital_has_no_scenario(tree: dict[str, Any]) -> None:
    full = parse_study(with_scenario(tree, **everything()), origin="test")
    lone = under_one_roof(full)
    assert lone.simulation is not None
    assert lone.simulation.scenario is None


def test_a_column_belongs_to_covariate_shift(tree: dict[str, Any]) -> None:
    def study(**simulation: Any) -> Study:
        source = {"kind": "csv", "path": "x.csv"}
        given = {**tree, "simulation": {"source": source, "hospitals": 4, **simulation}}
        return parse_study(given, origin="test")

    study(partition="covariate_shift", column="a")
    for wrong, words in (
        ({"partition": "covariate_shift"}, "column belongs to"),
        ({"column": "a"}, "column belongs to"),
        ({"partition": "covariate_shift", "column": "c"}, "no column 'c'"),
    ):
        with pytest.raises(StudyError, match=words):
            study(**wrong)


def test_the_catalogue_is_whole() -> None:
    found = catalogue()
    assert found["scenarios"].keys() == ScenarioSpec.model_fields.keys()
    partitions = set(get_args(SimulationSpec.model_fields["partition"].annotation))
    assert partitions < found["partitions"].keys()
    for kind in (*found["scenarios"].values(), *found["partitions"].values()):
        assert kind["meaning"].endswith(".")
        assert kind["keys"]
    dropouts = {one["key"]: one for one in found["scenarios"]["dropouts"]["keys"]}
    assert dropouts["probability"]["default"] == "required"
    assert "before" in dropouts["when"]["default"]
    assert json.loads(json.dumps(found)) == found
    assert len(catalogue_tables(found)) == 2
