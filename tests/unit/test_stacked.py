"""Many hospitals' weights in one model, against the same model one hospital at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.learning.gradients import GhostNorms, PerRecordGradients, clipped_sum
from common.learning.groups import Groups
from common.models.checks import SUPPORTED_LAYERS
from common.tensors import get_vector, set_vector
from simulations.stacked import RULES, obstacle, stacked
from tests.unit.zoo import MODELS, a_plan, build, loss

SIZES = (2, 0, 1, 3)  # records of each hospital; one has none


def apart(model: nn.Module, hospitals: int) -> Tensor:
    """Weights of its own for each hospital [K, d]."""
    start = get_vector(model)
    noise = torch.randn(hospitals, len(start), generator=torch.Generator().manual_seed(1))
    return start + 0.1 * noise


def parts(sizes: tuple[int, ...]) -> list[slice]:
    return [slice(start, stop) for start, stop in Groups(sizes).bounds()]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_each_hospitals_own_weights(name: str) -> None:
    model, inputs, _ = build(name)
    weights = apart(model, len(SIZES))
    with stacked(model, weights, Groups(SIZES)):
        found = model(inputs)
    for own, part in zip(weights, parts(SIZES), strict=True):
        set_vector(model, own)
        if part.stop > part.start:
            torch.testing.assert_close(found[part], model(inputs[part]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", [PerRecordGradients, GhostNorms])
def test_clipped_sums_are_those_of_each_hospital_alone(
    name: str, engine: type[PerRecordGradients] | type[GhostNorms]
) -> None:
    model, inputs, targets = build(name)
    weights, each = apart(model, len(SIZES)), engine(model, loss)
    norms = PerRecordGradients(model, loss)(get_vector(model), inputs, targets).norm(dim=1)
    settings = a_plan(float(norms.median()))  # some are clipped, some are not
    each.check(inputs)
    with stacked(model, weights, Groups(SIZES)):
        found = each.clipped_sums(inputs, targets, torch.arange(6), Groups(SIZES), settings)
    for own, sums, part in zip(weights, found, parts(SIZES), strict=True):
        rows = part.stop - part.start
        alone = clipped_sum(
            each, own, inputs[part], targets[part], torch.arange(rows), rows, settings
        )
        torch.testing.assert_close(sums, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_several_records_of_a_patient_are_summed_before_the_clip(name: str) -> None:
    model, inputs, targets = build(name)
    patients = (1, 2, 0, 1)  # of each hospital
    owners, rows = torch.tensor([0, 0, 1, 2, 2, 3]), (2, 3, 0, 1)
    weights, each, settings = apart(model, 4), PerRecordGradients(model, loss), a_plan(0.05)
    each.check(inputs)
    with stacked(model, weights, Groups(rows)):
        found = each.clipped_sums(inputs, targets, owners, Groups(patients), settings)
    first = 0
    for own, sums, part, count in zip(weights, found, parts(rows), patients, strict=True):
        alone = clipped_sum(
            each, own, inputs[part], targets[part], owners[part] - first, count, settings
        )
        torch.testing.assert_close(sums, alone, rtol=1e-4, atol=1e-6)
        first += count


@pytest.mark.parametrize("name", MODELS)
def test_plain_gradients_are_those_of_each_hospital_alone(name: str) -> None:
    model, inputs, targets = build(name)
    weights = apart(model, len(SIZES)).requires_grad_()
    with stacked(model, weights, Groups(SIZES)):
        losses = loss(model(inputs), targets)
    (found,) = torch.autograd.grad(losses.sum(), weights)
    one = a_plan(1e9)
    each = PerRecordGradients(model, loss)
    for own, gradient, part in zip(weights.detach(), found, parts(SIZES), strict=True):
        rows = part.stop - part.start
        alone = clipped_sum(each, own, inputs[part], targets[part], torch.arange(rows), rows, one)
        torch.testing.assert_close(gradient, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_uneven_padding_lies_at_the_end() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Conv1d(5, 4, 4, padding="same"), torch.randn(6, 5, 8)
    weights = apart(model, 1)
    with stacked(model, weights, Groups((6,))):
        found = model(inputs)
    set_vector(model, weights[0])
    torch.testing.assert_close(found, model(inputs))


def test_one_bad_record_spoils_nobody_elses_sum() -> None:
    model, inputs, targets = build("linear")
    weights, each, sizes = apart(model, 2), GhostNorms(model, loss), Groups((3, 3))
    each.check(inputs)

    def sums(records: Tensor) -> Tensor:
        with stacked(model, weights, sizes):
            return each.clipped_sums(records, targets, torch.arange(6), sizes, a_plan(1.0))

    expected = sums(inputs)
    inputs[4] = torch.nan
    found = sums(inputs)
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


def test_a_hospitals_sum_depends_on_its_own_records_and_weights_alone() -> None:
    model, inputs, targets = build("attention")
    weights, each, sizes = apart(model, 2), GhostNorms(model, loss), Groups((2, 4))
    each.check(inputs)

    def first(records: Tensor, own: Tensor) -> Tensor:
        with stacked(model, own, sizes):
            return each.clipped_sums(records, targets, torch.arange(6), sizes, a_plan(0.1))[0]

    expected = first(inputs, weights)
    changed_inputs, changed_weights = inputs.clone(), weights.clone()
    changed_inputs[2:] += 5
    changed_weights[1] -= 3
    torch.testing.assert_close(first(changed_inputs, changed_weights), expected)


def test_the_model_is_itself_again_afterwards() -> None:
    model, inputs, _ = build("groupnorm")
    before, answers = get_vector(model), model(inputs)
    with (
        pytest.raises(RuntimeError, match="stopped"),
        stacked(model, apart(model, 1), Groups((6,))),
    ):
        raise RuntimeError("stopped")
    assert torch.equal(get_vector(model), before)
    assert torch.equal(model(inputs), answers)
    assert all("forward" not in layer.__dict__ for layer in model.modules())


def test_every_layer_with_a_gradient_rule_is_stacked_by_one() -> None:
    assert RULES.keys() == SUPPORTED_LAYERS


def test_what_cannot_be_stacked_is_known_beforehand() -> None:
    assert not any(obstacle(*build(name)[:2]) for name in MODELS)
    vectors = torch.ones(3, 4)
    dropout = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1))
    assert obstacle(dropout, vectors) == "Sequential draws random numbers as it learns"
    assert obstacle(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.0)), vectors) is None
    norm = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    assert "mixes the records" in str(obstacle(norm, vectors))


@pytest.mark.parametrize("sizes", [(2, 2), (1, 0, 3), (0, 0), (5,)])
def test_blocks_and_rows_are_inverse(sizes: tuple[int, ...]) -> None:
    groups = Groups(sizes)
    values = torch.arange(2.0 * groups.rows).reshape(-1, 2) + 1
    blocks = groups.blocks(values)
    assert blocks.shape == (len(sizes), max(sizes), 2)
    assert torch.equal(groups.unblocked(blocks), values)
    for one, size in enumerate(sizes):
        assert (blocks[one, size:] == 0).all()
        assert (groups.of_rows == one).sum() == size
