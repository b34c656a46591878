"""A model that is traced again keeps the gradient of every latent weight, step, threshold and scale.

This is why the quantizers are registered operators: torch.fx looks into a plain autograd.Function and records its
forward only, so the gradient becomes exactly 0 without a word.
"""

from collections import OrderedDict

import bitorch.quantizations
import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from qconvert.layers import QConv3d
from qconvert.quantizations import LSQ, ProgressiveSign, Sign, quantizer
from qconvert.quantizations.registry import _BUNDLED

X = torch.randn(2, 2, 6, 5, 5, generator=torch.Generator().manual_seed(1))

TRACERS = {
    "symbolic_trace": torch.fx.symbolic_trace,
    "feature_extractor": lambda model: create_feature_extractor(model, {"out": "out"}),
    "compile": lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
    "export": lambda model: torch.export.export(model, (X,)).module(),
}
# a second one in evaluation, where progressive_sign is another operator
MODES = [(cls.name, True) for cls in _BUNDLED] + [("progressive_sign", False)]
MODE_IDS = [name if training else f"{name}-eval" for name, training in MODES]
every_tracer = pytest.mark.parametrize("tracer", TRACERS)
every_quantizer = pytest.mark.parametrize(("name", "training"), MODES, ids=MODE_IDS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles for itself: torch gives up after eight models of one class."""
    yield
    torch._dynamo.reset()


def small_model(weight_quantization=Sign, input_quantization=Sign, hidden=3, **settings):
    # a wide window and a threshold, or the second layer's input, which a ReLU has made positive, would have a constant sign
    shared = {"gradient_cancellation_threshold": 4.0, "threshold": 0.25, "scale": "channel", "bias": True, "padding": 1}

    def layer(*channels):
        quantizers = {"weight_quantization": weight_quantization(), "input_quantization": input_quantization()}
        return QConv3d(*channels, 3, **quantizers, **shared | settings)

    # the last one is a node whose name is the same in every graph
    layers = {"conv1": layer(2, hidden), "relu": nn.ReLU(), "conv2": layer(hidden, 2), "out": nn.Identity()}
    return nn.Sequential(OrderedDict(layers))


def output_and_gradients(run, owner, names):
    """Output of ``run`` and the gradient of the parameters that ``owner`` has under these names."""
    parameters = {name.removeprefix("_orig_mod."): value for name, value in owner.named_parameters()}
    y = run(X)
    y = y["out"] if isinstance(y, dict) else y
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return y.detach(), torch.autograd.grad(loss, [parameters[name] for name in names])


def assert_tracing_changes_nothing(model, tracer):
    names = [name for name, _ in model.named_parameters()]
    expected_y, expected = output_and_gradients(model, model, names)
    traced = TRACERS[tracer](model)
    y, gradients = output_and_gradients(traced, traced, names)
    torch.testing.assert_close(y, expected_y)
    for name, gradient, eager in zip(names, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, eager, msg=lambda text, name=name: f"gradient of {name}: {text}")
        assert gradient.count_nonzero() > 0, f"no gradient reaches {name}"


@every_quantizer
@every_tracer
@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode")  # progressive_sign
def test_as_weight_and_as_input_quantization(tracer, name, training):
    # several bits for the quantizers of positive values: to one bit, small weights are all 0 and have no gradient
    settings = {"bits": 4} if name in ("inputdorefa", "weightdorefa", "lsq") else {}
    model = small_model(
        weight_quantization=lambda: quantizer(name, **settings), input_quantization=lambda: quantizer(name, **settings)
    )
    assert_tracing_changes_nothing(model.train(training), tracer)


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": "same"},
        {"padding": "same", "pad_value": 0.0},
        {"padding": "valid"},
        {"padding": (0, 1, 1), "pad_value": 0.5},
        {"padding_mode": "reflect"},
        {"padding_mode": "circular"},
        {"gradient_cancellation_threshold": None, "scale": None, "threshold": None, "bias": False},
    ],
    ids=["same", "same-pad0", "valid", "pad0.5", "reflect", "circular", "plain"],
)
@pytest.mark.parametrize("tracer", ["symbolic_trace", "feature_extractor", "export"])  # export traces as compile does
def test_every_kind_of_padding(tracer, settings):
    assert_tracing_changes_nothing(small_model(**settings), tracer)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_tracer
def test_optional_settings(tracer, training):
    model = small_model(hidden=2, standardize=True, shortcut=True, rprelu=True)
    model.relu = nn.Tanh()  # a ReLU cuts off what the slopes bend, as long as the summand is 0
    assert {"conv1.rprelu.slope", "conv2.rprelu.shift"} < {name for name, _ in model.named_parameters()}
    assert_tracing_changes_nothing(model.train(training), tracer)


def test_learned_parameters_are_among_those_compared():
    names = {name for name, _ in small_model(LSQ, LSQ).named_parameters()}
    layer = {
        "weight",
        "bias",
        "scale",
        "_weight_quantize.step",
        "activation.threshold",
        "activation.activation_function.step",
    }
    assert names == {f"{conv}.{name}" for conv in ("conv1", "conv2") for name in layer}


def test_a_plain_autograd_function_fails_this_test():
    # bitorch's Sign: if this test ever fails, torch has changed and the operators may no longer be needed
    model = small_model()
    model.conv1._weight_quantize = bitorch.quantizations.Sign()
    with pytest.raises(AssertionError, match=r"gradient of conv1.weight"):
        assert_tracing_changes_nothing(model, "symbolic_trace")


def test_compiled_progressive_sign_follows_its_scale():
    model = small_model(ProgressiveSign)
    compiled = torch.compile(model, backend="aot_eager")
    outputs = []
    for scale in (0.0, 0.1, 0.5):
        model.conv1._weight_quantize.scale = scale
        outputs.append(compiled(X))
        torch.testing.assert_close(outputs[-1], model(X))
    assert not torch.equal(outputs[0], outputs[1])
