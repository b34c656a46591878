"""Where and in what form a model's tensors are, a conversion leaves them: dtype, memory format, device, autograd mode."""

import copy
from typing import Any

import pytest
import torch
from models import Residual
from small import (
    PLAIN,
    assert_equal,
    binary_layers,
    clip,
    convert,
    every_builder,
    every_rule,
    tensors,
)
from torch import Tensor, nn

every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)


# --- dtypes, memory formats, devices ---


@every_builder
@every_dtype
@every_rule
def test_a_model_in_another_precision_converts_and_trains_in_it(build, dtype: torch.dtype, rules: Any):
    converted = convert(build().to(dtype), rules)
    y = converted(clip().to(dtype))
    y.float().square().mean().backward()
    assert y.dtype is dtype
    assert y.isfinite().all()
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    assert {buffer.dtype for buffer in converted.buffers() if buffer.is_floating_point()} <= {dtype}
    gradients = [parameter.grad for parameter in converted.parameters()]
    assert all(gradient is not None and gradient.dtype is dtype for gradient in gradients)


@every_builder
@every_dtype
def test_casting_before_and_after_the_conversion_is_the_same(build, dtype: torch.dtype):
    model = build().eval()
    before = convert(copy.deepcopy(model).to(dtype), PLAIN)
    after = convert(model, PLAIN).to(dtype)
    assert_equal([before(clip().to(dtype))], [after(clip().to(dtype))])
    assert_equal(list(before.state_dict().values()), list(after.state_dict().values()))


@every_builder
def test_channels_last_survives(build):
    model = build().eval()
    expected = convert(model)(clip())
    float_model = copy.deepcopy(model).to(memory_format=torch.channels_last_3d)
    converted = convert(float_model)
    x = clip().contiguous(memory_format=torch.channels_last_3d)

    for key, value in float_model.state_dict().items():
        assert converted.state_dict()[key].stride() == value.stride(), key
    expected_formats, formats = formats_of_outputs(float_model, x), formats_of_outputs(converted, x)
    assert True in expected_formats.values()
    assert expected_formats.items() <= formats.items()
    torch.testing.assert_close(converted(x), expected)


def formats_of_outputs(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """Return for each Conv3d, and for the whole model (""), whether what it gives is in channels_last_3d."""
    formats = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv3d)}

    def look(name: str, y: Tensor) -> None:
        formats[name] = y.dim() == 5 and y.is_contiguous(memory_format=torch.channels_last_3d)

    handles = [
        layer.register_forward_hook(lambda layer, args, y, name=name: look(name, y)) for name, layer in layers.items()
    ]
    look("", model(x))
    for handle in handles:
        handle.remove()
    return formats


@every_builder
@every_rule
def test_a_model_on_the_meta_device_converts_and_runs(build, rules: Any):
    converted = convert(build().to("meta"), rules)
    assert {t.device.type for t in tensors(converted).values()} == {"meta"}
    assert binary_layers(converted) == binary_layers(convert(build(), rules))
    assert converted(clip().to("meta")).shape == build()(clip()).shape


@every_builder
@every_rule
def test_a_model_that_was_meta_can_be_filled_with_weights(build, rules: Any):
    trained = convert(build().eval(), rules)
    empty = convert(build().eval().to("meta"), rules)
    assert empty.load_state_dict(trained.state_dict(), strict=True, assign=True)
    assert_equal([empty(clip())], [trained(clip())])


@every_rule
def test_what_is_added_to_a_layer_is_where_the_layer_is(rules: Any):
    model = Residual()
    model.blocks[1].to("meta")
    model.head.to("meta")
    converted = convert(model, rules)
    for name, tensor in tensors(converted).items():
        assert tensor.device.type == ("meta" if name.startswith(("blocks.1.", "head.")) else "cpu"), name
    y = converted.blocks[0](converted.stem(clip()))
    assert converted.head(converted.blocks[1](y.to("meta")).mean((2, 3, 4))).shape == (2, 3)


# --- modes of autograd ---


@every_builder
@every_rule
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no grad"])
def test_a_converted_model_runs_without_gradients(build, rules: Any, mode):
    converted = convert(build().eval(), rules)
    expected = converted(clip())
    with mode():
        y = converted(clip())
    assert not y.requires_grad
    assert_equal([y], [expected.detach()])


@every_builder
@every_rule
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no grad"])
def test_a_model_that_was_converted_without_gradients_trains(build, rules: Any, mode, inplace: bool):
    model = build()
    expected = convert(copy.deepcopy(model), rules)
    with mode():
        converted = convert(model, rules, inplace=inplace)
    for each in (converted, expected):
        each(clip()).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in converted.named_parameters()}
    assert_equal(list(gradients.values()), [parameter.grad for parameter in expected.parameters()])


@every_builder
@every_rule
def test_a_model_made_in_inference_mode_converts_and_runs(build, rules: Any):
    with torch.inference_mode():
        model = build().eval()
        converted = convert(model, rules)
        y = converted(clip())
    assert y.isfinite().all()
    assert binary_layers(converted) == binary_layers(convert(build(), rules))
