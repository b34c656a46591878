"""`Ternary` against the formula of Li et al. 2016 in numpy."""

import hypothesis.extra.numpy as hnp
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconvert.quantizations import Ternary

# multiples of 1/8: their sums are exact in any order, so that torch's and numpy's means are equal to the last bit
EIGHTHS = st.integers(-64, 64).map(lambda value: value / 8)
WEIGHTS = hnp.arrays("float64", hnp.array_shapes(min_dims=1, max_dims=5, max_side=4), elements=EIGHTHS)


@given(weight=WEIGHTS)
def test_forward_is_the_formula(weight):
    np.testing.assert_array_equal(Ternary()(torch.from_numpy(weight)).numpy(), oracle.ternary(weight))


@given(weight=WEIGHTS)
def test_gradient_passes_everywhere(weight):
    x = torch.from_numpy(weight).requires_grad_()
    grad_output = torch.arange(x.numel(), dtype=x.dtype).view(x.shape) - 3
    Ternary()(x).backward(grad_output)
    assert torch.equal(x.grad, grad_output)


def test_worked_example():
    # mean magnitude 2, so what is not above 1.4 becomes 0; the mean of 2, 3 and 4 is 3
    quantized = Ternary()(torch.tensor([2.0, -3.0, 4.0, -1.0, 0.0]))
    assert quantized.tolist() == [3.0, -3.0, 3.0, 0.0, 0.0]


def test_weight_at_the_threshold_becomes_zero():
    assert Ternary()(torch.tensor([7.0, 13.0], dtype=torch.float64)).tolist() == [0.0, 13.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_all_zero_weights_stay_zero(dtype):
    weight = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    quantized = Ternary()(weight)
    quantized.sum().backward()
    assert quantized.dtype == dtype
    assert torch.equal(quantized, torch.zeros(2, 3, dtype=dtype))
    assert torch.equal(weight.grad, torch.ones(2, 3, dtype=dtype))
