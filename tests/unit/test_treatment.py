"""The treatment task: its loss by hand, what it may learn from, and its measures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.dictionary import Dictionary
from common.features import FeatureMap, range_scaling
from common.learning.effect_metrics import (
    doubly_robust,
    effective_share,
    mean_with_interval,
    outside_overlap,
    policy_scores,
)
from common.models import build_student, build_teacher, count_parameters, learner
from common.study import load_study
from common.tasks import task_named
from common.tasks.treatment import Treatment
from simulations.bench.trained import EXAMPLES


def task(name: str = "treatment", *, truth: bool = True) -> Treatment:
    label: dict[str, Any] = {
        "kind": "effect",
        "name": "y",
        "range": [-100, 100],
        "typical": [10, 2],
        "treatment": "z",
    } | ({"truth": ["mu0", "mu1"]} if truth else {})
    column = {"name": "age", "kind": "numeric", "range": [0, 100]}
    found = task_named(
        name, Dictionary.model_validate_json(json.dumps({"columns": [column], "label": label}))
    )
    assert isinstance(found, Treatment)
    return found


LABELS = np.array([[1, 14, 10, 13], [0, 8, 8, 9]], np.float32)


def test_loss_is_of_the_outcome_that_was_seen_and_of_the_treatment() -> None:
    answers = torch.tensor([[0.5, 1.0, 0.0], [0.5, 1.0, 0.0]])
    arms = task().loss(answers, task().targets(LABELS)).numpy()
    # Scaled outcomes are 2 and −1; a logit of 0 costs log 2.
    assert arms == pytest.approx([(1 - 2) ** 2 + np.log(2), (0.5 + 1) ** 2 + np.log(2)])
    effect = task("treatment-effect").loss(answers, task().targets(LABELS)).numpy()
    assert effect == pytest.approx([(1.5 - 2) ** 2 + np.log(2), (0.5 + 1) ** 2 + np.log(2)])


def test_only_the_patients_own_arm_is_learned_from() -> None:
    answers = torch.zeros(2, 3, requires_grad=True)
    task().loss(answers, task().targets(LABELS)).sum().backward()
    assert answers.grad is not None
    assert answers.grad[0, 0] == 0 and answers.grad[1, 1] == 0
    assert answers.grad[0, 1] != 0 and answers.grad[1, 0] != 0


def test_nothing_is_learned_from_the_truth() -> None:
    other = LABELS.copy()
    other[:, 2:] = 99
    assert torch.equal(task().targets(LABELS), task().targets(other))


def test_predictions_are_in_the_labels_unit() -> None:
    answers = torch.tensor([[0.5, 1.0, 0.0]])
    assert task().predictions(answers, answers)[0].tolist() == [11.0, 12.0, 0.5]
    assert task("treatment-effect").predictions(answers, answers)[0].tolist() == [11.0, 13.0, 0.5]


@pytest.mark.parametrize("name", ["treatment", "treatment-effect", "treatment-targeted"])
def test_a_student_that_answers_alike_has_nothing_to_learn(name: str) -> None:
    taught = torch.randn(4, 3)
    answers = taught.clone().requires_grad_()
    task(name).distill_loss(answers, taught, 2.0).sum().backward()
    assert answers.grad is not None and answers.grad.abs().max() < 1e-6


def clever(treated: Tensor, chance: Tensor) -> Tensor:
    """h of Shi et al. (2019, section 3), as they write it."""
    return treated / chance - (1 - treated) / (1 - chance)


def test_targeted_loss_by_hand() -> None:
    answers = torch.tensor([[0.5, 1.0, 0.0, 0.4], [0.5, 1.0, 0.0, 0.4]])
    found = task("treatment-targeted").loss(answers, task().targets(LABELS)).numpy()
    # ε = 0.2 and h = ±2: perturbed outcomes are 1.4 and 0.1, where 2 and −1 were seen.
    arms = task().loss(answers[:, :3], task().targets(LABELS)).numpy()
    assert found - arms == pytest.approx([0.6**2, 1.1**2], rel=1e-5)


def test_targeted_gradient_is_that_of_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(50, 4, generator=generator, dtype=torch.float64).requires_grad_()
    treated = (torch.rand(50, generator=generator) < 0.5).double()
    outcome = torch.randn(50, generator=generator, dtype=torch.float64)
    found = task("treatment-targeted").loss(answers, torch.stack([treated, outcome], dim=1))

    mu0, mu1, logit, epsilon = answers.T
    chance = 1 / (1 + torch.exp(-logit))
    guess = treated * mu1 + (1 - treated) * mu0
    perturbed = guess + epsilon / 2 * clever(treated, chance)
    entropy = -(treated * torch.log(chance) + (1 - treated) * torch.log(1 - chance))
    wanted = (guess - outcome) ** 2 + entropy + (perturbed - outcome) ** 2
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), answers)[0], torch.autograd.grad(wanted.sum(), answers)[0]
    )


def test_best_perturbation_is_the_least_squares_one() -> None:
    """The fluctuation of targeted learning (van der Laan & Rubin 2006): the residuals regressed on
    h. Where it is, Σ h (y − Q̃) = 0, which is what makes the mean effect doubly robust."""
    x, chance, treated, outcome = (torch.from_numpy(one) for one in confounded(2000))
    chance = chance.clamp(0.01, 0.99)
    h = clever(treated, chance)
    epsilon = (h @ outcome / (h @ h)).expand(len(x)).clone()  # of outcomes foreseen as 0
    shared = (2 * epsilon[:1]).requires_grad_()
    nothing = torch.zeros_like(x)
    answers = torch.stack([nothing, nothing, torch.logit(chance), shared.expand(len(x))], dim=1)
    targets = torch.stack([treated, outcome], dim=1)
    task("treatment-targeted").loss(answers, targets).sum().backward()
    assert shared.grad is not None and abs(float(shared.grad)) < 1e-6 * len(x)


def test_the_answer_is_the_perturbed_outcome() -> None:
    answers = torch.tensor([[0.5, 1.0, np.log(4), 0.4]])  # treated four times out of five
    mu0, mu1, chance = task("treatment-targeted").predictions(answers, answers)[0].tolist()
    assert chance == pytest.approx(0.8)
    assert mu0 == pytest.approx(10 + 2 * (0.5 - 0.2 / 0.2))
    assert mu1 == pytest.approx(10 + 2 * (1.0 + 0.2 / 0.8))


def test_a_certain_treatment_asks_no_more_than_is_bounded() -> None:
    logits = torch.tensor([-1e4, -100.0, -6.0, 6.0, 100.0, 1e4])
    answers = torch.stack([0 * logits, 0 * logits, logits, 1 + 0 * logits], dim=1).requires_grad_()
    for treated in (0.0, 1.0):
        targets = torch.stack([torch.full_like(logits, treated), 0 * logits], dim=1)
        loss = task("treatment-targeted").loss(answers, targets)
        (asked,) = torch.autograd.grad(loss.sum(), answers)
        assert torch.isfinite(loss).all() and torch.isfinite(asked).all()
        assert asked[:, 3].abs().max() <= 2 * (0.5 * 100) ** 2 * 1.001


def test_epsilon_is_one_number_of_the_teacher_alone() -> None:
    study = load_study(EXAMPLES / "ihdp.toml").revised(task="treatment-targeted")
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    teacher, student = build_teacher(study, features), build_student(study, features)
    with torch.no_grad():
        for one in learner(study, teacher).parameters():
            one.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(5, features.width, generator=torch.Generator().manual_seed(1))
    answers = teacher(inputs)
    assert answers.shape == (5, 4) and student(inputs).shape == (5, 3)
    assert answers[:, 3].unique().numel() == 1 and answers[:, 2].unique().numel() == 5
    alone = load_study(EXAMPLES / "ihdp.toml")
    assert count_parameters(teacher) == count_parameters(build_teacher(alone, features)) + 1


def test_the_student_learns_the_perturbed_outcomes() -> None:
    taught = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    one = task("treatment-targeted")
    said = (one.predictions(taught, taught)[:, :2] - 10) / 2
    answers = torch.cat([said, taught[:, 2:3]], dim=1).requires_grad_()
    one.distill_loss(answers, taught, 2.0).sum().backward()
    assert answers.grad is not None and answers.grad.abs().max() < 1e-5
    torch.testing.assert_close(one.predictions(answers, answers), one.predictions(taught, taught))


def test_figures_by_hand() -> None:
    predictions = np.array([[10.0, 12.0, 0.5], [8.0, 12.0, 0.5]])
    found = task().figures(LABELS, predictions)
    assert found["sqrt_pehe"] == pytest.approx(np.sqrt(((2 - 3) ** 2 + (4 - 1) ** 2) / 2))
    assert found["ate_error"] == pytest.approx(1.0)
    assert found["factual_rmse"] == pytest.approx(np.sqrt(2.0))
    assert found["propensity_loss"] == pytest.approx(np.log(2))
    assert set(found) == {one.key for one in task().measures}


def test_without_the_truth_only_what_was_seen_is_measured() -> None:
    one = task(truth=False)
    found = one.figures(LABELS, np.array([[10.0, 12.0, 0.5], [8.0, 12.0, 0.5]]))
    assert [each.key for each in one.measures] == list(found) == ["factual_rmse", "propensity_loss"]


def confounded(rows: int) -> tuple[np.ndarray, ...]:
    """The sicker are treated more often and fare worse; the treatment adds 1 for everybody."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=rows)
    chance = 1 / (1 + np.exp(-x))
    treated = (rng.uniform(size=rows) < chance).astype(float)
    return x, chance, treated, treated - 2 * x + rng.normal(size=rows)


@pytest.mark.parametrize("wrong", ["outcomes", "propensity"])
def test_doubly_robust_scores_forgive_one_wrong_model(wrong: str) -> None:
    x, chance, treated, outcome = confounded(40_000)
    mu0, mu1 = (0 * x, 0 * x) if wrong == "outcomes" else (-2 * x, 1 - 2 * x)
    propensity = chance if wrong == "outcomes" else np.full_like(x, 0.5)
    without, with_it = doubly_robust(treated, outcome, mu0, mu1, propensity)
    mean, low, high = mean_with_interval(with_it - without)
    # Within twice the interval: a single draw misses the interval itself one time in twenty.
    assert low < mean < high and abs(mean - 1) < high - low < 0.2
    naive = outcome[treated > 0].mean() - outcome[treated == 0].mean()
    assert naive < 0  # what a plain comparison would have said


def test_policy_takes_each_patients_own_score() -> None:
    policy = np.array([True, False])
    assert policy_scores(policy, np.array([1.0, 2]), np.array([3.0, 4])).tolist() == [3, 2]


def test_overlap() -> None:
    assert outside_overlap(np.array([0.05, 0.5, 0.95, 0.5])) == 0.5
    treated = np.array([1.0, 1, 0, 0])
    assert effective_share(treated, np.full(4, 0.5)) == pytest.approx(1.0)
    assert effective_share(treated, np.array([0.9, 0.02, 0.5, 0.5])) < 0.6
    assert np.isnan(effective_share(np.ones(3), np.full(3, 0.5)))
