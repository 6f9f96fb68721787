"""Random views of images, and what one step makes of several views of a record."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from common.errors import StudyError
from common.learning.augment import DRAWS, augmented
from common.learning.gradients import (
    GhostNorms,
    PerRecordGradients,
    choose_engine,
    plain_gradient,
    private_gradient,
)
from common.learning.records import Records
from common.randomness import SeededNoise, Stream
from common.stages import AugmentSpec
from common.study import Study, load_study
from common.tensors import get_vector
from simulations.bench.trained import EXAMPLES
from tests.unit.zoo import a_plan, loss

VIEWS = 5
SPEC = AugmentSpec(shift=1.0, rotation_deg=20.0, flip=True)
MIDDLE = 0.5  # a draw that neither turns nor moves


def draws(rows: int, **given: float) -> Tensor:
    """No turn, no move, no mirror, but for what is ``given``: angle, across, down, side."""
    names = ("angle", "across", "down", "side")
    return torch.tensor([[given.get(name, MIDDLE) for name in names]] * rows, dtype=torch.float64)


def pictures(rows: int = 3, height: int = 9, width: int = 9) -> Tensor:
    return torch.rand(rows, 1, height, width, generator=torch.Generator().manual_seed(0))


plan = partial(a_plan, clip_norm=0.3, noise_multiplier=1e-9)


def stream(name: str = "a") -> Stream:
    return SeededNoise(0, "north").stream(name)


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)
    )


def records(owners: list[int], views: int = VIEWS) -> Records:
    rows = len(owners)
    return Records(
        pictures(rows), torch.arange(rows) % 3, torch.tensor(owners), max(owners) + 1, SPEC, views
    )


def test_draws_in_the_middle_change_nothing() -> None:
    images = pictures(height=6, width=10)
    found = augmented(images, draws(3, side=0.9), SPEC)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-5)


def test_half_of_the_views_are_mirrored_where_asked() -> None:
    images = pictures(height=6, width=10)
    found = augmented(images, draws(3, side=0.1), SPEC)
    torch.testing.assert_close(found, images.flip(-1), rtol=0, atol=1e-5)
    plain = augmented(images, draws(3, side=0.1), AugmentSpec(flip=False))
    torch.testing.assert_close(plain, images, rtol=0, atol=1e-5)


def test_the_largest_move_is_by_so_many_pixels() -> None:
    images = pictures(height=6, width=10)
    across = augmented(images, draws(3, across=1.0, side=0.9), AugmentSpec(shift=2.0))
    torch.testing.assert_close(across[..., :-2], images[..., 2:], rtol=0, atol=1e-5)
    edge = images[..., -1:].expand(-1, -1, -1, 2)
    torch.testing.assert_close(across[..., -2:], edge, rtol=0, atol=1e-5)
    down = augmented(images, draws(3, down=0.0, side=0.9), AugmentSpec(shift=2.0))
    torch.testing.assert_close(down[..., 2:, :], images[..., :-2, :], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("draw", "degrees"), [(1.0, 30.0), (0.25, -15.0)])
@pytest.mark.parametrize(("height", "width"), [(15, 15), (12, 20)])
def test_turns_are_those_of_scipy(draw: float, degrees: float, height: int, width: int) -> None:
    images = pictures(1, height, width)
    spec = AugmentSpec(rotation_deg=30.0, shift=0.0)
    found = augmented(images, draws(1, angle=draw, side=0.9), spec)[0, 0].numpy()
    expected = ndimage.rotate(images[0, 0].numpy(), degrees, reshape=False, order=1, mode="nearest")
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_view_depends_on_its_own_record_and_draws_alone() -> None:
    images, uniforms = pictures(4), torch.rand(4, DRAWS, dtype=torch.float64)
    whole = augmented(images, uniforms, SPEC)
    alone = augmented(images[2:3], uniforms[2:3], SPEC)
    torch.testing.assert_close(whole[2:3], alone, rtol=0, atol=1e-6)
    assert augmented(images[:0], uniforms[:0], SPEC).shape == (0, 1, 9, 9)


def test_rows_come_once_for_each_view_and_parts_change_none() -> None:
    seen = records([0, 0, 1, 2])
    rows, owners = seen.rows_of(torch.tensor([2, 0]), 8, stream())
    assert rows.tolist() == [3] * VIEWS + [0] * VIEWS + [1] * VIEWS
    assert owners.tolist() == [0] * VIEWS + [1] * 2 * VIEWS
    whole, one = seen.look(rows, stream("views")), stream("views")
    parts = [seen.look(rows[part], one) for part in (slice(0, 4), slice(4, 11), slice(11, 15))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert len({tuple(view.flatten().tolist()) for view in whole}) == len(whole)  # no two alike


def test_at_most_so_many_records_of_a_patient_whatever_the_views() -> None:
    rows, owners = records([0] * 6 + [1]).rows_of(torch.tensor([0, 1]), 2, stream())
    assert len(set(rows[owners == 0].tolist())) == 2
    assert owners.tolist() == [0] * 2 * VIEWS + [1] * VIEWS


@pytest.mark.parametrize("owners", [[0, 1, 2, 3], [0, 0, 1, 1]])
def test_a_patients_views_are_averaged_before_the_one_clip(owners: list[int]) -> None:
    network, seen = model(), records(owners)
    # By hand: the same draws, autograd's gradient of each view, their mean, one clip.
    own = stream()
    rows, whose = seen.rows_of(plan().sample(own, seen.units), 8, own)
    views, means = seen.look(rows, own), []
    for unit in range(seen.units):
        part = whose == unit
        mean = loss(network(views[part]), seen.targets[rows[part]]).mean()
        gradients = torch.autograd.grad(mean, list(network.parameters()))
        means.append(torch.cat([one.reshape(-1) for one in gradients]))
    norms = torch.stack(means).norm(dim=1)
    middle = float(norms.sort().values[:2].mean())  # some are clipped, some are not
    assert norms.min() < middle < norms.max()
    expected = sum(one * min(1.0, middle / float(one.norm())) for one in means)

    release = private_gradient(
        choose_engine(network, loss, seen),
        seen,
        plan(clip_norm=middle),
        expected_units=1.0,
        stream=stream(),
    )
    torch.testing.assert_close(release(get_vector(network)), expected, rtol=1e-4, atol=1e-6)


def test_no_number_of_views_moves_the_sum_further_than_the_clip_norm() -> None:
    network = model()
    for views in (1, 2, 16):
        seen = records([0, 0, 0], views)
        seen = Records(1e3 * seen.inputs, seen.targets, seen.owners, 1, SPEC, views)
        engine = choose_engine(network, loss, seen)
        release = private_gradient(engine, seen, plan(), expected_units=1.0, stream=stream())
        assert release(get_vector(network)).norm() <= 0.3 + 1e-5


def test_the_engine_follows_the_views() -> None:
    network = model()
    assert isinstance(choose_engine(network, loss, records([0, 1], views=1)), GhostNorms)
    assert isinstance(choose_engine(network, loss, records([0, 1])), PerRecordGradients)


def test_unclipped_the_mean_is_that_of_plain_training() -> None:
    network, seen = model(), records([0, 0, 1, 2])
    wide = plan(clip_norm=1e3, noise_multiplier=1e-12)
    private = private_gradient(
        PerRecordGradients(network, loss), seen, wide, expected_units=3.0, stream=stream()
    )
    plain = plain_gradient(network, loss, seen, wide, expected_units=3.0, stream=stream())
    weights = get_vector(network)
    torch.testing.assert_close(private(weights), plain(weights), rtol=1e-4, atol=1e-6)


def pneumonia(**changes: object) -> Study:
    return load_study(EXAMPLES / "pneumonia.toml").revised(**changes)


def test_views_that_could_not_differ_are_refused() -> None:
    with pytest.raises(StudyError, match=r"views = 4.*add \[finetune.augment\]"):
        pneumonia(finetune__augment=None, finetune__views=4)
    with pytest.raises(StudyError, match="needs trainable = 'all'"):
        pneumonia(finetune__augment={}, finetune__trainable="head")
    with pytest.raises(StudyError, match="belongs to on = 'public'"):
        pneumonia(distill__augment={}, distill__on="patients")
    with pytest.raises(StudyError, match=r"\[distill.augment\] turns and moves images"):
        load_study(EXAMPLES / "wisconsin.toml").revised(distill__augment={})
