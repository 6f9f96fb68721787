"""The mechanisms' laws: each test accepts the right law and, run on a wrong one, rejects it.

Seeds are fixed, so every outcome is repeatable. Significance is 1e-4 for what must pass; what must
fail does so by far.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from client import rounds, training
from client.guard import MemoryGuard
from client.hospital import Hospital
from common.features import FeatureMap, range_scaling, scaling_tensor
from common.privacy.budget import budget_of
from common.privacy.mechanisms import add_gaussian, clip_sum, poisson_sample
from common.randomness import SecretNoise, SeededNoise, Stream
from common.study import Study
from common.wire import EvaluateTask, StatisticsTask, TrainTask

Floats = NDArray[np.float64]
MakeHospital = Callable[..., Hospital]
ALPHA = 1e-4
DRAWS = 200_000
KEY = bytes(range(32))


def draws(*context: bytes | str | int, count: int = DRAWS) -> Floats:
    return SecretNoise(KEY).stream(*context).normal(count)


def variance_fits(sample: Floats, std: float) -> bool:
    """Σx²/σ² follows χ² with n degrees of freedom, if the noise has standard deviation σ."""
    statistic = float((sample**2).sum()) / std**2
    return 2 * min(
        stats.chi2.cdf(statistic, len(sample)), stats.chi2.sf(statistic, len(sample))
    ) > (ALPHA)


def independent(first: Floats, second: Floats) -> bool:
    """No linear or rank correlation, also between the squares."""
    return all(
        test(one, other).pvalue > ALPHA
        for test in (stats.pearsonr, stats.spearmanr)
        for one, other in ((first, second), (first**2, second**2))
    )


@pytest.mark.parametrize("std", [0.01, 1.0, 250.0])
def test_gaussian_noise_has_the_right_scale_and_no_other(std: float) -> None:
    stream = SecretNoise(KEY).stream("scale")
    noise = add_gaussian(torch.zeros(DRAWS), stream, std).double().numpy()
    assert variance_fits(noise, std)
    assert not variance_fits(noise, 0.9 * std)
    assert not variance_fits(noise, 1.1 * std)


def test_noise_of_the_wrong_scale_is_rejected() -> None:
    for wrong in (0.9, 1.1):
        noise = add_gaussian(torch.zeros(DRAWS), SecretNoise(KEY).stream("scale"), wrong)
        assert not variance_fits(noise.double().numpy(), 1.0)


def test_the_noise_is_normal() -> None:
    sample = draws("normality")
    assert stats.kstest(sample, "norm").pvalue > ALPHA
    # The tails by themselves: how many lie beyond 3.5 standard deviations.
    beyond = int((np.abs(sample) > 3.5).sum())
    assert stats.binomtest(beyond, DRAWS, 2 * stats.norm.sf(3.5)).pvalue > ALPHA
    for wrong in (stats.t(20).ppf(stats.norm.cdf(sample)), np.clip(sample, -2.5, 2.5)):
        assert stats.kstest(wrong, "norm").pvalue < ALPHA


def test_odd_counts_lose_nothing_and_halves_of_a_pair_are_independent() -> None:
    assert len(draws("odd", count=7)) == 7
    sample = draws("halves")
    assert independent(sample[: DRAWS // 2], sample[DRAWS // 2 :])
    assert independent(sample[:-1], sample[1:])
    assert not independent(sample[:-1], sample[:-1] + 10 * sample[1:])


def test_streams_of_other_contexts_are_independent() -> None:
    contexts: list[tuple[str | int, ...]] = [
        ("north", "finetune", 0, 0),
        ("south", "finetune", 0, 0),
        ("north", "distill", 0, 0),
        ("north", "finetune", 1, 0),
        ("north", "finetune", 0, 1),
    ]
    samples = [draws(*context, count=50_000) for context in contexts]
    for first, second in itertools.combinations(samples, 2):
        assert independent(first, second)
    assert not independent(samples[0], draws(*contexts[0], count=50_000))


def test_one_seed_gives_two_hospitals_other_noise() -> None:
    first, second = (SeededNoise(3, name).stream("r").normal(50_000) for name in ("north", "south"))
    assert independent(first, second)


def rate_fits(count: int, trials: int, rate: float) -> bool:
    return stats.binomtest(count, trials, rate).pvalue > ALPHA


@pytest.mark.parametrize("rate", [0.0256, 0.3, 0.9])
def test_poisson_samples_have_the_exact_rate(rate: float) -> None:
    stream = SecretNoise(KEY).stream("rate")
    units, rounds_ = 1000, 200
    sizes = [len(poisson_sample(stream, units, rate)) for _ in range(rounds_)]
    assert rate_fits(sum(sizes), units * rounds_, rate)
    assert not rate_fits(sum(sizes), units * rounds_, 0.9 * rate)
    assert not rate_fits(sum(sizes), units * rounds_, min(1.0, 1.1 * rate))
    # Sizes vary as a binomial's do; batches of fixed size (another guarantee) would not.
    spread = float(np.var(sizes, ddof=1)) / (units * rate * (1 - rate)) * (rounds_ - 1)
    assert ALPHA < stats.chi2.cdf(spread, rounds_ - 1) < 1 - ALPHA


def test_each_unit_is_drawn_alike_and_independently() -> None:
    stream = SecretNoise(KEY).stream("units")
    drawn = np.zeros((5000, 20))
    for row in drawn:
        row[poisson_sample(stream, 20, 0.25).numpy()] = 1
    for column in drawn.T:
        assert rate_fits(int(column.sum()), 5000, 0.25)
    for first, second in itertools.combinations(range(5), 2):
        together = int((drawn[:, first] * drawn[:, second]).sum())
        assert rate_fits(together, 5000, 0.0625)


def test_the_whole_cohort_needs_no_draw() -> None:
    assert poisson_sample(SecretNoise(KEY).stream("all"), 4, 1.0).tolist() == [0, 1, 2, 3]
    assert poisson_sample(SecretNoise(KEY).stream("all"), 0, 0.5).tolist() == []


# Sensitivity

_ANY = st.one_of(
    st.floats(width=32),  # also infinite, NaN and subnormal
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -1e-39, 0.0, 1e19]),
)
_ROWS = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(_ANY, min_size=width, max_size=width), min_size=1, max_size=6)
)
# Rounding of a float32 sum of six clipped rows, relative to the clip norm.
_ROUNDING = 1 + 1e-5


@settings(max_examples=300)
@given(rows=_ROWS, clip=st.sampled_from([0.01, 1.0, 37.5]))
@example(rows=[[3.4027798592046407e38]], clip=0.01)  # its factor is subnormal
def test_one_unit_moves_the_sum_by_at_most_the_clip_norm(
    rows: list[list[float]], clip: float
) -> None:
    everyone = torch.tensor(rows, dtype=torch.float32)
    whole = clip_sum(everyone, clip)
    assert torch.isfinite(whole).all()
    for one in range(len(rows)):
        without = clip_sum(torch.cat([everyone[:one], everyone[one + 1 :]]), clip)
        assert float((whole - without).norm()) <= clip * _ROUNDING
        for other in (torch.full_like(everyone[one], 3e38), -everyone[one]):
            replaced = everyone.clone()
            replaced[one] = other
            assert float((whole - clip_sum(replaced, clip)).norm()) <= 2 * clip * _ROUNDING


def test_the_sensitivity_bound_is_reached_so_the_test_can_tell() -> None:
    rows = torch.tensor([[300.0, 400.0], [0.3, 0.4]])
    assert float(clip_sum(rows[:1], 2.0).norm()) == pytest.approx(2.0)
    assert clip_sum(rows[1:], 2.0).tolist() == pytest.approx([0.3, 0.4])  # short ones stay
    opposite = clip_sum(torch.tensor([[5.0]]), 2.0) - clip_sum(torch.tensor([[-5.0]]), 2.0)
    assert opposite.tolist() == [4.0]
    assert clip_sum(torch.zeros(0, 3), 1.0).tolist() == [0.0, 0.0, 0.0]


def test_noise_is_added_to_a_sum_of_any_size() -> None:
    total = torch.tensor([1e6, -1e6, 0.0])
    noised = add_gaussian(total, SecretNoise(KEY).stream("a"), 3.0)
    drawn = SecretNoise(KEY).stream("a").normal(3)
    torch.testing.assert_close(
        noised, torch.from_numpy(total.double().numpy() + 3.0 * drawn).float()
    )
    assert total.tolist() == [1e6, -1e6, 0.0]  # the argument stays as it was


# Keys and contexts

_PART = st.one_of(
    st.binary(max_size=6), st.text(max_size=6), st.integers(-300, 300), st.sampled_from(["1", b"1"])
)
_CONTEXT = st.lists(_PART, min_size=1, max_size=4).map(tuple)


def first_words(stream: Stream) -> bytes:
    return stream.uniform(4).tobytes()


@settings(max_examples=300)
@given(first=_CONTEXT, second=_CONTEXT)
def test_contexts_never_collide(
    first: tuple[bytes | str | int, ...], second: tuple[bytes | str | int, ...]
) -> None:
    source = SecretNoise(KEY)
    alike = first_words(source.stream(*first)) == first_words(source.stream(*second))
    typed = [tuple((type(part), part) for part in one) for one in (first, second)]
    assert alike == (typed[0] == typed[1])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", ""), ("a",)),
        (("1",), (1,)),
        (("1",), (b"1",)),
        ((1, 23), (12, 3)),
        (("s" + "\0" * 8,), ("s", "")),
    ],
)
def test_contexts_that_look_alike_are_apart(
    first: tuple[bytes | str | int, ...], second: tuple[bytes | str | int, ...]
) -> None:
    source = SecretNoise(KEY)
    assert first_words(source.stream(*first)) != first_words(source.stream(*second))


def test_a_stream_without_context_or_of_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a context"):
        SecretNoise(KEY).stream()
    with pytest.raises(ValueError, match="32 bytes, found 31"):
        Stream(KEY[:31])


def test_keys_are_new_and_never_shown() -> None:
    first, second = SecretNoise.generate(), SecretNoise.generate()
    assert first.key != second.key
    for shown in (repr(first), str(first), f"{first}", repr([first])):
        assert first.key.hex() not in shown
        assert repr(first.key) not in shown
    assert first.is_secret
    assert not SeededNoise(0, "north").is_secret


# A hospital's releases


def _train(study: Study, **changes: object) -> TrainTask:
    features = FeatureMap(study.dictionary, range_scaling(study.dictionary))
    arguments: dict[str, object] = {
        "study_digest": study.digest(),
        "stage": "finetune",
        "round": 0,
        "attempt": 0,
        "teacher": dict(training.build_teacher(study, features).state_dict()),
        "student": dict(training.build_student(study, features).state_dict()),
        "scaling": scaling_tensor(study.dictionary, range_scaling(study.dictionary)),
    }
    return TrainTask(**(arguments | changes))  # type: ignore[arg-type]


def noise_of(hospital: Hospital, task: TrainTask) -> Tensor:
    """A released update: a gradient that these tests hold alike, and the noise.

    Each request meets a gate with nothing spent: how much may be asked is tests/unit/test_guard.py.
    """
    fresh = replace(hospital, guard=MemoryGuard(hospital.guard.noise))
    return rounds.train(fresh, task).update


def test_the_same_request_gives_the_same_bytes(small: Study, make_hospital: MakeHospital) -> None:
    first, second = make_hospital(small), make_hospital(small)
    assert torch.equal(noise_of(first, _train(small)), noise_of(second, _train(small)))


def test_any_changed_part_of_a_request_gives_other_noise(
    small: Study, make_hospital: MakeHospital
) -> None:
    """Two answers to different questions must never share noise: their difference would show."""
    hospital, task = _with_key(make_hospital(small), KEY), _train(small)
    nudged = {name: tensor + 1e-6 for name, tensor in task.teacher.items()}
    pupils = {name: tensor + 1e-6 for name, tensor in task.student.items()}
    corrected = make_hospital(small).train
    corrected.values["a"][0] += 1e-9
    others = {
        "round": (hospital, _train(small, round=1)),
        "attempt": (hospital, _train(small, attempt=1)),
        "teacher": (hospital, _train(small, teacher=nudged)),
        "student": (hospital, _train(small, student=pupils)),
        "scaling": (hospital, _train(small, scaling=task.scaling * (1 + 1e-6))),
        "cohort": (replace(hospital, train=corrected), task),
        "key": (_with_key(hospital, bytes(32)), task),
    }
    reference = noise_of(hospital, task)
    # None of these changes moves the gradient by as much as a tenth of the noise.
    std = 0.5 * budget_of(small).noise_multiplier / hospital.declared_patients
    for part, (asked, other) in others.items():
        difference = noise_of(asked, other) - reference
        assert float(difference.std()) > 0.5 * std, part


def _with_key(hospital: Hospital, key: bytes) -> Hospital:
    return replace(hospital, guard=MemoryGuard(SecretNoise(key)))


def test_test_noise_follows_from_seed_hospital_and_place_in_the_study_alone(
    small: Study, make_hospital: MakeHospital
) -> None:
    """So runs that differ in rounding draw alike; it protects nobody, and no statement says so."""
    hospital, task = make_hospital(small), _train(small)
    corrected = make_hospital(small).train
    corrected.values["a"][0] += 1e-9
    reference = noise_of(hospital, task)
    rounded = {name: tensor + 1e-9 for name, tensor in task.teacher.items()}
    std = 0.5 * budget_of(small).noise_multiplier / hospital.declared_patients
    for asked, other in (
        (replace(hospital, train=corrected), task),
        (hospital, _train(small, teacher=rounded)),
    ):
        assert float((noise_of(asked, other) - reference).std()) < 1e-3 * std
    for other, asked in (
        (make_hospital(small, "south"), task),
        (make_hospital(small, noise_seed=8), task),
        (hospital, _train(small, round=1)),
        (hospital, _train(small, attempt=1)),
    ):
        assert float((noise_of(other, asked) - reference).std()) > 0.5 * std


def test_other_statistics_and_scores_get_other_noise(
    small: Study, make_hospital: MakeHospital
) -> None:
    study = small.revised(scaling="private", evaluation__epsilon=1.0)
    hospital = _with_key(make_hospital(study), KEY)
    digest, task = study.digest(), _train(study)

    def fresh() -> Hospital:
        return replace(hospital, guard=MemoryGuard(hospital.guard.noise))

    asked = [
        rounds.statistics(fresh(), StatisticsTask(study_digest=digest, attempt=attempt)).sums
        for attempt in (0, 0, 1)
    ]
    assert torch.equal(asked[0], asked[1])
    assert float((asked[0] - asked[2]).std()) > 1

    def histogram(scaling: Tensor, student: dict[str, Tensor]) -> Tensor:
        request = EvaluateTask(study_digest=digest, student=student, scaling=scaling)
        return rounds.evaluate(fresh(), request).histogram

    first = histogram(task.scaling, task.student)
    assert torch.equal(first, histogram(task.scaling, task.student))
    # A hair's change keeps every score in its bin: only the noise can differ.
    for other in (
        histogram(task.scaling * (1 + 1e-6), task.student),
        histogram(task.scaling, {name: one * (1 + 1e-6) for name, one in task.student.items()}),
    ):
        assert float((first - other).std()) > 1


def test_a_training_release_carries_the_promised_noise(
    small: Study, make_hospital: MakeHospital
) -> None:
    """Through the whole of ``train``: the update is −learning rate · N(0, (σ C / n)²)."""
    # So many numbers that a tenth more or less is 17 standard errors away: no draw hides it.
    study = small.revised(privacy__clip_norm=1e-9, teacher__hidden=[4, 20000], privacy__epsilon=0.5)
    hospital, task = make_hospital(study), _train(study)
    noise = noise_of(hospital, task).double().numpy()
    std = 0.5 * budget_of(study).noise_multiplier * 1e-9 / hospital.declared_patients
    assert variance_fits(noise, std)
    assert not variance_fits(noise, 0.9 * std)
    assert not variance_fits(noise, 1.1 * std)
