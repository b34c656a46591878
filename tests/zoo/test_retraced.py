"""A converted network that something else traces again computes the same and trains the same, latent weights too.

tests/quantizations/test_retracing.py does this for each quantizer; here `binarize` has made whole networks.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TRAPS, Entry, Residual, seeded
from small import (
    CHANNELS,
    assert_equal,
    binary_layers,
    clip,
    convert,
    every_builder,
    loss,
    output,
)
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit"),  # deprecated, and used all the same
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # of reentrant checkpointing
    pytest.mark.filterwarnings("ignore:The tensor attribute"),  # old hooks put the computed weight on the module
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles for itself: torch gives up after eight models of one class."""
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


# --- gradients ---

TRACERS = {
    "symbolic_trace": torch.fx.symbolic_trace,
    "feature_extractor": lambda model: create_feature_extractor(model, {"head": "out"}),
    "compile": compiled,
    "export": lambda model: torch.export.export(model, (clip(),)).module(),
}


def output_and_gradients(run: Callable[[Tensor], Any], owner: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what ``run`` puts out, and the gradient of each Parameter of ``owner``."""
    y = run(clip())
    y = y["out"] if isinstance(y, dict) else y
    parameters = {name.removeprefix("_orig_mod."): parameter for name, parameter in owner.named_parameters()}
    return y.detach(), dict(zip(parameters, torch.autograd.grad(loss(y), list(parameters.values())), strict=True))


@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rules", ["default", CHANNELS], ids=["default", "all"])
def test_retracing_leaves_every_gradient_as_it_is_eagerly(tracer: Callable, training: bool, rules: Any):
    model = convert(Residual(), rules).train(training)
    expected_y, expected = output_and_gradients(model, model)

    traced = tracer(copy.deepcopy(model))
    y, gradients = output_and_gradients(traced, traced)

    assert torch.equal(y, expected_y)
    assert gradients.keys() == expected.keys()
    assert {name for name in expected if not torch.equal(gradients[name], expected[name])} == set()
    latent = [f"{name}.weight" for name in binary_layers(model)]
    assert len(latent) == (4 if rules == "default" else 5)
    assert all(gradients[name].isfinite().all() and gradients[name].any() for name in latent)


# --- outputs: where the float model can be traced, so can the converted one ---


def export(model: nn.Module, args: tuple, kwargs: dict) -> nn.Module:
    return torch.export.export(model, args, kwargs).module()


def jit_trace(model: nn.Module, args: tuple, kwargs: dict) -> nn.Module:
    inputs = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    return torch.jit.trace(model, **inputs, check_trace=False)


def arguments(entry: Entry) -> tuple[tuple, dict]:
    seeded()
    inputs = entry.inputs()
    if isinstance(inputs, tuple):
        return inputs, {}
    return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


STATELESS = [entry for entry in TRAPS if entry.calls == 1]
every_stateless_trap = pytest.mark.parametrize("entry", STATELESS, ids=lambda entry: entry.name)


@every_stateless_trap
@pytest.mark.parametrize("trace", [export, jit_trace])
def test_what_can_be_traced_as_float_can_be_traced_converted(entry: Entry, trace: Callable):
    model = entry.build().eval()
    try:
        trace(copy.deepcopy(model), *arguments(entry))
    except Exception as error:  # noqa: BLE001 (a tracer fails in any way)
        pytest.skip(f"the float model cannot be traced either: {type(error).__name__}")
    converted = convert(model)

    traced = trace(copy.deepcopy(converted), *arguments(entry))

    assert_equal(output(traced, entry), output(converted, entry))


COMPILED = [
    entry for entry in STATELESS if entry.name in ("causal subclass", "conv forward", "functional conv", "weight norm")
]


@pytest.mark.parametrize("entry", COMPILED, ids=lambda entry: entry.name)
def test_subclasses_compile_in_one_graph(entry: Entry):
    converted = convert(entry.build().eval())
    assert_equal(output(compiled(converted), entry), output(converted, entry))


@every_builder
def test_an_exported_model_is_saved_and_loaded(build):
    converted = convert(build().eval())
    file = io.BytesIO()
    torch.export.save(torch.export.export(converted, (clip(),)), file)
    file.seek(0)
    assert_equal([torch.export.load(file).module()(clip())], [converted(clip())])


@every_builder
def test_an_exported_model_takes_any_batch(build):
    converted = convert(build().eval())
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(converted, (clip(),), dynamic_shapes=({0: batch},)).module()
    x = torch.cat([clip(), -clip(), clip()])
    torch.testing.assert_close(exported(x), converted(x))


# --- functional transforms ---


@every_builder
def test_a_functional_call_with_other_parameters_is_the_model_with_those(build):
    converted, other = convert(build().eval()), convert(build().eval())
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    assert not torch.equal(converted(clip()), other(clip()))
    assert_equal([torch.func.functional_call(converted, state, (clip(),))], [other(clip())])


no_functorch = pytest.mark.xfail(
    strict=True,
    raises=RuntimeError,
    reason="torch.library.register_autograd makes an autograd.Function without setup_context, which torch.func.grad refuses",
)


@no_functorch
@every_builder
def test_functional_gradients_are_those_of_autograd(build):
    converted = convert(build().eval())
    _, expected = output_and_gradients(converted, converted)
    parameters = dict(converted.named_parameters())

    gradients = torch.func.grad(lambda values: loss(torch.func.functional_call(converted, values, (clip(),))))(parameters)

    assert gradients.keys() == expected.keys()
    assert_equal(gradients.values(), expected.values())


@every_builder
def test_a_vmap_over_the_batch_is_the_batch(build):
    converted = convert(build().eval())
    alone = torch.vmap(lambda sample: converted(sample.unsqueeze(0)).squeeze(0))
    torch.testing.assert_close(alone(clip()), converted(clip()))


@no_functorch
@every_builder
def test_gradients_for_each_sample_add_up_to_those_of_the_batch(build):
    converted = convert(build().eval())
    parameters = dict(converted.named_parameters())

    def loss_of(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(converted, values, (sample.unsqueeze(0),)).sum()

    each = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(parameters, clip())

    whole = torch.autograd.grad(converted(clip()).sum(), list(parameters.values()))
    for name, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(each[name].sum(0), gradient, msg=lambda text, name=name: f"{name}: {text}")
