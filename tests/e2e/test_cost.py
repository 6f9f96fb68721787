"""What a study is said to cost beforehand is what it costs."""

import json
import os
from pathlib import Path

import pytest

from common.localmodels import HOME
from common.privacy.budget import stage_charge
from common.secagg.plan import check_sums
from common.study import Study, load_study
from server.store import RunFolder
from simulations.cli import main
from simulations.cost import cost_of, model_costs, one_round_of, run_cost
from simulations.run_report import write_run_report
from simulations.simulate import simulate

EXAMPLES = Path("deploy/examples")


def small(**changes: object) -> Study:
    study = load_study(EXAMPLES / "wisconsin.toml")
    return study.revised(pretrain__steps=5, finetune__rounds=3, distill__steps=5, **changes)


DISTRIBUTED = {
    "privacy__trust": "distributed",
    "federation__hospitals": 8,
    "federation__tolerated_dropouts": 1,
    "federation__proximal_mu": None,
    "federation__rule": "fedavg",
    "finetune__local_steps": 1,
    "finetune__optimiser": {"kind": "sgd", "learning_rate": 0.5},
    "evaluation__epsilon": None,
}


@pytest.mark.parametrize("changes", [{}, DISTRIBUTED, {"scaling": "private"}])
def test_bytes_foreseen_are_those_of_the_run(tmp_path: Path, changes: dict[str, object]) -> None:
    study = small(**changes)
    run = simulate(study, tmp_path / "run", Path(), lambda _: None)
    facts = run_cost(run, study)
    asked = [one for one in facts["stages"] if one["at"] == "hospital"]
    assert [one["stage"] for one in asked][-1 if "evaluation__epsilon" in changes else -2] == (
        "finetune"
    )
    for one in asked:
        for key in ("bytes_down", "bytes_up"):
            # Numbers of rounds and attempts take a byte more or less.
            assert one["measured"][key] == pytest.approx(one[key], rel=0.005)
            assert one[key] > 0
    tuned = next(one for one in asked if one["stage"] == "finetune")
    assert tuned["measured"]["rounds"] == tuned["rounds"] == 3
    assert tuned["measured"]["cpu_s"] > 0


def test_a_report_says_what_the_run_took(tmp_path: Path) -> None:
    run = simulate(small(), tmp_path / "run", Path(), lambda _: None)
    text = write_run_report(run.path).read_text()
    assert "Cost of computation" in text and "12,319" in text
    kept = RunFolder(run.path).costs()
    assert [(one["stage"], one["round"]) for one in kept] == [
        ("pretrain", 1),
        ("finetune", 1),
        ("finetune", 2),
        ("finetune", 3),
        ("distill", 1),
    ]


def test_operations_of_a_plain_network_are_counted_by_hand() -> None:
    study = small(teacher={"kind": "mlp", "hidden": [7, 5]}, student={"kind": "mlp", "hidden": [2]})
    teacher, student = model_costs(study)
    inputs = 30
    assert teacher.flops == 2 * (inputs * 7 + 7 * 5 + 5 * 1)
    assert student.flops == 2 * (inputs * 2 + 2 * 1)
    assert teacher.parameters == (inputs + 1) * 7 + (7 + 1) * 5 + (5 + 1)
    assert teacher.weight_bytes == 4 * teacher.parameters
    assert (teacher.trained, student.trained) == (5 + 1, 0)


def test_the_round_that_is_tried_has_the_noise_of_the_study() -> None:
    study = load_study(EXAMPLES / "acic.toml")
    tried = one_round_of(study, 8)
    sigmas = [stage_charge(one, "finetune").plan.noise_multiplier for one in (study, tried)]
    assert sigmas[1] == pytest.approx(sigmas[0], rel=0.01)
    check_sums(tried)  # at the study's own epsilon, one round's sum had no room for so little noise


def test_a_round_takes_more_operations_with_more_patients() -> None:
    few, many = (
        {one.stage: one for one in cost_of(small(), patients=patients).stages}["finetune"]
        for patients in (40, 400)
    )
    assert 5 < many.flops / few.flops < 15
    assert many.bytes_up == few.bytes_up


def test_epsilon_adds_up_to_the_promise() -> None:
    stages = cost_of(small(), patients=40).stages
    spent = {one.stage: one.epsilon for one in stages}
    assert spent["pretrain"] is None and spent["distill"] is None
    assert spent["finetune"] == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_students_are_small_and_quick(path: Path) -> None:
    study = load_study(path)
    if study.teacher.kind == "pretrained" and HOME not in os.environ:
        pytest.skip(f"{HOME} names no folder with the pre-trained model")
    teacher, student = model_costs(study)
    assert teacher.parameters >= 10 * student.parameters
    assert teacher.flops >= 5 * student.flops


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["consilium", "cost", str(EXAMPLES / "wisconsin.toml"), "--json"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["smaller"] > 20 and facts["hospitals"] == 8 and facts["patients"] == 1000
    assert all(one["measured"] is None for one in facts["stages"])


def test_a_run_that_is_not_finished_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder.create(tmp_path / "run", small())
    monkeypatch.setattr("sys.argv", ["consilium", "cost", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
