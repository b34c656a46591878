"""A step of training as one operator: the same values and gradients as the layer's formula written out, and less memory."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from kept import kept_bytes
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from qconvert import QConv3d
from qconvert.quantizations import LSQ, Quantization, quantization_names

CHANNELS = 6
LEARNED = {"threshold": 0.25, "spread": 0.5, "scale": 2.0, "offset": -0.5, "bias": True}
FUSED = [name for name in quantization_names() if name != LSQ.name]


def layer(**settings: Any) -> QConv3d:
    """Return a layer that trains, with weights that are multiples of 1/16 in [-1, 1]."""
    made = QConv3d(CHANNELS, 4, settings.pop("kernel_size", 3), **({"padding": 1} | settings)).train()
    with torch.no_grad():
        made.weight.copy_(torch.randint(-16, 17, made.weight.shape) / 16)
    return made


def clip(*shape: int) -> Tensor:
    """Return a clip of multiples of 1/8, of which sums are exact."""
    return torch.randint(-16, 17, shape or (2, CHANNELS, 3, 5, 4)) / 8


def written_out(made: QConv3d) -> contextlib.AbstractContextManager[Any]:
    """Let the layer run as its formula is written out: a hook sees what lies between."""
    return made.activation.register_forward_hook(lambda *_: None)


def step(made: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return output and gradients of a step whose gradient of the output is of whole numbers."""
    made.zero_grad()
    x = x.detach().requires_grad_()
    y = made(x)
    torch.manual_seed(1)
    y.backward(torch.randint(-4, 5, y.shape).to(y.dtype))
    return {"output": y, "input": x.grad} | {name: parameter.grad for name, parameter in made.named_parameters()}


def both(made: QConv3d, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a step as one operator, and as its formula is written out."""
    one = step(made, x)
    with written_out(made):
        parts = step(made, x)
    return one, parts


def is_one_operator(made: nn.Module, x: Tensor) -> bool:
    with torch.profiler.profile() as profile:
        made(x)
    return any(event.key == "qconvert::quantized_conv3d" for event in profile.key_averages())


@pytest.mark.parametrize("learned", [*([name] for name in LEARNED), list(LEARNED), []], ids=str)
@pytest.mark.parametrize("weights", ["sign", "approxsign"])
@pytest.mark.parametrize("inputs", ["sign", "approxsign", "steheaviside"])
def test_gradients_are_those_of_the_formula_written_out(inputs: str, weights: str, learned: list[str]):
    made = layer(input_quantization=inputs, weight_quantization=weights, **{name: LEARNED[name] for name in learned})
    one, parts = both(made, clip())
    assert one.keys() == parts.keys()
    for name, expected in parts.items():
        assert torch.equal(one[name], expected), name  # everything is a sum of dyadic numbers, so exact


@pytest.mark.parametrize("weights", [name for name in FUSED if name != "identity"])
@pytest.mark.parametrize("inputs", FUSED)
def test_of_every_quantizer(inputs: str, weights: str):
    made = layer(input_quantization=inputs, weight_quantization=weights, **LEARNED)
    x = torch.randn(2, CHANNELS, 3, 5, 4)
    assert is_one_operator(made, x)
    one, parts = both(made, x)
    assert torch.equal(one["output"], parts["output"])
    for name, expected in parts.items():
        assert_close(one[name], expected, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("pad_value", [-1.0, 0.0, 1.0, 0.5])
@pytest.mark.parametrize("padding", [0, 1, (0, 1, 2), "same", "valid"], ids=str)
@pytest.mark.parametrize(
    ("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 2), ((1, 2, 3), 1, 1), (1, (1, 2, 1), 2)], ids=str
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's remark on its own copy
def test_of_every_geometry(stride: Any, dilation: Any, groups: int, padding: Any, pad_value: float):
    if padding == "same" and stride != 1:
        pytest.skip("torch has none")
    made = QConv3d(
        CHANNELS, 4, (3, 2, 3), stride, padding, dilation, groups, pad_value=pad_value, threshold=0.25, scale=0.5
    ).train()
    one, parts = both(made, clip(2, CHANNELS, 5, 7, 6))
    for name, expected in parts.items():
        assert torch.equal(one[name], expected), name


@pytest.mark.parametrize("window", [None, 0.5, 1, 3])
@pytest.mark.parametrize("inputs", ["sign", "approxsign"])
def test_of_every_window(inputs: str, window: float | None):
    made = layer(input_quantization=inputs, gradient_cancellation_threshold=window, spread=0.5)
    one, parts = both(made, clip())
    assert torch.equal(one["input"], parts["input"])
    assert (window is None) or bool((one["input"] == 0).any())


@pytest.mark.parametrize("size", [(1, CHANNELS, 1, 1, 2), (1, CHANNELS, 2, 3, 3), (2, CHANNELS, 5, 7, 6)], ids=str)
@pytest.mark.parametrize("pad_value", [-1.0, 0.0])
def test_of_weights_larger_and_smaller_than_the_input(size: tuple[int, ...], pad_value: float):
    made = layer(pad_value=pad_value, **LEARNED)
    one, parts = both(made, clip(*size))
    for name, expected in parts.items():
        assert torch.equal(one[name], expected), name


def test_without_a_batch():
    one, parts = both(layer(**LEARNED), clip(CHANNELS, 3, 5, 4))
    for name, expected in parts.items():
        assert torch.equal(one[name], expected), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_of_every_dtype(dtype: torch.dtype):
    one, parts = both(layer(threshold=0.25, scale=0.5).to(dtype), clip().to(dtype))
    for name, expected in parts.items():
        assert one[name].dtype == expected.dtype == dtype
        assert_close(one[name], expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("frozen", ["weight", "activation.threshold", "scale", "offset", "bias", "input"])
def test_what_is_frozen_gets_no_gradient(frozen: str):
    made, x = layer(**LEARNED), clip()
    if frozen != "input":
        made.get_parameter(frozen).requires_grad_(requires_grad=False)
    y = made(x.requires_grad_(requires_grad=frozen != "input"))
    y.sum().backward()
    gradients = {"input": x.grad} | {name: parameter.grad for name, parameter in made.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == [frozen]


@pytest.mark.parametrize("pad_value", [-1.0, 0.0])
def test_keeps_what_a_float_convolution_keeps(pad_value: float):
    made, conv = layer(pad_value=pad_value, **LEARNED), nn.Conv3d(CHANNELS, 4, 3, padding=1)
    x = clip(2, CHANNELS, 8, 16, 16).requires_grad_()
    spread = 4 * CHANNELS
    assert kept_bytes(conv, x) == x.untyped_storage().nbytes()
    assert kept_bytes(made, x) == kept_bytes(conv, x) + spread
    with written_out(made):
        assert kept_bytes(made, x) > 2.5 * kept_bytes(conv, x)


def test_of_a_network_keeps_next_to_nothing_more():
    def network(*convs: nn.Module) -> nn.Module:
        return nn.Sequential(*(part for conv in convs for part in (conv, nn.BatchNorm3d(8), nn.ReLU())))

    x = torch.randn(2, 8, 4, 16, 16)
    plain = network(*(nn.Conv3d(8, 8, 3, padding=1) for _ in range(3)))
    settings = {"threshold": 0.1, "spread": 1.0, "scale": "channel", "offset": 0.0}
    quantized = network(*(QConv3d(8, 8, 3, padding=1, **settings) for _ in range(3)))
    assert kept_bytes(quantized, x) <= 1.01 * kept_bytes(plain, x)


class Doubled(Quantization):
    """A quantizer of a user's own, which no operator is known of."""

    name, bit_width = "doubled", 2

    def quantize(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    "made",
    [
        layer(input_quantization="lsq"),
        layer(weight_quantization="lsq"),
        layer(weight_quantization="identity"),
        layer(input_quantization=Doubled()),
        layer(padding_mode="circular"),
        layer().eval(),
    ],
    ids=["lsq inputs", "lsq weights", "float weights", "a quantizer of the user's", "another border", "evaluation"],
)
def test_everything_else_runs_as_it_is_written_out(made: QConv3d):
    assert not is_one_operator(made, clip())
    made(clip()).sum().backward()


@pytest.mark.parametrize("part", ["activation", "activation.activation_function", "_weight_quantize"])
def test_hooks_see_what_lies_between(part: str):
    made, seen = layer(), []
    made.get_submodule(part).register_forward_hook(lambda *args: seen.append(args[-1]))
    made(clip())
    assert len(seen) == 1


def test_a_subclass_that_quantizes_otherwise_is_heeded():
    class Halved(type(layer().activation.activation_function)):
        def quantize(self, x: Tensor) -> Tensor:
            return super().quantize(x) / 2

    made = layer(pad_value=0.0)
    expected = made(clip(1, CHANNELS, 3, 3, 3).fill_(1.0)) / 2
    made.activation.activation_function = Halved()
    assert_close(made(clip(1, CHANNELS, 3, 3, 3).fill_(1.0)), expected)


def test_no_gradients_no_operator():
    with torch.no_grad():
        assert not is_one_operator(layer(), clip())


def test_opcheck():
    made, x = layer(**LEARNED), clip().requires_grad_()
    caught: list[tuple[Any, ...]] = []

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.qconvert.quantized_conv3d.default:
                caught.append(args)
            return function(*args, **(kwargs or {}))

    with Catch():
        made(x)
    spread = caught[0][3]
    args = [arg.detach().requires_grad_(arg is not spread) if isinstance(arg, Tensor) else arg for arg in caught[0]]
    torch.library.opcheck(torch.ops.qconvert.quantized_conv3d.default, args)


def test_operations_are_those_of_the_convolution():
    made, conv, x = layer(), nn.Conv3d(CHANNELS, 4, 3, padding=1, bias=False), clip()
    counts = []
    for run in (made, conv):
        with FlopCounterMode(display=False) as counter:
            run(x.requires_grad_()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(counts[1], rel=0.5)  # the operator's input is padded inside
    with FlopCounterMode(display=False) as counter:
        made(x)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        conv(x)
    assert forward == counter.get_total_flops()


def test_bfloat16_autocast_has_the_same_signs_and_finite_gradients():
    made, x = layer(**LEARNED), clip()
    expected = step(made, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = step(made, x)
        with written_out(made):
            parts = step(made, x)
    assert torch.equal(one["output"], parts["output"])
    assert one["output"].dtype == parts["output"].dtype
    for name, gradient in one.items():
        assert gradient.isfinite().all(), name
        assert gradient.dtype == parts[name].dtype, name
        assert_close(gradient.float(), expected[name], rtol=0.05, atol=0.05 * expected[name].abs().max().item())


def test_of_a_compiled_step():
    made, x = layer(**LEARNED), clip()
    expected = step(made, x)
    compiled = step(torch.compile(made, backend="aot_eager", fullgraph=True), x)
    for name, gradient in compiled.items():
        assert_close(gradient, expected[name.replace("_orig_mod.", "")])


@pytest.mark.parametrize("inputs", ["sign", "weightdorefa"])
@pytest.mark.parametrize("shape", [(3, 2, CHANNELS, 3, 4, 4), (3, CHANNELS, 3, 4, 4)], ids=["batches", "single"])
def test_vmap(shape: tuple[int, ...], inputs: str):
    made, x = layer(input_quantization=inputs, **LEARNED), clip(*shape)
    assert torch.equal(torch.vmap(made)(x), torch.stack([made(each) for each in x]))
    assert torch.equal(torch.vmap(made, in_dims=1)(x.movedim(0, 1)), torch.stack([made(each) for each in x]))


def test_vmap_over_weights():
    made, x = layer(**LEARNED), clip()
    weights = torch.randn(3, *made.weight.shape)
    call = lambda weight: torch.func.functional_call(made, {"weight": weight}, (x,))  # noqa: E731 (used twice)
    assert torch.equal(torch.vmap(call)(weights), torch.stack([call(weight) for weight in weights]))


def test_checkpointing_changes_nothing():
    made, x = layer(**LEARNED), clip()
    expected = step(made, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.made = made

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.made, x, use_reentrant=False)

    for name, gradient in step(Checkpointed(), x).items():
        assert torch.equal(gradient, expected[name.removeprefix("made.")]), name


def test_gradients_add_up():
    made, x = layer(**LEARNED), clip()
    whole = step(made, x)["weight"].clone()
    made.zero_grad()
    torch.manual_seed(1)
    y_shape = made(x).shape
    gradient = torch.randint(-4, 5, y_shape).float()
    for part, part_gradient in zip(x.split(1), gradient.split(1), strict=True):
        made(part).backward(part_gradient)
    assert torch.equal(made.weight.grad, whole)


def test_an_input_that_is_overwritten_is_found():
    made, x = layer(), clip().requires_grad_()
    y = x * 1
    z = made(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_conv3d_is_unchanged_by_what_the_layer_does_in_training():
    made, x = layer(pad_value=0.0), clip()
    expected = F.conv3d(torch.where(x < 0, -1.0, 1.0), torch.where(made.weight < 0, -1.0, 1.0), None, padding=1)
    assert torch.equal(made(x), expected)
