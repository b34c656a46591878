"""Every quantizer that bitorch has too gives exactly bitorch's values and gradients."""

import contextlib
import io
import math

import bitorch.quantizations
import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import qconvert.quantizations

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# each takes the library, so that one line builds both quantizers
CASES = {
    "identity": lambda library: library.Identity(),
    "sign": lambda library: library.Sign(),
    "approxsign": lambda library: library.ApproxSign(),
    "swishsign": lambda library: library.SwishSign(),
    "swishsign-beta1": lambda library: library.SwishSign(beta=1.0),
    "steheaviside": lambda library: library.SteHeaviside(),
    "progressive_sign-train-start": lambda library: library.ProgressiveSign(use_global_scaling=False),
    "progressive_sign-train-middle": lambda library: library.ProgressiveSign(use_global_scaling=False, initial_scale=0.5),
    "progressive_sign-train-end": lambda library: library.ProgressiveSign(use_global_scaling=False, initial_scale=1.0),
    "progressive_sign-train-temperature1": lambda library: library.ProgressiveSign(custom_transform=lambda _: 1.0),
    "progressive_sign-train-alpha2-beta3": lambda library: library.ProgressiveSign(
        use_global_scaling=False, initial_scale=0.25, alpha=2, beta=3
    ),
    "progressive_sign-eval": lambda library: library.ProgressiveSign(use_global_scaling=False, initial_scale=0.5).eval(),
    "inputdorefa-1bit": lambda library: library.InputDoReFa(bits=1),
    "inputdorefa-2bit": lambda library: library.InputDoReFa(bits=2),
    "inputdorefa-4bit": lambda library: library.InputDoReFa(bits=4),
    "inputdorefa-16bit": lambda library: library.InputDoReFa(bits=16),
    "weightdorefa-1bit": lambda library: library.WeightDoReFa(bits=1),
    "weightdorefa-2bit": lambda library: library.WeightDoReFa(bits=2),
    "weightdorefa-4bit": lambda library: library.WeightDoReFa(bits=4),
    "weightdorefa-16bit": lambda library: library.WeightDoReFa(bits=16),
}
ELEMENTWISE = [case for case in CASES if not case.startswith("weightdorefa")]
WEIGHT_DOREFA = [case for case in CASES if case.startswith("weightdorefa")]

# both zeros; the window's ends +-1 and their neighbours in every dtype; rounding ties of the 1- and 2-bit quantizers
FINITE = [0.0, 0.5, 1 / 6, 1e-7, 1.0, 1 + 2**-7, 1 - 2**-8, 1 + 2**-10, 1 - 2**-11, math.nextafter(1, 2), 2.0, 88.0, 6e4]
EDGES = [sign * value for value in [*FINITE, math.inf] for sign in (1, -1)] + [math.nan]


def tensors(allow_nan=True):
    """Float tensors of every dtype and of 0 to 3 values in each of 1 to 5 dimensions."""
    elements = st.sampled_from(EDGES if allow_nan else EDGES[:-1]) | st.floats(width=32, allow_nan=allow_nan)
    shapes = hnp.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=3)
    arrays = hnp.arrays("float64", shapes, elements=elements)
    return st.builds(lambda array, dtype: torch.from_numpy(array).to(dtype), arrays, st.sampled_from(DTYPES))


def forward_backward(quantizer, x):
    x = x.clone().requires_grad_()
    with contextlib.redirect_stdout(io.StringIO()):  # bitorch's SteHeaviside prints in its backward
        y = quantizer(x)
        y.backward((torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype))
    return y.detach(), x.grad


def assert_same_as_bitorch(case, x):
    y, gradient = forward_backward(CASES[case](qconvert.quantizations), x)
    expected_y, expected_gradient = forward_backward(CASES[case](bitorch.quantizations), x)
    assert y.dtype == x.dtype
    # bitorch's SteHeaviside returns float32 whatever it is given; its +-1 mean the same
    torch.testing.assert_close(y, expected_y.to(x.dtype), rtol=0, atol=0, equal_nan=True)
    if case == "approxsign":  # bitorch's is infinity times 0 where 2 - 2 |x| overflows
        expected_gradient = torch.where(x.abs() > 1, 0.0, expected_gradient)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0, equal_nan=True)


def test_every_bitorch_quantizer_is_compared():
    # its scheduled_quantizer is a training schedule and no quantizer of its own
    names = set(bitorch.quantizations.quantization_names()) - {"scheduled_quantizer"}
    assert names == {case.split("-")[0] for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ELEMENTWISE)
def test_edge_values(case, dtype):
    assert_same_as_bitorch(case, torch.tensor(EDGES, dtype=dtype))


@pytest.mark.parametrize("case", ELEMENTWISE)
@given(x=tensors())
def test_any_values(case, x):
    assert_same_as_bitorch(case, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WEIGHT_DOREFA)
def test_edge_weights_of_dorefa(case, dtype):
    assert_same_as_bitorch(case, torch.tensor(EDGES[:-1], dtype=dtype))


@pytest.mark.parametrize("case", WEIGHT_DOREFA)
@given(x=tensors(allow_nan=False))
def test_any_weights_of_dorefa(case, x):
    assume(x.count_nonzero() > 0)  # bitorch divides all-zero weights by 0, and fails on no weights
    assert_same_as_bitorch(case, x)


@pytest.mark.parametrize("case", WEIGHT_DOREFA)
def test_a_nan_weight_of_dorefa_is_not_hidden(case):
    assert_same_as_bitorch(case, torch.tensor([0.5, math.nan, -0.25]))


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_in_the_dtype_of_the_input(case):
    for dtype in DTYPES:
        y, gradient = forward_backward(CASES[case](qconvert.quantizations), torch.tensor([0.5, -0.5], dtype=dtype))
        assert y.dtype == gradient.dtype == dtype
