"""`Window`: sizes and borders, against torch's own convolution of ones and its pooling."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from hypothesis import assume, given
from hypothesis import strategies as st

from qconvert.signals.geometry import window


def convolved_ones(kernel, stride, padding, dilation, size):
    """Return, per position, how many values the window reads that are no padding."""
    ones = torch.ones(1, 1, *size, dtype=torch.float64)
    kernel_of_ones = torch.ones(1, 1, *kernel, dtype=torch.float64)
    return F.conv3d(ones, kernel_of_ones, None, stride, padding, dilation)[0, 0]


def agrees(kernel, stride, padding, dilation, size):
    moved = window(kernel, stride, padding, dilation)
    counted = convolved_ones(kernel, stride, padding, dilation, size)
    assert moved.output(size) == tuple(counted.shape)
    reads = counted.numel() * torch.Size(kernel).numel()
    assert moved.inside(size) == pytest.approx(counted.sum().item() / reads, rel=1e-12, abs=0)
    assert round(moved.inside(size) * reads) == counted.sum().item()  # as integers: exact


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_setting_of_one_dimension_is_torchs(place: int):
    for kernel, stride, padding, dilation, size in itertools.product(
        range(1, 5), range(1, 4), range(4), range(1, 4), range(1, 8)
    ):
        if size + 2 * padding >= dilation * (kernel - 1) + 1:  # torch refuses a window that does not fit
            numbers = ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1), (size, 2))
            agrees(*(tuple(value if dim == place else rest for dim in range(3)) for value, rest in numbers))


def triples(lowest: int, highest: int):
    return st.tuples(*[st.integers(lowest, highest)] * 3)


@given(triples(1, 4), triples(1, 3), triples(0, 3), triples(1, 3), triples(1, 9))
def test_dimensions_are_independent(kernel, stride, padding, dilation, size):
    fits = (n + 2 * p >= d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True))
    assume(all(fits))
    agrees(kernel, stride, padding, dilation, size)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(triples(1, 5), triples(1, 3), triples(1, 7))
def test_same_padding_of_odd_and_even_kernels_is_torchs(kernel, dilation, size):
    agrees(kernel, (1, 1, 1), "same", dilation, size)


@given(triples(1, 3), triples(1, 3), triples(1, 2), triples(5, 9))
def test_valid_padding_is_none(kernel, stride, dilation, size):
    agrees(kernel, stride, "valid", dilation, size)
    assert window(kernel, stride, "valid", dilation).inside(size) == 1.0


def test_one_number_stands_for_all_three():
    assert (
        window(3, 2, 1, 2)
        == window((3, 3, 3), (2, 2, 2), (1, 1, 1), (2, 2, 2))
        == window([3] * 3, [2] * 3, [1] * 3, [2] * 3)
    )


@given(triples(1, 3), triples(0, 1), triples(4, 9))
def test_a_pooling_without_a_stride_moves_by_its_kernel(kernel, padding, size):
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))  # torch's own condition
    pooled = F.max_pool3d(torch.ones(1, 1, *size), kernel, None, padding)
    assert window(kernel, None, padding).output(size) == tuple(pooled.shape[2:])


def test_border_of_a_window_that_is_all_border_at_its_corners():
    # kernel 1, padding 1: of the 5 positions on 3 values, 3 read a value
    assert window((1, 1, 1), (1, 1, 1), (1, 0, 0)).inside((3, 2, 2)) == 3 / 5


def test_a_volume_that_is_smaller_than_the_window_counts_as_one_position():
    small = window(5, 1, 0)
    assert small.output((3, 3, 3)) == (1, 1, 1)
    assert small.inside((3, 3, 3)) == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        (3, 1, "mirrored"),
        ((3, 3), 1, 0),
        (3, (1, 1), 0),
        (3, 1, (1, 1)),
        (None, 1, 0),
        (3.0, 1, 0),
        (3, 1, None),
        (3, 1, 0, "x"),
    ],
    ids=str,
)
def test_what_are_no_numbers_of_a_3d_window_gives_none(settings):
    assert window(*settings) is None
