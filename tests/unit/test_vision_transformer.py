"""The vision transformer: what it sees, and that it can be trained privately."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import StudyError
from common.features import FeatureMap, range_scaling
from common.learning.pretrain import mask_for
from common.models import build_student, build_teacher
from common.models.checks import check_private, check_records_apart
from common.models.vision import VisionTransformer, patches, place_codes
from common.study import Study, load_study
from common.tensors import get_vector
from simulations.bench.trained import EXAMPLES


def vit(shape: tuple[int, int] = (8, 8), patch: int = 4) -> VisionTransformer:
    return VisionTransformer(shape, patch=patch, width=8, depth=1, heads=2)


def study(**changes: object) -> Study:
    kind = {"kind": "vit", "patch": 7, "width": 16, "depth": 1, "heads": 2}
    return load_study(EXAMPLES / "pneumonia.toml").revised(teacher=kind, student=kind, **changes)


def test_patches_are_squares_row_by_row() -> None:
    image = torch.arange(6 * 4.0).view(1, 1, 6, 4)
    found = patches(image, 2)
    assert found.shape == (1, 6, 4)
    for number in range(6):
        row, column = 2 * (number // 2), 2 * (number % 2)
        assert torch.equal(
            found[0, number], image[0, 0, row : row + 2, column : column + 2].flatten()
        )


def test_an_image_is_filled_up_to_whole_patches() -> None:
    found = patches(torch.ones(2, 1, 5, 7), 4)
    assert found.shape == (2, 4, 16)
    assert found.sum(dim=(1, 2)).tolist() == [35.0, 35.0]
    assert vit((5, 7))(torch.ones(2, 1, 5, 7)).shape == (2, 8)


def test_places_are_told_by_sines_and_cosines() -> None:
    """Vaswani et al. 2017, section 3.5: sin(p / 10000^(2i/d)), cos of the same, d per axis."""
    codes = place_codes(3, 5, 8)
    assert codes.shape == (15, 8)
    expected = [f(2 / 10_000 ** (2 * i / 4)) for i in range(2) for f in (math.sin, math.cos)]
    expected += [f(3 / 10_000 ** (2 * i / 4)) for i in range(2) for f in (math.sin, math.cos)]
    assert codes[2 * 5 + 3].tolist() == pytest.approx(expected, rel=1e-5)
    assert len({tuple(one) for one in codes.tolist()}) == 15


def test_where_a_patch_lies_matters() -> None:
    model, image = vit(), torch.zeros(1, 1, 8, 8)
    moved = image.clone()
    image[..., :4, :4] = torch.rand(4, 4)
    moved[..., 4:, :4] = image[..., :4, :4]
    assert not torch.allclose(model(image), model(moved), atol=1e-4)


def test_teacher_and_student_can_be_trained_privately() -> None:
    made = study(finetune__trainable="all")
    features = FeatureMap(made.dictionary, range_scaling(made.dictionary))
    for model in (build_teacher(made, features), build_student(made, features)):
        check_private(model)
        check_records_apart(model, torch.zeros(1, 1, 28, 28))
        assert model(torch.zeros(2, 1, 28, 28)).shape[0] == 2
    again = build_teacher(made, features)
    assert torch.equal(get_vector(again), get_vector(build_teacher(made, features)))
    assert not any("places" in name for name in again.state_dict())  # nothing to send or to keep


def test_patches_are_hidden_whole() -> None:
    made = study()
    features = FeatureMap(made.dictionary, range_scaling(made.dictionary))
    generator = torch.Generator().manual_seed(0)
    mask = mask_for(features, torch.zeros(5, 1, 28, 28), 0.5, generator, patch=7)
    hidden = patches(mask.float(), 7).mean(dim=2)
    assert set(hidden.flatten().tolist()) == {0.0, 1.0}


def test_heads_must_share_the_width() -> None:
    with pytest.raises(StudyError, match="heads: expected a divisor of width 16, found 3"):
        study().revised(teacher__heads=3)
