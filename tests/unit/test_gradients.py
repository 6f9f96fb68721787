"""Private gradients against a slow oracle: one record, one backward pass, nothing shared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.features import FeatureMap, range_scaling
from common.learning.gradients import PerRecordGradients, plain_gradient, private_gradient
from common.learning.records import Records
from common.models import build_student, build_teacher, sizes
from common.privacy.plan import combine_records
from common.randomness import SeededNoise, Stream
from common.study import Study, parse_study
from common.tasks import task_of
from common.tensors import get_vector, set_vector, trainable
from tests.unit.zoo import a_plan

SIZE = 5


def stream(name: str = "s") -> Stream:
    return SeededNoise(1, "test").stream(name)


def squared(answers: Tensor, targets: Tensor) -> Tensor:
    return (answers[:, 0] - targets).square()


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(SIZE, 1)


def records_for(counts: list[int], *, seed: int = 0) -> Records:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = len(owners)
    return Records(
        torch.randn(rows, SIZE, generator=generator),
        torch.randn(rows, generator=generator),
        owners,
        len(counts),
    )


def oracle(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """Plain autograd, one record at a time."""
    rows = []
    for one in range(len(x)):
        value = loss(model(x[one : one + 1]), y[one : one + 1]).sum()
        grads = torch.autograd.grad(value, trainable(model))
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
    return torch.stack(rows)


def _tables(tree: dict[str, object], part: str) -> tuple[nn.Module, Study, Tensor]:
    study = parse_study(tree, origin="test")
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    shape = (7, features.width) if features.image_shape is None else (7, 1, *features.image_shape)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if part == "student":
        return build_student(study, features), study, inputs
    teacher = build_teacher(study, features)
    nn.init.normal_(teacher.head.weight, generator=torch.Generator().manual_seed(1))
    teacher.encoder.requires_grad_(part == "all")
    return teacher, study, inputs


@pytest.mark.parametrize("part", ["head", "all", "student"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("classes", [2, 3])
def test_per_record_gradients_equal_the_oracle(
    tree: dict[str, dict[str, object]], kind: str, part: str, classes: int
) -> None:
    tree["dictionary"]["label"] = {"name": "ill", "classes": [[one] for one in range(classes)]}
    if kind == "cnn":
        tree |= {
            "task": "imaging",  # type: ignore[dict-item]
            "public": {"kind": "held_apart"},
            "teacher": {"kind": "cnn", "hidden": [4, 8, 6]},
            "student": {"kind": "cnn", "hidden": [3, 6]},
        }
        tree["dictionary"]["columns"] = [{"name": "x", "kind": "image", "shape": [9, 7]}]
    model, study, inputs = _tables(tree, part)  # type: ignore[arg-type]
    loss = task_of(study).loss
    labels = torch.arange(7) % classes
    slow = oracle(model, loss, inputs, labels)
    each = PerRecordGradients(model, loss)
    fast = each(get_vector(model), inputs, labels)
    assert fast.shape == (7, each.size)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)
    # Neither order nor company changes a record's gradient.
    alone = each(get_vector(model), inputs[2:3], labels[2:3])[0]
    torch.testing.assert_close(alone, fast[2], rtol=1e-4, atol=1e-6)


def test_gradients_are_taken_at_the_given_weights() -> None:
    model, records = linear(), records_for([1] * 6)
    each = PerRecordGradients(model, squared)
    elsewhere = torch.randn(each.size, generator=torch.Generator().manual_seed(3))
    fast = each(elsewhere, records.inputs, records.targets)
    twin = linear()
    set_vector(twin, elsewhere)
    torch.testing.assert_close(fast, oracle(twin, squared, records.inputs, records.targets))


def test_nothing_stale_stays_between_calls() -> None:
    """An abandoned call must not leak into the next release (Opacus's own engine does)."""
    model, records = linear(), records_for([1] * 6)
    each = PerRecordGradients(model, squared)
    weights = get_vector(model)
    first = each(weights, records.inputs, records.targets)

    def fails(answers: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError

    each.loss = fails
    with pytest.raises(ArithmeticError):
        each(weights, records.inputs, records.targets)
    each.loss = squared
    torch.testing.assert_close(
        each(weights, records.inputs, records.targets), first, rtol=0, atol=0
    )
    for parameter in trainable(model):
        assert parameter.grad is None
        assert getattr(parameter, "grad_sample", None) is None


def test_records_of_a_unit_are_averaged() -> None:
    gradients = torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 5.0]])
    combined = combine_records(gradients, torch.tensor([0, 0, 2]), 3)
    assert combined.tolist() == [[2.0, 2.0], [0.0, 0.0], [5.0, 5.0]]


def silent(
    records: Records, *, clip: float = 0.1, at_most: int = 8, each: PerRecordGradients | None = None
) -> Tensor:
    """The private gradient with noise too small to see."""
    model = linear()
    made = each or PerRecordGradients(model, squared)
    gradient = private_gradient(
        made,
        records,
        a_plan(clip, noise_multiplier=1e-12, records_per_unit=at_most),
        expected_units=1.0,
        stream=stream(),
    )
    return gradient(get_vector(model))


def test_a_patient_with_many_records_is_clipped_once() -> None:
    """k identical records weigh exactly as one: under record-level clipping they would be k."""
    one = records_for([1, 1, 1])
    many = Records(
        one.inputs[torch.tensor([0, 1, 1, 1, 1, 1, 2])],
        one.targets[torch.tensor([0, 1, 1, 1, 1, 1, 2])],
        torch.tensor([0, 1, 1, 1, 1, 1, 2]),
        3,
    )
    for clip in (0.1, 1e3):  # everyone clipped, and no one
        torch.testing.assert_close(silent(many, clip=clip), silent(one, clip=clip))
    alone = Records(many.inputs[1:6], many.targets[1:6], torch.zeros(5, dtype=torch.int64), 1)
    assert silent(alone).norm() <= 0.1 + 1e-6


def test_at_most_k_records_enter_chosen_uniformly() -> None:
    records = records_for([5, 2, 1])
    chosen: Counter[tuple[int, ...]] = Counter()
    draws = 4000
    one = stream("draws")
    for _ in range(draws):
        rows, owners = records.rows_of(torch.arange(3), 2, one)
        assert owners.tolist() == [0, 0, 1, 1, 2]
        assert sorted(rows[2:4].tolist()) == [5, 6]
        assert rows[4] == 7
        pair = tuple(sorted(rows[:2].tolist()))
        assert len(set(pair)) == 2
        chosen[pair] += 1
    assert len(chosen) == 10  # every pair of five
    expected = draws / 10
    chi_square = sum((count - expected) ** 2 / expected for count in chosen.values())
    assert chi_square < 27.9  # χ² with 9 degrees of freedom, p = .001


def test_rows_of_any_units_in_any_order() -> None:
    owners = torch.tensor([2, 0, 1, 0, 2, 2])
    records = Records(torch.arange(6.0)[:, None], torch.zeros(6), owners, 4)
    rows, owner = records.rows_of(torch.tensor([2, 3, 0]), 8, stream())
    assert rows.tolist() == [0, 4, 5, 1, 3]
    assert owner.tolist() == [0, 0, 0, 2, 2]
    rows, owner = records.rows_of(torch.tensor([], dtype=torch.int64), 2, stream())
    assert (len(rows), len(owner)) == (0, 0)


def test_chunks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    records = records_for([1, 3, 2, 1, 4, 1, 1, 2])
    whole = silent(records, clip=0.5)
    for numbers in (1, 3 * 8 * (SIZE + 1), 10**9):
        monkeypatch.setattr(sizes, "_NUMBERS", numbers)
        torch.testing.assert_close(silent(records, clip=0.5), whole, rtol=1e-5, atol=1e-6)


def test_an_empty_sample_is_pure_noise_of_the_right_scale() -> None:
    model = nn.Linear(4000, 1)
    nobody = Records(torch.randn(3, 4000), torch.zeros(3), torch.arange(3), 3)
    gradient = private_gradient(
        PerRecordGradients(model, squared),
        nobody,
        a_plan(0.7, noise_multiplier=2.0, sampling_rate=1e-9),
        expected_units=10.0,
        stream=stream("empty"),
    )
    first, second = gradient(get_vector(model)), gradient(get_vector(model))
    wanted = 2.0 * 0.7 / 10.0
    for drawn in (first, second):
        # Standard deviation of 4,001 draws: within 4 standard errors.
        assert float(drawn.std()) == pytest.approx(wanted, rel=4 / math.sqrt(2 * 4001))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_a_gradient_that_is_not_finite_counts_as_nobody(poison: float) -> None:
    records = records_for([1, 2, 1])
    spoiled = records.inputs.clone()
    spoiled[1, 2] = poison
    mixed = silent(Records(spoiled, records.targets, records.owners, 3))
    kept = torch.tensor([0, 3])
    without = Records(records.inputs[kept], records.targets[kept], torch.tensor([0, 1]), 2)
    assert torch.isfinite(mixed).all()
    torch.testing.assert_close(mixed, silent(without))


def test_one_record_never_spoils_anothers_gradient_in_a_network_of_convolutions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 9, 1)
    )
    inputs = torch.randn(4, 1, 5, 5)
    each = PerRecordGradients(net, squared)
    clean = each(get_vector(net), inputs, torch.zeros(4))
    inputs[2] = math.nan
    dirty = each(get_vector(net), inputs, torch.zeros(4))
    keep = torch.tensor([0, 1, 3])
    torch.testing.assert_close(dirty[keep], clean[keep])
    assert not torch.isfinite(dirty[2]).all()


def test_without_noise_and_clip_it_is_the_plain_gradient() -> None:
    model, records = linear(), records_for([1, 3, 2, 9])
    for rate in (1.0, 0.5):
        arguments = {"expected_units": 4 * rate}
        private = private_gradient(
            PerRecordGradients(linear(), squared),
            records,
            a_plan(1e6, noise_multiplier=1e-15, sampling_rate=rate),
            stream=stream("same"),
            **arguments,
        )(get_vector(model))
        plain = plain_gradient(
            model,
            squared,
            records,
            a_plan(sampling_rate=rate),
            stream=stream("same"),
            **arguments,
        )(get_vector(model))
        torch.testing.assert_close(private, plain, rtol=1e-4, atol=1e-5)


def test_plain_gradient_of_nobody_is_zero() -> None:
    model, records = linear(), records_for([1])
    gradient = plain_gradient(
        model, squared, records, a_plan(sampling_rate=1e-9), expected_units=1.0, stream=stream()
    )
    assert gradient(get_vector(model)).tolist() == [0.0] * (SIZE + 1)


def test_the_sum_is_divided_by_a_public_number_only() -> None:
    """Twice the patients, the same public size: the gradient doubles, so no true count is used."""
    once = records_for([1] * 5)
    twice = Records(once.inputs.repeat(2, 1), once.targets.repeat(2), torch.arange(10), 10)
    torch.testing.assert_close(silent(twice), 2 * silent(once))


def test_batch_normalisation_is_refused() -> None:
    """A gradient per patient does not exist where a batch mixes patients."""
    net = nn.Sequential(nn.Linear(SIZE, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    with pytest.raises(Exception, match="BatchNorm"):
        PerRecordGradients(net, squared)


def test_the_oracle_itself_tells_wrong_from_right() -> None:
    """A batch's mean gradient is not anyone's gradient."""
    model, records = linear(), records_for([1] * 4)
    slow = oracle(model, squared, records.inputs, records.targets)
    each = PerRecordGradients(model, lambda a, t: squared(a, t) / 4)
    fast = each(get_vector(model), records.inputs, records.targets)
    assert np.abs((fast - slow).numpy()).max() > 1e-2
