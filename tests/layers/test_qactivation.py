"""`QActivation`: quantizer, gradient window, per-channel threshold. After bitorch's tests/layers/test_qactivation.py."""

import bitorch.layers
import numpy as np
import oracle
import pytest
import torch

from qconvert.errors import QuantizerError
from qconvert.layers import QActivation
from qconvert.quantizations import LSQ, ApproxSign, Sign

VALUES = [-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0]


def gradient(activation, x, grad_output):
    x = x.clone().requires_grad_()
    activation(x).backward(grad_output)
    return x.grad


def test_default_is_the_sign_with_a_window_of_one():
    activation = QActivation()
    assert isinstance(activation.activation_function, Sign)
    assert activation.gradient_cancellation_threshold == 1.0
    assert activation.threshold is None
    assert not list(activation.parameters())


def test_quantizer_by_name_or_as_a_module():
    assert isinstance(QActivation("approxsign").activation_function, ApproxSign)
    module = LSQ(bits=2)
    assert QActivation(module).activation_function is module


def test_unknown_quantizer():
    with pytest.raises(ValueError, match=r"^unknown quantizer 'iNvAlIdNaMe'"):
        QActivation("iNvAlIdNaMe")


@pytest.mark.parametrize("window", [0.3, 0.5, 1.0, 2.0, 3.0])
def test_gradient_passes_inside_the_window_ends_included(window):
    x = torch.tensor(VALUES)
    expected = torch.where(x.abs() <= window, x, 0.0)
    assert torch.equal(gradient(QActivation("sign", window), x, x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_window_between_two_numbers_includes_the_nearer_one(dtype):
    x = torch.tensor([1.3, -1.3], dtype=dtype)
    inside = x.double().abs() <= 1.3
    assert torch.equal(gradient(QActivation("sign", 1.3), x, torch.ones_like(x)), inside.to(dtype))


@pytest.mark.parametrize("window", [None, 0, 0.0])
def test_window_is_off(window):
    x = torch.tensor([*VALUES, 1e30, float("inf")])
    assert torch.equal(gradient(QActivation("sign", window), x, x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [0.5, 1.0, 1.25])  # bitorch rounds the window to float32, so none that needs more
@pytest.mark.parametrize("name", ["identity", "sign", "approxsign", "swishsign", "inputdorefa"])
def test_equal_to_bitorch(name, window, dtype):
    x = torch.tensor([*VALUES, 0.5, -0.5, 1.25, -1.25, -0.0, float("inf"), float("nan")], dtype=dtype)
    ours, theirs = QActivation(name, window), bitorch.layers.QActivation(name, window)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0, equal_nan=True)
    x = x[x.isfinite()]  # a slope of NaN, at values that are none, stays NaN outside the window too
    grad_output = torch.linspace(-2, 2, len(x), dtype=dtype)
    expected = gradient(theirs, x, grad_output)
    torch.testing.assert_close(gradient(ours, x, grad_output), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", [-1, -0.001, float("nan")])
def test_negative_window(window):
    message = rf"^gradient_cancellation_threshold must be None \(off\), 0 \(off\) or above 0, got {window}$"
    with pytest.raises(QuantizerError, match=message):
        QActivation("sign", window)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (3, 4, 5, 6)], ids=["batch", "unbatched"])
def test_threshold_is_taken_off_channel_by_channel(shape):
    x, threshold = torch.randn(shape), torch.tensor([-1.0, 0.0, 1.0])
    expected = oracle.sign(x.numpy() - threshold.numpy().reshape(3, 1, 1, 1))
    np.testing.assert_array_equal(QActivation("sign", threshold=threshold)(x).detach().numpy(), expected)


def test_value_at_its_threshold_is_plus_one():
    activation = QActivation("sign", threshold=torch.tensor([0.25]))
    assert activation(torch.full((1, 1, 1, 1, 1), 0.25)).item() == 1


def test_window_lies_around_the_threshold_and_the_threshold_learns():
    x = torch.tensor(VALUES).view(1, 1, 1, 1, -1).requires_grad_()
    activation = QActivation("sign", 1.0, threshold=torch.tensor([1.0]))
    grad_output = torch.arange(1.0, 8.0).view_as(x)
    activation(x).backward(grad_output)
    assert x.grad.flatten().tolist() == [0, 0, 0, 4, 5, 6, 0]  # where x is 0, 0.3 and 1
    assert activation.threshold.grad.item() == -(4 + 5 + 6)


def test_threshold_is_a_parameter_of_its_own():
    start = torch.tensor([0.5])
    activation = QActivation("sign", threshold=start)
    assert [name for name, _ in activation.named_parameters()] == ["threshold"]
    assert activation.threshold.requires_grad


def test_input_is_not_changed():
    x = torch.tensor(VALUES)
    QActivation("identity", 1.0)(x).mul_(2)
    assert x.tolist() == torch.tensor(VALUES).tolist()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "gradient_cancellation_threshold=1.0"),
        ({"threshold": torch.zeros(2)}, "gradient_cancellation_threshold=1.0, threshold=per channel"),
    ],
    ids=["without", "with threshold"],
)
def test_repr_shows_the_settings(settings, text):
    assert QActivation("sign", **settings).extra_repr() == text
