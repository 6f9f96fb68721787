"""Where models run: the same sums there, bounded alike, and back on the processor afterwards.

Tests on a GPU are skipped where there is none; bfloat16 is tried on the processor too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from client.hospital import open_hospital
from client.hospitalfile import load_hospital_file
from common.compute import DEVICE_VARIABLE, ComputeSpec
from common.errors import StudyError
from common.learning import capture
from common.learning.evaluate import answer
from common.learning.gradients import (
    GhostNorms,
    PerRecordGradients,
    clipped_sum,
    plain_gradient,
    private_gradient,
)
from common.learning.groups import Groups
from common.learning.records import Records
from common.localmodels import HOME
from common.place import CPU, Place, choose, here, placed
from common.randomness import SeededNoise
from common.study import Study, load_study
from common.tensors import get_vector, set_vector
from server.store import RunFolder
from simulations.bench.trained import EXAMPLES
from simulations.evaluation import finished_models
from simulations.hospitals import build_world, open_world, seeded_noise, write_world
from simulations.simulate import InProcess, run_in_process
from simulations.stacked import stacked
from tests.unit.zoo import MODELS, ROWS, a_plan, build, loss

# RMSNorm has no fused way for values and weights of two precisions; the slow one is right.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
ENGINES: list[type[PerRecordGradients] | type[GhostNorms]] = [PerRecordGradients, GhostNorms]
HERE = ComputeSpec(device="cpu", precision="float32")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
HALF = [
    pytest.param(ComputeSpec(device="cpu", precision="bfloat16"), id="cpu-bfloat16"),
    pytest.param(ComputeSpec(device="cuda", precision="bfloat16"), id="gpu-bf16", marks=NO_GPU),
]
ELSEWHERE = [
    *HALF,
    pytest.param(ComputeSpec(device="cuda", precision="float32"), id="gpu-float32", marks=NO_GPU),
]


plan = partial(a_plan, sampling_rate=0.7)


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """No test leaves the process elsewhere than it was."""
    with placed(HERE):
        yield


def close(spec: ComputeSpec, found: Tensor, expected: Tensor) -> None:
    """Equal to the rounding of the place."""
    scale = float(expected.abs().max())
    if spec.precision == "float32":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)
        return
    # bfloat16 keeps 8 bits, and a few layers add up their rounding.
    assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("spec", ELSEWHERE)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_clipped_sums_are_those_of_the_processor(
    name: str, engine: type[PerRecordGradients] | type[GhostNorms], spec: ComputeSpec
) -> None:
    model, inputs, targets = build(name)
    weights = get_vector(model)
    norms = PerRecordGradients(model, loss)(weights, inputs, targets).norm(dim=1)
    settings = plan(float(norms.median()))  # some are clipped, some are not

    def found() -> Tensor:
        made = engine(model, loss)
        return clipped_sum(made, weights, inputs, targets, torch.arange(ROWS), ROWS, settings)

    expected = found()
    with placed(spec) as place:
        model.to(place.device)
        elsewhere = found()
    assert elsewhere.dtype is torch.float32 and elsewhere.device == CPU
    close(spec, elsewhere, expected)


@pytest.mark.parametrize("spec", ELSEWHERE)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_no_record_weighs_more_than_the_clip_norm(
    name: str, engine: type[PerRecordGradients] | type[GhostNorms], spec: ComputeSpec
) -> None:
    model, inputs, targets = build(name)
    weights, clip_norm = get_vector(model), 1e-3
    with placed(spec) as place:
        model.to(place.device)
        for row in range(ROWS):
            one, target = inputs[row : row + 1], targets[row : row + 1]
            made = engine(model, loss)
            alone = clipped_sum(made, weights, one, target, torch.arange(1), 1, plan(clip_norm))
            assert 0.9 * clip_norm < float(alone.double().norm()) <= clip_norm * (1 + 1e-6)


def test_what_is_clipped_is_what_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms taken in bfloat16 of what is summed in float32 would let a record weigh more."""
    model, inputs, targets = build("linear")
    kinds: list[torch.dtype] = []
    seen = capture.LayerCall

    def noted(layer: nn.Module, given: Tensor, derivative: Tensor) -> capture.LayerCall:
        kinds.extend((given.dtype, derivative.dtype))
        return seen(layer, given, derivative)

    monkeypatch.setattr(capture, "LayerCall", noted)
    with placed(ComputeSpec(device="cpu", precision="bfloat16")):
        GhostNorms(model, loss).clipped_sums(
            inputs, targets, torch.arange(ROWS), Groups((ROWS,)), plan(1.0)
        )
        with Place(CPU, bf16=True).passing():
            assert model(inputs).dtype is torch.bfloat16  # it was asked for, indeed
    assert set(kinds) == {torch.float32}


@pytest.mark.parametrize("spec", HALF)
@pytest.mark.parametrize("name", MODELS)
def test_stacked_hospitals_learn_in_bfloat16_as_each_alone(name: str, spec: ComputeSpec) -> None:
    model, inputs, targets = build(name)
    sizes = (2, 0, 1, 3)
    start = get_vector(model)
    weights = start + 0.1 * torch.randn(4, len(start), generator=torch.Generator().manual_seed(1))
    with placed(spec) as place:
        model.to(place.device)
        each = GhostNorms(model, loss)
        each.check(inputs)
        with stacked(model, weights, Groups(sizes)):
            found = each.clipped_sums(inputs, targets, torch.arange(ROWS), Groups(sizes), plan(0.1))
        for own, sums, (begin, end) in zip(weights, found, Groups(sizes).bounds(), strict=True):
            rows = end - begin
            alone = clipped_sum(
                each,
                own,
                inputs[begin:end],
                targets[begin:end],
                torch.arange(rows),
                rows,
                plan(0.1),
            )
            close(spec, sums, alone) if rows else torch.testing.assert_close(sums, alone)


@pytest.mark.parametrize("spec", ELSEWHERE)
@pytest.mark.parametrize("name", ["linear", "groupnorm", "embedding", "vision transformer"])
def test_a_step_draws_alike_wherever_it_is_made(name: str, spec: ComputeSpec) -> None:
    model, inputs, targets = build(name)
    records = Records(inputs, targets, torch.arange(ROWS), ROWS)
    weights = get_vector(model)

    def step(private: bool) -> Tensor:
        stream = SeededNoise(5, "north").stream("train")
        if not private:
            return plain_gradient(
                model, loss, records, plan(1.0), expected_units=4.0, stream=stream
            )(weights)
        engine = GhostNorms(model, loss)
        return private_gradient(engine, records, plan(1e-3), expected_units=4.0, stream=stream)(
            weights
        )

    expected = step(private=True), step(private=False)
    with placed(spec) as place:
        model.to(place.device)
        found, again, open_ = step(private=True), step(private=True), step(private=False)
    assert torch.equal(found, again)  # to the bit
    # All but the noise was clipped to so little that rounding cannot hide another draw.
    torch.testing.assert_close(found, expected[0], rtol=0, atol=3e-4)
    close(spec, open_, expected[1])


@pytest.mark.parametrize("spec", ELSEWHERE)
def test_vectors_and_answers_are_on_the_processor(spec: ComputeSpec) -> None:
    model, inputs, _ = build("attention")
    expected = answer(model, inputs)
    with placed(spec) as place:
        model.to(place.device)
        set_vector(model, get_vector(model))
        assert get_vector(model).device == CPU
        torch.testing.assert_close(answer(model, inputs), expected, rtol=1e-4, atol=1e-5)


def finished(study: Study, folder: Path, engine: InProcess) -> tuple[Tensor, dict[str, object]]:
    """The student of a whole run, with test noise."""
    world = build_world(study, Path())
    run = RunFolder.create(folder, study)
    hospitals = open_world(world, seeded_noise(0, [site.name for site in world.sites]))
    run_in_process(study, run, hospitals, world.corpus, lambda _: None, engine=engine)
    _, student, _ = finished_models(run, study)
    return get_vector(student), run.read_json("result.json")


@pytest.mark.parametrize("spec", ELSEWHERE)
@pytest.mark.parametrize("engine", ["stacked", "one-by-one"])
def test_a_whole_study_ends_alike_and_says_where_it_ran(
    tmp_path: Path, engine: InProcess, spec: ComputeSpec
) -> None:
    study = load_study(EXAMPLES / "wisconsin.toml").revised(
        finetune__rounds=2, pretrain__steps=20, distill__steps=20
    )
    expected, said = finished(study, tmp_path / "cpu", engine)
    with placed(spec) as place:
        found, elsewhere = finished(study, tmp_path / "elsewhere", engine)
        assert elsewhere["device"] == str(place)
    assert said["device"] == "cpu"
    assert not torch.equal(found, expected) or spec.precision == "float32"
    close(spec, found, expected)


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StudyError, match="expected a GPU for 'cuda', PyTorch finds none"):
        choose(ComputeSpec(device="cuda"))
    with placed(ComputeSpec()) as place:
        assert place == Place(CPU)  # auto: neither a GPU nor bfloat16
    monkeypatch.setenv(DEVICE_VARIABLE, "gpu")
    with pytest.raises(StudyError, match="expected one of auto, cpu, cuda, found 'gpu'"):
        choose(ComputeSpec())


def test_a_hospital_says_where_its_models_run_and_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(EXAMPLES / "wisconsin.toml")
    write_world(build_world(study, Path()), tmp_path)
    folder = next((tmp_path / "hospitals").iterdir())
    path = folder / "hospital.toml"
    said = 'models = "below"\n[compute]\ndevice = "cpu"\nprecision = "bfloat16"\n'
    settings = path.read_text()
    path.write_text(settings.replace("[source]", said + "[source]", 1))
    monkeypatch.setenv(HOME, "elsewhere")
    with open_hospital(folder, load_study(tmp_path / "study.toml").digest()):
        assert here().bf16
        assert os.environ[HOME] == str(folder.resolve() / "below")
    path.write_text(settings.replace("[source]", '[compute]\ndevice = "gpu"\n[source]', 1))
    with pytest.raises(StudyError, match="compute.device: expected one of auto, cpu, cuda"):
        load_hospital_file(folder)


def test_settings_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
    assert ComputeSpec().settled() == ComputeSpec(device="cuda")
    with placed(ComputeSpec(device="cpu", precision="bfloat16")) as place:
        assert place == replace(place, device=CPU, bf16=True)
