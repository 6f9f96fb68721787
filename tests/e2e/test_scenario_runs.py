"""Whole runs under scenarios: results, resumption, attacks on a secure sum, and what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.guard import MemoryGuard, Release
from common.randomness import Stream
from common.study import Study, load_study
from common.tensors import load_tensors
from server.conduct import Progress
from server.store import RunFolder
from simulations.attacks import TWIN, run_twin
from simulations.observer import ceiling, observed
from simulations.run_report import write_run_report
from simulations.scenario_words import scenario_lines
from simulations.simulate import load_hospitals, resume, simulate
from simulations.summary import summarise
from tests.e2e.interruptions import Interrupted, stopping_at

ROOT = Path(__file__).resolve().parents[2]


def quiet(_: Progress) -> None:
    """Watch nothing."""


def run(study: Study, path: Path, **options: Any) -> RunFolder:
    return simulate(study, path, Path(), quiet, **({"noise_seed": 5, "debug": True} | options))


ROUGH: dict[str, Any] = {
    "participation": {"fraction": 0.75},
    "dropouts": {"probability": 0.15, "when": "after"},
    "late": {"hospitals": 2, "from_round": 3},
    "network": {"records_per_s": 100.0},
    "stragglers": {"spread": 1.0, "jitter": 0.5, "deadline_s": 1.2},
    "attack": {"kind": "sign_flip", "hospitals": 1},
    "observer": {},
}
KEPT = (
    "teacher.safetensors",
    "student.safetensors",
    "metrics.jsonl",
    "result.json",
    "traffic.jsonl",
)


def rough(wisconsin: Study) -> Study:
    return wisconsin.revised(
        simulation__hospitals=8,
        simulation__partition="equal",
        simulation__scenario=ROUGH,
        finetune__rounds=5,
        federation__minimum_hospitals=2,
        distill__on="patients",
        distill__rounds=2,
        scaling="private",
    )


def test_a_rough_run_is_repeatable_and_resumes_to_the_same(
    wisconsin: Study, tmp_path: Path
) -> None:
    study = rough(wisconsin)
    whole = run(study, tmp_path / "whole")
    kinds = {
        key
        for one in whole.read_json("result.json")["forecast"]["rounds"]
        for key in ("not_asked", "not_there", "late", "lost")
        if one[key]
    }
    assert kinds == {"not_asked", "not_there", "late", "lost"}
    for count in (3, 4, 5, 8):
        path = tmp_path / f"cut-{count}"
        with pytest.raises(Interrupted):
            simulate(study, path, Path(), stopping_at(count), noise_seed=5, debug=True)
        resume(path, quiet, debug=True)
        for name in KEPT:
            assert (path / name).read_bytes() == (whole.path / name).read_bytes(), (count, name)
    _, hospitals = load_hospitals(whole.path)
    assert observed(whole, study, hospitals) == observed(RunFolder(path), study, hospitals)


def test_every_engine_meets_the_same_scenario(wisconsin: Study, tmp_path: Path) -> None:
    stacked, plain = (
        run(rough(wisconsin), tmp_path / engine, engine=engine)
        for engine in ("stacked", "one-by-one")
    )
    results = [made.read_json("result.json")["forecast"] for made in (stacked, plain)]
    assert results[0] == results[1]
    first, second = (load_tensors(made.path / "student.safetensors") for made in (stacked, plain))
    for name, tensor in first.items():
        assert float((tensor - second[name]).abs().max()) < 1e-4, name


def test_the_observer_sees_members_only_where_there_is_no_noise(
    wisconsin: Study, tmp_path: Path
) -> None:
    study = wisconsin.revised(simulation__scenario={"observer": {}}, privacy__epsilon=1.0)
    made = run(study, tmp_path / "run")
    _, hospitals = load_hospitals(made.path)
    found = observed(made, study, hospitals)
    assert found is not None
    bare, noised = found["without_noise"], found["with_noise"]
    assert bare[0] > 0.95
    assert noised[1] <= noised[0] <= noised[2]
    assert noised[0] < 0.75
    assert noised[1] <= found["ceiling"] == ceiling(1.0, 1e-5)
    assert found["members"] + found["others"] == sum(
        len(set(one.train.patients)) + len(set(one.test.patients)) for one in hospitals
    )
    # Watching changes nothing.
    alone = run(wisconsin.revised(privacy__epsilon=1.0), tmp_path / "alone")
    for name in ("teacher.safetensors", "result.json"):
        assert (alone.path / name).read_bytes() == (made.path / name).read_bytes()


def test_an_attack_is_measured_against_the_same_run_without_it(
    wisconsin: Study, tmp_path: Path
) -> None:
    attack = {"kind": "label_flip", "hospitals": ["hospital-1", "hospital-2"]}
    study = wisconsin.revised(simulation__scenario={"attack": attack}, finetune__rounds=8)
    made = run(study, tmp_path / "run")
    assert summarise(made)["attack"]["auc_loss"] is None  # nothing to compare with yet
    run_twin(made.path, quiet)
    honest = run(study.revised(simulation__scenario=None), tmp_path / "honest")
    for name in ("teacher.safetensors", "student.safetensors"):
        twin = (made.path / TWIN / name).read_bytes()
        assert twin == (honest.path / name).read_bytes()
        assert twin != (made.path / name).read_bytes()
    summary = summarise(made)
    loss = summary["attack"]["auc_loss"]
    assert loss[0] > 0.1
    assert loss[1] <= loss[0] <= loss[2]
    text = write_run_report(made.path).read_text()
    for line in scenario_lines(summary):
        assert line.split(":")[0] in text
    assert any("hospital-1, hospital-2" in line for line in scenario_lines(summary))
    assert "Line, time and scenario" in text


def test_a_backdoor_opens_for_its_trigger(wisconsin: Study, tmp_path: Path) -> None:
    attack = {
        "kind": "backdoor",
        "hospitals": ["hospital-1", "hospital-2"],
        "target_class": 0,
        "trigger": {"mean texture": 9.7, "mean symmetry": 0.31, "mean smoothness": 0.053},
    }
    study = wisconsin.revised(
        simulation__scenario={"attack": attack},
        finetune__rounds=40,
        privacy__trust="none",
        privacy__epsilon=None,
        privacy__delta=None,
        evaluation__epsilon=None,
    )
    made = run(study, tmp_path / "run")
    run_twin(made.path, quiet)
    found = summarise(made)["attack"]
    assert found["teacher_backdoor_rate"][0] > found["teacher_backdoor_rate_without"][2]
    assert found["teacher_backdoor_rate"][0] > 0.5
    assert found["backdoor_rate"][0] is not None


def distributed(wisconsin: Study, **scenario: Any) -> Study:
    return wisconsin.revised(
        simulation__hospitals=6,
        simulation__partition="equal",
        simulation__scenario=scenario,
        privacy__trust="distributed",
        federation__hospitals=6,
        federation__tolerated_dropouts=2,
        federation__minimum_hospitals=2,
        privacy__spare_attempts=2,
        evaluation__epsilon=None,
    )


def test_a_secure_sum_goes_on_without_who_is_away(wisconsin: Study, tmp_path: Path) -> None:
    study = distributed(
        wisconsin,
        participation={"hospitals": 5},
        late={"hospitals": 1, "from_round": 2},
        dropouts={"probability": 0.1, "when": "after"},
    )
    made = run(study, tmp_path / "run")
    found = made.read_json("result.json")["forecast"]["rounds"]
    hospitals = [one["hospitals"] for one in made.metrics() if one["stage"] == "finetune"]
    assert [one["answered"] for one in found] == hospitals
    assert found[0]["not_there"] == 1
    assert min(hospitals) >= 4
    assert sum(one["lost"] for one in found) > 0
    again = run(study, tmp_path / "again").read_json("result.json")["forecast"]
    assert again == made.read_json("result.json")["forecast"]


def test_a_wrong_vector_enters_the_sum_under_a_valid_signature(
    wisconsin: Study, tmp_path: Path
) -> None:
    attack = {"kind": "wrong_vector", "hospitals": ["hospital-2"], "factor": 50.0}
    study = distributed(wisconsin, attack=attack)
    made = run(study, tmp_path / "run")
    assert {one["hospitals"] for one in made.metrics() if one["stage"] == "finetune"} == {6}
    run_twin(made.path, quiet, debug=True)
    # Seeded noise is the same in both: after one round the models differ by the attacker's vector,
    # fifty times one hospital's patients among six hospitals' of the same size.
    first, honest = (
        load_tensors(folder.round_path("finetune", 1))["weights"]
        for folder in (made, RunFolder(made.path / TWIN))
    )
    assert float((first - honest).norm()) == pytest.approx(50 / 6, rel=0.01)
    assert summarise(made)["attack"]["kind"] == "wrong_vector"


def test_dropping_out_before_work_charges_nothing(
    wisconsin: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[str] = []
    real = MemoryGuard.charge

    def noted(guard: MemoryGuard, asked: Release) -> Stream:
        charged.append(asked.stage)
        return real(guard, asked)

    monkeypatch.setattr(MemoryGuard, "charge", noted)
    scenario = {"dropouts": {"probability": 0.3}}
    study = wisconsin.revised(
        simulation__scenario=scenario, federation__minimum_hospitals=1, finetune__rounds=4
    )
    made = run(study, tmp_path / "run")
    found = made.read_json("result.json")["forecast"]["rounds"]
    training = [one for one in found if one["stage"] == "finetune"]
    assert charged.count("finetune") == sum(one["answered"] for one in training) < 16
    assert json.loads((made.path / "privacy.json").read_text())["epsilon_spent"] <= 3.0


def test_the_example_runs_and_tells_its_story(tmp_path: Path) -> None:
    study = load_study(ROOT / "deploy" / "examples" / "scenario.toml").revised(
        finetune__rounds=4, pretrain__steps=30, distill__steps=30
    )
    made = run(study, tmp_path / "run", noise_seed=None)
    run_twin(made.path, quiet)
    lines = "\n".join(scenario_lines(summarise(made)))
    for words in ("10/10 Mbit/s", "backdoor", "curious coordinator", "95 % intervals"):
        assert words in lines
