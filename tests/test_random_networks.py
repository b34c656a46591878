"""Random small networks (networks.py), each converted, run and counted.

`pytest tests/test_random_networks.py --hypothesis-profile=long` runs 20 times as many, others each time.
"""

import copy
import pickle
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from models import run, seeded
from networks import (
    FUNCTIONAL,
    Around,
    Both,
    FunctionalConv,
    InPlace,
    Network,
    Part,
    Stochastic,
    SumInPlace,
    TypeCheck,
    Wrap,
    build,
    example,
    networks,
)
from small import CHANNELS, assert_equal, convert, loss
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import qconvert
from qconvert.layers.tied import TiedConv3d

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # of reentrant checkpointing
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:The tensor attribute"),  # old hooks put the computed weight on the module
    pytest.mark.filterwarnings("ignore:the rules convert no layer"),
]

IDENTITY = {"rule": [{"weight": "identity", "input": "identity"}]}
RULES = {"default": "default", "bitorch": "bitorch", "channels": CHANNELS}
CALLS = 2
"""In a row: the first may leave something behind for the second."""


def some(share: float) -> settings:
    """Return settings for that share of the profile's examples."""
    profile = settings.default
    return settings(
        max_examples=max(1, round(profile.max_examples * share)),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With more, a sum may depend on their timing, and nothing is bit-identical."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- identity ---


@given(network=networks)
@some(2)
def test_identity_conversion_is_bit_identical(network: Network):
    for training in (True, False):
        expected, converted = build(network).train(training), convert(build(network), IDENTITY).train(training)

        assert_identical(outputs(converted, network), outputs(expected, network))
        assert_identical(tensors(converted), tensors(expected))


@given(network=networks)
@some(2)
def test_identity_conversion_has_the_gradients_of_the_float_network(network: Network):
    for training in (True, False):
        expected = gradients(build(network).train(training), network)
        if expected is not None:
            actual = gradients(convert(build(network), IDENTITY).train(training), network)
            assert actual is not None
            assert_identical(actual, expected)


@given(network=networks)
@some(0.6)
def test_the_network_that_came_in_is_as_it_was(network: Network):
    model = build(network)
    outputs(model, network)  # its caches are full
    before = snapshot(model)
    generators = torch.get_rng_state(), random.getstate()

    for rules in (IDENTITY, "bitorch"):
        converted = convert(model, rules)
        assert {id(tensor) for tensor in tensors(converted).values()}.isdisjoint(map(id, tensors(model).values()))
    inputs = example(network)
    qconvert.compare(model, converted, inputs)

    assert_identical(snapshot(model), before)
    assert_identical(inputs, example(network))
    assert_identical((torch.get_rng_state(), random.getstate()), generators)


# --- decisions ---


@given(network=networks)
@some(2)
def test_every_conv3d_has_one_decision_with_a_reason(network: Network):
    model = build(network)
    convs = Counter(module for module in model.modules() if isinstance(module, nn.Conv3d))
    for rules in ("bitorch", "default"):
        plan = qconvert.plan(model, rules)

        decided = Counter(
            model.get_submodule(decision.site.name) for decision in plan.decisions if decision.site.kind == "Conv3d"
        )
        assert decided == convs
        assert all(decision.reason for decision in plan.decisions)
        assert len({decision.site.name for decision in plan.decisions}) == len(plan.decisions)
        for decision in plan.decisions:
            if decision.site.kind == "Conv3d":
                conv = model.get_submodule(decision.site.name)
                assert set(decision.site.names) == {name for name, module in all_names(model) if module is conv}
        event(f"opaque modules: {min(len(plan.opaque), 3)}")


@given(network=networks)
@some(6)
def test_every_module_that_calls_a_functional_convolution_has_a_decision(network: Network):
    model = build(network)
    owners = {
        model.get_submodule(decision.site.name.rpartition(".")[0])
        for decision in qconvert.plan(model, "bitorch").decisions
        if decision.site.kind == "functional conv3d"
    }
    assert owners == {module for module in model.modules() if isinstance(module, FUNCTIONAL)}


@given(network=networks)
@some(1)
def test_what_is_converted_is_what_the_plan_says(network: Network):
    for rules in RULES.values():
        model = build(network)
        planned = {decision.site.name for decision in qconvert.plan(model, rules).converted}
        converted = convert(model, rules)
        assert {name for name, module in converted.named_modules() if isinstance(module, qconvert.QConv3d)} == planned
        for name, module in all_names(model):
            twin = converted.get_submodule(name)
            assert isinstance(twin, parametrize.type_before_parametrizations(module))  # torch makes one for each
            assert twin.training == module.training
            assert [*twin._forward_hooks.values()] == [*module._forward_hooks.values()]


# --- counts ---


@given(network=networks)
@some(1)
def test_totals_are_an_independent_count(network: Network):
    model = build(network).eval()
    converted = convert(model, "bitorch")

    report = qconvert.compare(model, converted, example(network))

    for side, subject in ((report.before, model), (report.after, converted)):
        products = counted(subject, network)
        event(f"low-bit MACs: {products['low-bit'] > 0}")
        assert side.macs == products["float"] + products["low-bit"]
        assert side.macs_by_precision.get("W1A1", 0) == products["low-bit"]
        assert side.flops == 2 * products["float"]
        assert side.bops == 2 * products["low-bit"]
        assert side.parameters == sum(parameter.numel() for parameter in set(subject.parameters()))
        assert side.parameter_bits == bits(subject)
        saved = subject.state_dict()
        buffers = {id(buffer): saved[name] for name, buffer in subject.named_buffers() if name in saved}
        assert side.buffer_bits == sum(8 * buffer.numel() * buffer.element_size() for buffer in buffers.values())
        assert side.to_dict() == qconvert.profile(subject, example(network)).totals.to_dict()


@given(network=networks)
@some(2)
def test_macs_of_every_layer_are_those_of_its_calls(network: Network):
    model = build(network).eval()
    expected: Counter[str] = Counter()
    profile = qconvert.profile(model, example(network))

    def count(name: str, kernel: int, output: Tensor):
        expected[name] += output.numel() * kernel

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d):
            kernel = module.weight.numel() // module.out_channels
            module.register_forward_hook(lambda _, args, y, name=name, kernel=kernel: count(name, kernel, y))
    outputs(model, network, calls=1)

    assert {layer.name: layer.macs for layer in profile.layers if layer.is_conv3d and layer.macs} == expected


class Products(TorchFunctionMode):
    """Counts the multiply-accumulates of every call of a convolution or linear function, by who makes it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.counts = Counter({"float": 0, "low-bit": 0})
        self.precision = ["float"]
        for module in model.modules():
            if isinstance(module, qconvert.QConv3d):
                module.register_forward_pre_hook(lambda *_: self.precision.append("low-bit"))
                module.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def leave(self):
        self.precision.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in {"conv2d", "conv3d", "linear", "conv_transpose3d"}:
            tensors = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            weight = tensors["weight"]
            per_value = weight[0].numel()  # of an output, or of an input of a transposed convolution
            values = tensors["input"] if name == "conv_transpose3d" else output
            self.counts[self.precision[-1]] += values.numel() * per_value
        return output


def counted(model: nn.Module, network: Network) -> Counter[str]:
    watched = copy.deepcopy(model)
    with Products(watched) as products:
        outputs(watched, network, calls=1)
    return products.counts


def bits(model: nn.Module) -> int:
    """1 for each weight that is a Parameter of converted layers only, 32 for everything else."""
    low_bit, wide = set(), set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = isinstance(module, qconvert.QConv3d) and name == "weight"
            is_owner = any(map(is_functional, module.children()))  # it hands the Parameter to a converted layer
            if not is_owner:
                (low_bit if is_weight else wide).add(parameter)
    return sum(parameter.numel() * (1 if parameter in low_bit - wide else 32) for parameter in low_bit | wide)


def is_functional(module: nn.Module) -> bool:
    """Whether the layer was a functional convolution, whose Parameters belong to the module that has called it."""
    return isinstance(module, TiedConv3d) and isinstance(module, qconvert.QConv3d)


# --- training ---


@given(network=networks)
@some(1)
def test_binary_conversion_trains_wherever_the_float_network_does(network: Network):
    float_network = build(network)
    overwrites = qconvert.plan(float_network, "bitorch").overwrites
    for overwrite in overwrites:
        owner = float_network.get_submodule(overwrite.name)
        if overwrite.obstacle is None:
            assert isinstance(owner, (InPlace, SumInPlace))
            owner.in_place = False  # what the plan promises
    event(f"rewritten: {any(overwrite.obstacle is None for overwrite in overwrites)}")
    for training in (True, False):
        expected = gradients(copy.deepcopy(float_network).train(training), network)
        event(f"float network trains: {expected is not None}")
        if expected is None or not all_finite(expected):
            continue
        for rules in RULES.values():
            actual = gradients(convert(build(network), rules).train(training), network)
            assert actual is not None
            assert all_finite(actual)


@given(network=networks)
@some(2)
def test_operations_that_break_autograd_are_in_the_plan_unless_it_is_opaque(network: Network):
    model = build(network)
    plan = qconvert.plan(model, "bitorch")
    failure = failure_of(copy.deepcopy(model).train(), network, calls=1)
    if any(isinstance(module, (TypeCheck, Stochastic)) for module in model.modules()):
        return  # the graph shows another branch than the one that runs
    # opaque modules are listed if they hold a Conv3d
    listed = all(map(holds_conv3d, (module for module in model.modules() if isinstance(module, (Around, Both)))))
    if "modified by an inplace operation" in failure and listed and not plan.opaque:
        assert plan.overwrites


# --- copies ---


@given(network=networks)
@some(0.8)
def test_copies_and_pickles_compute_the_same(network: Network):
    for rules in ("bitorch", CHANNELS):
        converted = convert(build(network), rules)
        twins = [copy.deepcopy(converted)]
        if not any(map(parametrize.is_parametrized, converted.modules())):  # torch pickles none
            twins.append(pickle.loads(pickle.dumps(converted)))  # noqa: S301 (our own bytes)
        expected = outputs(converted, network)
        for twin in twins:
            assert [type(module) for module in twin.modules()] == [type(module) for module in converted.modules()]
            assert_identical(outputs(twin, network), expected)


@given(network=networks)
@some(0.6)
def test_a_state_dict_goes_into_a_second_conversion(network: Network):
    for rules in ("bitorch", CHANNELS):
        converted, twin = convert(build(network).eval(), rules), convert(build(network).eval(), rules)
        with torch.no_grad():
            for parameter in converted.parameters():
                parameter.mul_(0.9).add_(0.05)  # as after training: no value is where a conversion starts it
        state = copy.deepcopy(converted.state_dict())

        twin.load_state_dict(state, strict=True)

        assert_identical(dict(twin.state_dict()), dict(state))
        assert_identical(outputs(twin, network, calls=1), outputs(converted, network, calls=1))


@given(network=networks)
@some(1)
def test_retracing_by_fx_keeps_every_gradient(network: Network):
    model = build(network).eval()
    # fx calls no backward hook of a module that it walks into, and only Conv3d itself is one that it does not
    if any(module._backward_hooks for module in model.modules()) or not is_kept_by_fx(model, network):
        event("float network changes")
        return
    event("float network is kept")
    for rules in ("bitorch", CHANNELS):
        assert is_kept_by_fx(convert(model, rules), network)


def is_kept_by_fx(model: nn.Module, network: Network) -> bool:
    """Whether torch.fx can trace the model, and the trace has its outputs and gradients."""
    expected, expected_outputs = gradients(copy.deepcopy(model), network), outputs(copy.deepcopy(model), network, calls=1)
    try:
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
        traced_outputs = outputs(copy.deepcopy(traced), network, calls=1)
    except Exception:  # noqa: BLE001 (a user's forward may raise anything)
        return False
    actual = gradients(traced, network)
    if (actual is None) != (expected is None) or not is_identical(traced_outputs, expected_outputs):
        return False
    return actual is None or all(is_identical(actual[name], expected[name]) for name in actual)


# --- what random networks have found: each is fixed when its mark has to go ---


@pytest.mark.parametrize("kind", ["TwoNames", "PlainList"])
def test_a_module_in_a_container_keeps_its_state_when_it_is_traced(kind: str):
    model = build(Network("bare", 4, Wrap("TwoNames", Wrap(kind, Part("MutatedBuffers")))))
    before = snapshot(model)
    qconvert.plan(model, "bitorch")
    assert_identical(snapshot(model), before)


def test_a_counter_in_an_opaque_module_converts():
    qconvert.plan(build(Network("bare", 4, Wrap("Length", Part("MutatedBuffers")))), "bitorch")


def test_the_kernel_of_a_converted_functional_convolution_has_one_bit():
    layer = FunctionalConv(4)
    converted = convert(nn.Sequential(nn.Conv3d(4, 4, 1), layer), "bitorch")
    assert any(map(is_functional, converted.modules()))
    assert qconvert.profile(converted).totals.parameter_bits == bits(converted)


# --- helpers ---


def outputs(model: nn.Module, network: Network, calls: int = CALLS) -> Any:
    """Run the model without gradients; return what comes out, what happens to the input, and the generators' states."""
    seeded()
    results = []
    with torch.no_grad():
        for _ in range(calls):
            inputs = example(network)
            results.append((run(model, inputs), inputs))
    return results, torch.get_rng_state(), random.getstate()


def gradients(model: nn.Module, network: Network) -> dict[str, Tensor | None] | None:
    """Return the gradient of every Parameter, or None where autograd refuses."""
    return None if failure_of(model, network) else {name: parameter.grad for name, parameter in model.named_parameters()}


def failure_of(model: nn.Module, network: Network, calls: int = CALLS) -> str:
    """Run the model forward and backward; return in what words autograd refuses, if it does."""
    seeded()
    leaves = []
    try:
        for _ in range(calls):
            leaves += pytree.tree_leaves(run(model, example(network)))
        sum(loss(leaf) for leaf in leaves if isinstance(leaf, Tensor)).backward()
    except RuntimeError as error:
        return str(error)
    return ""


def holds_conv3d(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Conv3d) for inner in module.modules())


def all_finite(values: dict[str, Tensor | None]) -> bool:
    return all(value is None or bool(value.isfinite().all()) for value in values.values())


def all_names(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_identical(actual: Any, expected: Any):
    """Bit by bit, at any depth."""
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec
    assert_equal(map(of_bits, actual_leaves), map(of_bits, expected_leaves))


def is_identical(actual: Any, expected: Any) -> bool:
    try:
        assert_identical(actual, expected)
    except AssertionError:
        return False
    return True


def of_bits(value: Any) -> Any:
    """Return a tensor's shape and bytes, so that NaN is NaN and -0.0 is not 0.0."""
    if not isinstance(value, Tensor):
        return value
    return tuple(value.shape), value.dtype, value.detach().contiguous().numpy().tobytes()


def snapshot(model: nn.Module) -> Any:
    """Return all that a conversion could change: tensors by value, all else by identity."""
    state = {}
    for name, module in all_names(model):
        state[name] = {key: contents(value) for key, value in vars(module).items()}
        state[name]["class"] = id(type(module))
    return state


def contents(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value.detach().clone(), value.requires_grad
    if isinstance(value, dict):
        return id(value), [(key, contents(inner)) for key, inner in value.items()]
    if isinstance(value, (list, tuple, set)):
        return id(value), [contents(inner) for inner in value]
    return (id(value), value) if isinstance(value, (bool, int, float, str)) else id(value)
