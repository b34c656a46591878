"""`Distribution`: 32 points against closed formulas and against samples."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from qconvert.signals.distribution import POINTS, UNKNOWN, Distribution, mixture

SAMPLES = 200_000


def density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def below(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2


def rectified(mean: float, std: float) -> tuple[float, float]:
    """Return mean and standard deviation of a rectified normal value: the closed formulas."""
    z = mean / std
    first = mean * below(z) + std * density(z)
    second = (mean**2 + std**2) * below(z) + mean * std * density(z)
    return first, math.sqrt(second - first**2)


def relu(x: Distribution) -> Distribution:
    return x.map(torch.relu, nonnegative=True)


def constant(*values: float) -> Distribution:
    return Distribution.normal(torch.tensor(values), torch.zeros(len(values)))


def test_a_normal_distribution_has_its_mean_and_standard_deviation():
    mean, std = torch.tensor([-3.0, 0.0, 5.0]), torch.tensor([0.5, 1.0, 20.0])
    x = Distribution.normal(mean, std)
    assert x.channels == 3
    assert x.points.shape == (3, POINTS)
    assert_close(x.mean, mean, rtol=0, atol=1e-5)
    assert_close(x.std, std, rtol=1e-5, atol=0)


def test_points_are_the_quantiles_of_samples():
    places = (torch.arange(POINTS) + 0.5) / POINTS
    sampled = torch.quantile(torch.randn(SAMPLES), places)
    # the outermost points stand further out: they make up for the tails that are cut
    assert_close(Distribution.normal().points[0, 1:-1], sampled[1:-1], rtol=0, atol=0.06)


@pytest.mark.parametrize("z", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])  # further down, hardly a point of the 32 is above 0
@pytest.mark.parametrize("std", [0.1, 1.0, 7.0])
def test_a_rectified_normal_value_has_the_moments_of_the_closed_formula(z: float, std: float):
    mean, spread = rectified(z * std, std)
    x = relu(Distribution.normal(z * std, std))
    assert x.mean.item() == pytest.approx(mean, abs=0.01 * std)
    assert x.std.item() == pytest.approx(spread, abs=0.05 * std)


def test_the_closed_formula_is_that_of_samples():
    sampled = torch.relu(0.5 + 2 * torch.randn(SAMPLES, dtype=torch.float64))
    assert rectified(0.5, 2.0) == pytest.approx((sampled.mean().item(), sampled.std().item()), rel=0.01)


class TestSplit:
    """Where a threshold starts."""

    @pytest.mark.parametrize("mean", [-4.0, 0.0, 4.0])
    def test_of_a_normal_value_is_its_median(self, mean: float):
        assert Distribution.normal(mean, 3.0).split.item() == pytest.approx(mean, abs=1e-5)

    @pytest.mark.parametrize("z", [-1.5, -1.0, -0.5, 0.0, 0.2, 1.0, 2.0])
    def test_of_a_rectified_normal_value_is_above_0_and_below_most_others(self, z: float):
        split = relu(Distribution.normal(z, 1.0)).split.item()
        values = torch.relu(z + torch.randn(SAMPLES))
        positive, above = (values > 0).float().mean().item(), (values >= split).float().mean().item()
        assert split > 0
        assert above <= 0.55
        # at least 0.8 of what is off the zero, where that is less than a half
        assert above >= min(0.45, 0.8 * positive)

    def test_of_a_value_that_is_never_above_0_is_still_above_it(self):
        # one channel is dead, and another tells how far values are apart
        dead = relu(Distribution.normal(torch.tensor([-9.0, 0.0]), torch.ones(2)))
        assert dead.std[0] == 0
        assert (dead.split > 0).all()

    @pytest.mark.parametrize("mean", [-1.5, -0.5, 0.0])
    def test_of_a_guess_is_above_0_where_a_relu_would_leave_nothing_below_it(self, mean: float):
        guess = replace(Distribution.normal(mean, 1.0), known=False)
        assert 0 < guess.split.item() < 0.02
        assert (relu(guess).points >= guess.split[:, None]).any()

    def test_of_a_guess_is_its_median_elsewhere(self):
        guess = replace(Distribution.normal(torch.tensor([0.5, 4.0, -4.0]), torch.ones(3)), known=False)
        assert guess.split.tolist() == pytest.approx([0.5, 4.0, -4.0], abs=1e-5)

    def test_of_a_guess_a_few_values_far_off_do_not_move_it(self):
        near, far = Distribution.normal(0.0, 0.01), Distribution.normal(0.0, 10.0)
        assert replace(mixture([near, far], (7, 1)), known=False).split.item() < 0.001

    def test_of_a_constant_is_above_it(self):
        assert constant(0.0).split.item() == pytest.approx(0.1)
        assert constant(5.0).split.item() == pytest.approx(5.1)


class TestSpread:
    """The unit of the gradient window: never 0."""

    def test_is_the_standard_deviation(self):
        assert_close(Distribution.normal(torch.zeros(2), torch.tensor([2.0, 3.0])).spread, torch.tensor([2.0, 3.0]))

    def test_of_a_constant_channel_is_the_mean_of_the_others(self):
        x = Distribution.normal(torch.zeros(3), torch.tensor([2.0, 0.0, 4.0]))
        assert_close(x.spread, torch.tensor([2.0, 3.0, 4.0]))

    def test_of_constants_alone_is_1(self):
        assert constant(3.0, 4.0).spread.tolist() == [1.0, 1.0]


class TestSymmetry:
    """What needs no threshold."""

    @pytest.mark.parametrize(("mean", "symmetric"), [(0.0, True), (0.05, True), (-0.05, True), (0.3, False), (-0.3, False)])
    def test_is_as_many_values_below_0_as_above(self, mean: float, symmetric: bool):
        assert Distribution.normal(mean, 1.0).is_symmetric is symmetric

    def test_of_one_channel_among_others_is_not_enough(self):
        assert not Distribution.normal(torch.tensor([0.0, 1.0]), torch.ones(2)).is_symmetric

    def test_is_never_that_of_an_unknown_value(self):
        assert not UNKNOWN.is_symmetric

    def test_is_never_that_of_a_value_that_is_not_negative(self):
        assert not relu(Distribution.normal(0.0, 1.0)).is_symmetric

    def test_counts_zeros_on_neither_side(self):
        assert Distribution.normal().map(lambda points: points.round(), nonnegative=False).is_symmetric


class TestChannels:
    """How many are told apart."""

    def test_pooled_has_the_moments_over_all_of_them(self):
        mean, std = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5])
        values = mean + std * torch.randn(SAMPLES, 3)
        pooled = Distribution.normal(mean, std).pooled()
        assert pooled.channels == 1
        assert pooled.mean.item() == pytest.approx(values.mean().item(), abs=0.03)
        assert pooled.std.item() == pytest.approx(values.std().item(), abs=0.05)

    def test_wide_repeats_what_is_not_told_apart(self):
        wide = Distribution.normal(1.0, 2.0).wide(5)
        assert wide.mean.tolist() == pytest.approx([1.0] * 5)

    def test_wide_of_another_number_gives_each_channel_all_values(self):
        wide = Distribution.normal(torch.tensor([0.0, 4.0]), torch.ones(2)).wide(3)
        assert wide.channels == 3
        assert wide.mean.tolist() == pytest.approx([2.0] * 3, abs=0.1)

    def test_wide_of_the_same_number_is_itself(self):
        x = Distribution.normal(torch.zeros(3), torch.ones(3))
        assert x.wide(3) is x

    @pytest.mark.parametrize(("left", "right", "expected"), [(1, 4, 4), (4, 1, 4), (4, 4, 4), (1, 1, 1), (2, 4, 1)])
    def test_aligned_have_the_same_number(self, left: int, right: int, expected: int):
        both = (Distribution.normal(torch.zeros(n), torch.ones(n)) for n in (left, right))
        assert [x.channels for x in next(both).aligned(next(both))] == [expected] * 2


class TestCombine:
    """Functions of two independent values."""

    @pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul, torch.maximum], ids=lambda f: f.__name__)
    @pytest.mark.parametrize("rectify", [False, True])
    def test_has_the_moments_of_samples(self, function, rectify: bool):
        x, y = Distribution.normal(0.5, 1.0), Distribution.normal(-0.5, 2.0)
        samples = [0.5 + torch.randn(SAMPLES), -0.5 + 2 * torch.randn(SAMPLES)]
        if rectify:
            x, y, samples = relu(x), relu(y), [torch.relu(values) for values in samples]
        sampled = function(*samples)
        result = x.combine(y, function, nonnegative=False)
        assert result.mean.item() == pytest.approx(sampled.mean().item(), abs=0.08 * sampled.std().item())
        assert result.std.item() == pytest.approx(sampled.std().item(), rel=0.1)

    @pytest.mark.parametrize("x", [Distribution.normal(), relu(Distribution.normal())], ids=["normal", "rectified"])
    def test_the_operands_points_are_not_correlated(self, x: Distribution):
        product = x.combine(x, torch.mul, nonnegative=False)
        covariance = product.mean - x.mean * x.mean
        assert abs((covariance / x.std**2).item()) < 0.05

    def test_is_known_if_both_are(self):
        x = Distribution.normal()
        assert x.combine(x, torch.add, nonnegative=False).known
        assert not x.combine(UNKNOWN, torch.add, nonnegative=False).known
        assert not UNKNOWN.combine(x, torch.add, nonnegative=False).known


class TestMixture:
    """A value that is now one thing, now another."""

    def test_of_one_part_is_that_part(self):
        x = Distribution.normal()
        assert mixture([x]) is x

    def test_of_the_same_part_twice_has_its_points(self):
        x = Distribution.normal(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0]))
        assert torch.equal(mixture([x, x]).points, x.points)

    @pytest.mark.parametrize("weights", [None, (1, 1), (7, 1), (1, 7)])
    def test_has_the_moments_of_samples(self, weights):
        first, second = weights or (1, 1)
        of_first = torch.rand(SAMPLES) < first / (first + second)
        values = torch.where(of_first, torch.randn(SAMPLES), 3 + 0.5 * torch.randn(SAMPLES))
        mixed = mixture([Distribution.normal(), Distribution.normal(3.0, 0.5)], weights)
        assert mixed.mean.item() == pytest.approx(values.mean().item(), abs=0.06)
        assert mixed.std.item() == pytest.approx(values.std().item(), rel=0.05)

    def test_is_known_and_not_negative_if_all_parts_are(self):
        positive = relu(Distribution.normal())
        assert mixture([positive, positive]).nonnegative
        assert not mixture([positive, Distribution.normal()]).nonnegative
        assert not mixture([positive, UNKNOWN]).known

    def test_of_different_numbers_of_channels_tells_none_apart(self):
        two, three = (Distribution.normal(torch.zeros(n), torch.ones(n)) for n in (2, 3))
        assert mixture([two, three]).channels == 1
        assert mixture([two, Distribution.normal()]).channels == 2


@pytest.mark.parametrize("number", [1, 2, 8, 27])
def test_the_largest_of_some_values_has_the_moments_of_samples(number: int):
    sampled = torch.randn(SAMPLES // 4, number).amax(1)
    largest = Distribution.normal().largest_of(number)
    assert largest.mean.item() == pytest.approx(sampled.mean().item(), abs=0.08)
    # the points end at the quantile 1 - 1 / 64, which the largest of many values mostly exceeds
    assert largest.std.item() <= sampled.std().item() * 1.05
    assert largest.std.item() == pytest.approx(sampled.std().item(), abs=0.3)


def test_standardized_has_mean_0_and_variance_1_over_each_group():
    x = Distribution.normal(torch.tensor([1.0, 3.0, 10.0, 10.0]), torch.tensor([1.0, 2.0, 1.0, 5.0]))
    groups = x.standardized(2).points.reshape(2, -1)
    assert_close(groups.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
    assert_close(groups.std(1, correction=0), torch.ones(2))
    assert x.standardized(2).mean[0] < x.standardized(2).mean[1]


def test_standardizing_a_constant_gives_0():
    assert constant(3.0, -2.0).standardized(2).points.unique().tolist() == [0.0]


def test_points_that_are_not_finite_are_unknown():
    x = Distribution.normal().map(torch.log, nonnegative=False)
    assert not x.known
    assert torch.equal(x.points, UNKNOWN.points)
