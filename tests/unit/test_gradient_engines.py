"""Both engines against a slow oracle: autograd, one record at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from common.errors import PrivacyError
from common.learning import gradients as engines
from common.learning import layers
from common.learning.capture import Capture, LayerCall
from common.learning.gradients import (
    Engine,
    GhostNorms,
    PerRecordGradients,
    choose_engine,
    clipped_sum,
    private_gradient,
)
from common.learning.records import Records
from common.models import sizes
from common.models.lora import LoraLinear
from common.privacy.plan import combine_records
from common.randomness import SeededNoise
from common.tensors import get_vector, set_vector, trainable
from tests.unit.zoo import MODELS, ROWS, a_plan, build, loss

ENGINES: list[Callable[..., Engine]] = [PerRecordGradients, GhostNorms]


plan = partial(a_plan, clip_norm=0.3)


def oracle(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Per-record gradients [rows, d] by autograd, in float64, one record at a time."""
    model = model.double().train()
    rows = []
    for row in range(len(inputs)):
        one = inputs[row : row + 1]
        one = one.double() if one.is_floating_point() else one
        found = torch.autograd.grad(
            loss(model(one), targets[row : row + 1]).sum(), trainable(model), allow_unused=True
        )
        rows.append(
            torch.cat(
                [
                    torch.zeros(weight.numel()) if gradient is None else gradient.reshape(-1)
                    for weight, gradient in zip(trainable(model), found, strict=True)
                ]
            )
        )
    model.float()
    return torch.stack(rows).float()


@pytest.mark.parametrize("name", MODELS)
def test_per_record_gradients_equal_the_oracle(name: str) -> None:
    model, inputs, targets = build(name)
    expected = oracle(model, inputs, targets)
    found = PerRecordGradients(model, loss)(get_vector(model), inputs, targets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("several", [False, True])
def test_clipped_sums_equal_the_oracle(
    name: str, engine: Callable[..., Engine], several: bool
) -> None:
    model, inputs, targets = build(name)
    owners = torch.tensor([0, 0, 0, 1, 3, 3]) if several else torch.arange(ROWS)
    units = 4 if several else ROWS  # unit 2 has no record
    each = combine_records(oracle(model, inputs, targets), owners, units)
    norms = torch.linalg.vector_norm(each, dim=1)
    settings = plan(clip_norm=float(norms[norms > 0].median()))  # some are clipped, some are not
    expected = settings.clipped_sum(each)
    found = clipped_sum(
        engine(model, loss), get_vector(model), inputs, targets, owners, units, settings
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv2d", "wide linear on sequences", "attention"])
def test_clipped_sums_equal_those_of_opacus_itself(name: str) -> None:
    model, inputs, targets = build(name)
    weights = get_vector(model)
    found = clipped_sum(
        GhostNorms(model, loss), weights, inputs, targets, torch.arange(ROWS), ROWS, plan()
    )
    hooked = GradSampleModule(model, loss_reduction="sum")
    loss(hooked(inputs), targets).sum().backward()
    each = torch.cat([one.grad_sample.reshape(ROWS, -1) for one in trainable(model)], dim=1)
    hooked.remove_hooks()
    torch.testing.assert_close(found, plan().clipped_sum(each), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["linear", "wide linear on sequences", "groupnorm", "attention"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_record_without_finite_gradient_counts_as_zero(
    engine: Callable[..., Engine], name: str, bad: float
) -> None:
    model, inputs, targets = build(name)
    made = engine(model, loss)
    sound = torch.tensor([0, 1, 3, 4, 5])
    expected = clipped_sum(
        made, get_vector(model), inputs[sound], targets[sound], torch.arange(5), 5, plan()
    )
    inputs[2] = bad
    found = clipped_sum(made, get_vector(model), inputs, targets, torch.arange(ROWS), ROWS, plan())
    assert torch.isfinite(found).all()
    difference = found - expected
    # 3e38 may saturate instead of overflowing: then it counts, clipped.
    assert difference.norm() < 1e-5 or (bad == 3e38 and difference.norm() <= 0.3 + 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_bad_record_drops_its_whole_patient(engine: Callable[..., Engine]) -> None:
    model, inputs, targets = build("linear")
    owners = torch.tensor([0, 0, 1, 1, 2, 2])
    inputs[2] = float("nan")
    made = engine(model, loss)
    found = clipped_sum(made, get_vector(model), inputs, targets, owners, 3, plan())
    keep = torch.tensor([0, 1, 4, 5])
    expected = clipped_sum(
        made, get_vector(model), inputs[keep], targets[keep], torch.tensor([0, 0, 1, 1]), 2, plan()
    )
    torch.testing.assert_close(found, expected)


def cancelling_call() -> LayerCall:
    """Six records of two positions, alike but for a trace: their gradients cancel, not quite.

    Each record's gradient has norm 10⁴. The terms of its squared norm are 10¹⁶ and cancel to 10⁸,
    one part in 10⁸: beyond float32, whose numbers have 24 bits.
    """
    generator = torch.Generator().manual_seed(0)

    def long() -> Tensor:
        vectors = torch.randn(6, 64, generator=generator)
        return 1e4 * vectors / vectors.norm(dim=1, keepdim=True)

    seen, asked = long(), long()
    moved = asked.clone()
    moved[:, 0] += 1.0
    return LayerCall(
        nn.Linear(64, 64, bias=False),
        torch.stack([seen, seen], dim=1),
        torch.stack([asked, -moved], dim=1),
    )


def test_a_record_crafted_to_cancel_cannot_hide_its_norm() -> None:
    call = cancelling_call()
    exact = torch.einsum("nto,nti->noi", call.derivative.double(), call.inputs.double())
    norms = exact.flatten(1).norm(dim=1)
    assert (norms > 0.99e4).all()
    rule = GradSampleModuleFastGradientClipping.NORM_SAMPLERS[nn.Linear]
    unguarded = rule(call.layer, [call.inputs], call.derivative)[call.layer.weight]
    assert (unguarded == 0).any()  # such a record would not be clipped at all
    assert (layers.GhostLinear(call).squares.sqrt() >= norms).all()


def test_ghost_norms_never_fall_short_on_random_cancelling_records() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(96, 96, bias=False)
    for scale in (1.0, 1e-2, 1e-4, 1e-6):
        half = torch.randn(8, 4, 96, generator=generator)
        seen = torch.cat([half, half], dim=1)
        asked = torch.randn(8, 4, 96, generator=generator)
        asked = torch.cat([asked, -asked + scale * torch.randn(8, 4, 96, generator=generator)], 1)
        exact = torch.einsum("nto,nti->noi", asked.double(), seen.double()).flatten(1).norm(dim=1)
        assert (layers.GhostLinear(LayerCall(layer, seen, asked)).squares.sqrt() >= exact).all()


def test_the_layer_rule_takes_the_cheaper_way() -> None:
    def call(wide: int, out: int, positions: int) -> LayerCall:
        layer = nn.Linear(wide, out)
        return LayerCall(layer, torch.ones(2, positions, wide), torch.ones(2, positions, out))

    assert isinstance(layers.ghost([call(96, 96, 5)]), layers.GhostLinear)
    assert isinstance(layers.ghost([call(128, 8, 64)]), layers.Held)  # LoRA
    assert isinstance(layers.ghost([call(96, 96, 5)] * 2), layers.Held)


def test_engine_follows_the_records() -> None:
    model = nn.Linear(8, 3)
    one = Records(torch.randn(4, 8), torch.zeros(4), torch.arange(4), 4)
    two = Records(torch.randn(4, 8), torch.zeros(4), torch.tensor([0, 0, 1, 2]), 3)
    assert isinstance(choose_engine(model, loss, one), GhostNorms)
    assert isinstance(choose_engine(model, loss, two), PerRecordGradients)


def records(rows: int = 40) -> Records:
    torch.manual_seed(5)
    owners = torch.sort(torch.randint(0, 15, (rows,))).values
    return Records(torch.randn(rows, 8), torch.arange(rows) % 3, owners, 15)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_memory_and_engine_change_no_noise(
    engine: Callable[..., Engine], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("linear")[0]
    settings = plan(sampling_rate=0.7, records_per_unit=2)

    def release(made: Engine) -> Tensor:
        stream = SeededNoise(1, "north").stream("round", 0)
        gradient = private_gradient(made, records(), settings, expected_units=10, stream=stream)
        return torch.cat([gradient(get_vector(model)) for _ in range(3)])

    whole = release(PerRecordGradients(model, loss))
    monkeypatch.setattr(sizes, "_MOST_ROWS", at_once)
    torch.testing.assert_close(release(engine(model, loss)), whole, rtol=1e-4, atol=1e-5)


def test_parts_split_no_unit() -> None:
    class OneAtATime:
        def rows_at_once(self, *, one_record_each: bool) -> int:
            return 3

    owners = torch.tensor([0, 0, 1, 2, 2, 2, 2, 4])
    parts: Iterator[tuple[int, int, slice]] = engines._parts(owners, 6, OneAtATime())  # type: ignore[arg-type]
    assert list(parts) == [
        (0, 2, slice(0, 3)),
        (2, 3, slice(3, 7)),
        (3, 6, slice(7, 8)),
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_sample_is_pure_noise(engine: Callable[..., Engine]) -> None:
    model = build("linear")[0]
    made = engine(model, loss)
    none = torch.zeros(0, dtype=torch.int64)
    total = clipped_sum(made, get_vector(model), torch.zeros(0, 8), none, none, 0, plan())
    assert torch.equal(total, torch.zeros(made.size))
    gradient = private_gradient(
        made,
        Records(torch.zeros(0, 8), none, none, 0),
        plan(),
        expected_units=2.0,
        stream=SeededNoise(0, "x").stream("a"),
    )
    noise = SeededNoise(0, "x").stream("a").normal(made.size) * 0.3 / 2.0
    torch.testing.assert_close(gradient(get_vector(model)).double(), torch.from_numpy(noise))


def test_an_exception_in_mid_step_leaves_nothing_behind() -> None:
    model, inputs, targets = build("attention")
    made = GhostNorms(model, loss)
    expected = clipped_sum(
        made, get_vector(model), inputs, targets, torch.arange(ROWS), ROWS, plan()
    )

    def broken(answers: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        Capture(model)(broken, inputs, targets)
    assert all(not module._forward_hooks for module in model.modules())
    again = clipped_sum(made, get_vector(model), inputs, targets, torch.arange(ROWS), ROWS, plan())
    assert torch.equal(again, expected)


def test_gradients_follow_the_given_weights() -> None:
    model, inputs, targets = build("linear")
    made = GhostNorms(model, loss)
    owners = torch.arange(ROWS)
    weights = get_vector(model) + 0.5
    found = clipped_sum(made, weights, inputs, targets, owners, ROWS, plan())
    set_vector(model, weights)
    expected = plan().clipped_sum(oracle(model, inputs, targets))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_must_be_per_record() -> None:
    model, inputs, targets = build("linear")
    with pytest.raises(ValueError, match="one loss per record"):
        PerRecordGradients(model, nn.functional.cross_entropy)(get_vector(model), inputs, targets)


def test_lora_starts_as_the_original_and_merges_to_itself() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 5)
    inputs = torch.randn(4, 8)
    expected = base(inputs)
    layer = LoraLinear(base, rank=2, scale=4.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(inputs), expected)
    nn.init.normal_(layer.up.weight)
    assert not torch.allclose(layer(inputs), expected)
    torch.testing.assert_close(layer.merged()(inputs), layer(inputs))
    assert {name for name, one in layer.named_parameters() if one.requires_grad} == {
        "down.weight",
        "up.weight",
    }


def test_refusals_name_the_mixing_layer() -> None:
    class Wrong(nn.Module):
        """A learned position table: its input has positions first, where records belong."""

        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(5, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head((inputs + self.places(torch.arange(5))).mean(dim=1))

    model, inputs = Wrong(), torch.randn(4, 5, 8)
    with pytest.raises(PrivacyError, match=r"layer 'places' \(Embedding\): expected the 2 records"):
        PerRecordGradients(model, loss)(get_vector(model), inputs, torch.zeros(4).long())
    with pytest.raises(PrivacyError, match="places"):  # even when 5 records meet 5 positions
        PerRecordGradients(model, loss)(
            get_vector(model), torch.randn(5, 5, 8), torch.zeros(5).long()
        )
