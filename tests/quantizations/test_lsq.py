"""`LSQ` against the formulas of Esser et al. 2020 in numpy: values, both gradients, start of the step."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qconvert.errors import QuantizerError
from qconvert.quantizations import LSQ

RANGES = {
    "2bit": (2, True, -2, 1),
    "4bit": (4, True, -8, 7),
    "1bit-unsigned": (1, False, 0, 1),
    "3bit-unsigned": (3, False, 0, 7),
}
STEPS = st.sampled_from([0.25, 1.0, 0.1, 3.0])
# multiples of 1/16 hit the ends of the range and the rounding ties of the steps 1/4 and 1
VALUES = st.integers(-200, 200).map(lambda value: value / 16) | st.floats(-100, 100)
ARRAYS = hnp.arrays("float64", hnp.array_shapes(min_dims=1, max_dims=5, max_side=4), elements=VALUES)

every_range = pytest.mark.parametrize(("bits", "signed", "lowest", "highest"), RANGES.values(), ids=RANGES)


def lsq_with_step(bits, signed, step):
    quantizer = LSQ(bits, signed)
    quantizer.step = nn.Parameter(torch.tensor([step], dtype=torch.float64))
    return quantizer


@every_range
@given(x=ARRAYS, step=STEPS)
def test_forward_is_the_formula(bits, signed, lowest, highest, x, step):
    quantized = lsq_with_step(bits, signed, step)(torch.from_numpy(x))
    np.testing.assert_array_equal(quantized.detach().numpy(), oracle.lsq(x, step, lowest, highest))


@every_range
@pytest.mark.parametrize("of", ["weights", "inputs"])
@given(x=ARRAYS, step=STEPS)
def test_both_gradients_are_the_formulas(bits, signed, lowest, highest, of, x, step):
    quantizer, tensor = lsq_with_step(bits, signed, step), torch.from_numpy(x).requires_grad_()
    if of == "weights":
        quantizer.start_from(tensor)
        quantizer.step.data.fill_(step)
    # an array of 5 dimensions is a batch of samples
    values = x[0].size if of == "inputs" and x.ndim == 5 else x.size
    grad_output = np.arange(x.size, dtype=float).reshape(x.shape) % 5 - 2
    quantizer(tensor).backward(torch.from_numpy(grad_output))
    of_x, of_step = oracle.lsq_gradients(grad_output, x, step, lowest, highest, values)
    np.testing.assert_array_equal(tensor.grad.numpy(), of_x)
    np.testing.assert_allclose(quantizer.step.grad.numpy(), of_step, rtol=1e-12, atol=1e-12)


def test_worked_example():
    quantizer = lsq_with_step(bits=2, signed=True, step=0.5)  # -1, -0.5, 0, 0.5
    x = torch.tensor([-9.0, -1.0, -0.4, 0.1, 0.5, 9.0], dtype=torch.float64, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5]
    # at the ends of the range the gradient belongs to the step
    assert x.grad.tolist() == [0, 0, 1, 1, 0, 0]
    assert quantizer.step.grad.item() == pytest.approx((-2 - 2 + (-1 + 0.8) + (0 - 0.2) + 1 + 1) / math.sqrt(6))


@every_range
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_float_dtype(dtype, bits, signed, lowest, highest):
    quantizer, x = lsq_with_step(bits, signed, 0.25), torch.linspace(-3, 3, 25, dtype=dtype, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert quantizer.step.grad.dtype == torch.float64  # the step keeps its own dtype
    np.testing.assert_array_equal(
        y.double().detach().numpy(), oracle.lsq(x.detach().double().numpy(), 0.25, lowest, highest)
    )


@every_range
def test_step_for_inputs_starts_at_a_standard_normal(bits, signed, lowest, highest):
    normal = torch.randn(1_000_000)
    expected = 2 * normal.abs().mean().item() / math.sqrt(highest)
    assert LSQ(bits, signed).step.item() == pytest.approx(expected, rel=0.01)


def test_a_batch_in_two_parts_gives_the_gradients_of_the_whole():
    quantizer, x = lsq_with_step(bits=2, signed=True, step=0.5), torch.randint(-8, 9, (4, 1, 1, 2, 2)) / 4
    (whole,) = torch.autograd.grad(quantizer(x.double()).sum(), quantizer.step)
    for part in x.double().split([1, 3]):
        quantizer(part).sum().backward()
    assert torch.equal(quantizer.step.grad, whole)  # sums of dyadic numbers, times 1 / sqrt(4 features * 1)
    assert whole.item() != 0


FINE_RANGES = {"8bit": (8, True, -128, 127), "16bit": (16, True, -32768, 32767), "8bit-unsigned": (8, False, 0, 255)}


@pytest.mark.parametrize(
    ("bits", "signed", "lowest", "highest", "more"),
    # with fine codes the change is that of a step squared, and a step tried is at most 2 ** 0.25 times the best
    [*((*each, 1.05) for each in RANGES.values()), *((*each, 2**0.5) for each in FINE_RANGES.values())],
    ids=[*RANGES, *FINE_RANGES],
)
@pytest.mark.parametrize("start", [LSQ.start_from, LSQ.start_from_inputs], ids=["weights", "inputs"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_step_starts_where_it_changes_the_tensor_least(bits, signed, lowest, highest, more, start, scale):
    x = scale * np.random.default_rng(0).laplace(size=(20, 5, 3, 3, 3))
    x = x if signed else np.maximum(x, 0)
    quantizer = LSQ(bits, signed).double()
    start(quantizer, torch.from_numpy(x))

    def change(step):
        return np.square(oracle.lsq(x, step, lowest, highest) - x).mean()

    every_step = np.abs(x).mean() / math.sqrt(highest) * np.geomspace(0.005, 50, 500)
    assert change(quantizer.step.item()) <= more * min(map(change, every_step))
    assert quantizer.step.requires_grad


def test_all_zero_weights_leave_the_step_and_stay_zero():
    quantizer, weight = LSQ(4), torch.zeros(3, 2, requires_grad=True)
    before = quantizer.step.item()
    quantizer.start_from(weight)
    quantized = quantizer(weight)
    quantized.sum().backward()
    assert quantizer.step.item() == before > 0
    assert torch.equal(quantized, torch.zeros(3, 2))
    assert torch.equal(weight.grad, torch.ones(3, 2))
    assert quantizer.step.grad.item() == 0


@pytest.mark.parametrize(("signed", "lowest"), [(True, 2), (False, 1)], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 4.0, True])
def test_bits_out_of_range(bits, signed, lowest):
    if bits == lowest and bits is not True:
        assert LSQ(bits, signed).bit_width == bits
        return
    with pytest.raises(QuantizerError, match=f"^lsq: bits must be a whole number from {lowest} to 16, got {bits!r}$"):
        LSQ(bits, signed)


def test_signed_must_be_a_bool():
    with pytest.raises(QuantizerError, match=r"^lsq: signed must be true or false, got 'yes'$"):
        LSQ(4, "yes")
