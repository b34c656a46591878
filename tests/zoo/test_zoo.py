"""Every model of the zoo converts, and a conversion changes what its rules name and nothing else."""

import copy
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from models import Entry, PlainList, SharedModule, StandardizedModel, TiedParameter, run, seeded
from small import CHANNELS
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils import _pytree as pytree
from zoo import ZOO

import qconvert

pytestmark = [  # of the models, not of the conversion
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated"),
]

IDENTITY = {"rule": [{"weight": "identity", "input": "identity"}]}


class Case(NamedTuple):
    """A zoo entry with its float model, which is built once: a test takes a fresh one, for a forward may write to it."""

    entry: Entry
    model: nn.Module

    def fresh(self) -> nn.Module:
        """Return a copy of the float model."""
        return copy.deepcopy(self.model)

    def converted(self, rules: Any) -> nn.Module:
        """Return a conversion of such a copy."""
        return qconvert.binarize(self.fresh(), rules, report=False)


@pytest.fixture(scope="module", params=ZOO, ids=lambda entry: entry.name)
def case(request) -> Iterator[Case]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, a sum over threads may depend on their timing, and nothing is bit-identical
    seeded()
    yield Case(request.param, request.param.build())
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["eval", "train", "as built"])
def test_identity_conversion_is_bit_identical(case: Case, mode: str):
    expected = case.fresh()
    converted = case.converted(IDENTITY)
    for model in (expected, converted):
        if mode != "as built":
            model.train(mode == "train")

    expected_results = _results(expected, case.entry)
    converted_results = _results(converted, case.entry)

    _assert_identical(converted_results, expected_results)
    # what a forward leaves behind is an output too: running means, counters, the random generators' states
    _assert_identical(_tensors(converted), _tensors(expected))
    assert pytree.tree_leaves(expected_results), "a model without outputs would pass unseen"


def test_every_conv3d_has_one_decision_with_a_reason(case: Case):
    convs = _convs(case.model).keys()

    plan = qconvert.plan(case.fresh(), "bitorch")

    decisions = [decision for decision in plan.decisions if decision.site.kind == "Conv3d"]
    assert len(convs) == case.entry.conv3d
    assert len(decisions) == len({decision.site.name for decision in decisions}) == case.entry.conv3d
    assert {decision.site.name for decision in decisions} == convs
    assert all(decision.reason for decision in plan.decisions)
    # bitorch's rules select everything: what stays float has a blocker
    assert all(decision.convert == (decision.site.blocker is None) for decision in decisions)
    assert all(decision.rule for decision in decisions)


@pytest.mark.parametrize("rules", [IDENTITY, "bitorch"], ids=["identity", "bitorch"])
def test_the_model_that_came_in_is_as_it_was(case: Case, rules: Any):
    model = case.fresh()
    before = _snapshot(model)

    converted = qconvert.binarize(model, rules, report=False)

    _assert_identical(_snapshot(model), before)
    assert _storages(model).isdisjoint(_storages(converted))


def test_conversion_draws_no_random_numbers(case: Case):
    before = torch.get_rng_state(), random.getstate()
    case.converted("bitorch")
    _assert_identical((torch.get_rng_state(), random.getstate()), before)


def test_macs_of_every_conv3d_are_those_of_its_outputs(case: Case):
    """Each output value of a convolution is one product with its kernel: counted on a real run, with hooks of our own."""
    model = case.fresh().eval()
    counted: dict[str, int] = dict.fromkeys(_convs(model), 0)

    def count(name: str, conv: nn.Conv3d, output: Tensor):
        counted[name] += output.numel() * (conv.weight.numel() // conv.out_channels)

    profile = qconvert.profile(model, _inputs(case.entry))
    for name, conv in _convs(model).items():
        conv.register_forward_hook(lambda conv, args, output, name=name: count(name, conv, output))
    _once(model, case.entry)

    assert {layer.name: layer.macs for layer in profile.layers if layer.is_conv3d} == counted


def test_model_that_has_just_been_trained_converts(case: Case):
    """A training step leaves tensors with a history behind (caches, deep supervision heads), which deepcopy refuses."""
    model = case.fresh().train()
    _once(model, case.entry)

    converted = qconvert.binarize(model, "bitorch", report=False)

    assert any(map(_is_binary, converted.modules()))
    assert qconvert.profile(model, _inputs(case.entry)).totals.macs > 0


@pytest.mark.parametrize("rules", [None, "bitorch"], ids=["float", "bitorch"])
def test_counting_leaves_everything_as_it_was(case: Case, rules: str | None):
    model = case.converted(rules) if rules else case.fresh()
    inputs = _inputs(case.entry)
    before = _snapshot(model), _contents(inputs), torch.get_rng_state(), random.getstate()

    profile = qconvert.profile(model, inputs)

    _assert_identical((_snapshot(model), _contents(inputs), torch.get_rng_state(), random.getstate()), before)
    assert profile.totals.macs > 0
    assert sum(map(_is_conv3d, model.modules())) == sum(layer.is_conv3d for layer in profile.layers)


def test_the_converted_model_is_the_users_own(case: Case):
    converted = case.converted(IDENTITY)

    if not isinstance(case.model, nn.Conv3d):  # a lone convolution becomes a subclass of itself
        assert type(converted).__name__ == type(case.model).__name__  # of a rewritten forward, a subclass of that name
    assert isinstance(converted, type(case.model))
    assert list(converted.state_dict()) == list(case.model.state_dict())
    assert converted.load_state_dict(case.model.state_dict(), strict=True)
    names = [name for name, _ in case.model.named_modules()]  # the conversion adds those of the quantizers
    assert [name for name, _ in converted.named_modules() if name in names] == names
    for name, module in case.model.named_modules():
        twin = converted.get_submodule(name)
        assert isinstance(twin, type_before_parametrizations(module)), name
        assert twin.training == module.training, name
        assert len(twin._forward_hooks) == len(module._forward_hooks), name
        assert len(twin._forward_pre_hooks) == len(module._forward_pre_hooks), name
        assert vars(module).keys() <= vars(twin).keys(), name


def test_binary_model_runs_forward(case: Case):
    converted = case.converted("bitorch").eval()
    with torch.no_grad():
        expected = _once(case.fresh().eval(), case.entry)
        output = _once(converted, case.entry)

    assert _shapes(output) == _shapes(expected)
    assert all(leaf.isfinite().all() for leaf in _floats(output))
    planned = qconvert.plan(case.fresh(), "bitorch").converted
    assert sum(map(_is_binary, converted.modules())) == len(planned) > 0
    assert any(not torch.equal(a, b) for a, b in zip(_floats(output), _floats(expected), strict=True))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_binary_model_runs_backward(case: Case, mode: str):
    model = case.fresh().train(mode == "train")
    if qconvert.plan(model, CHANNELS).overwrites:  # what these say is true, and the conversion mends it
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            _backward(_once(model, case.entry))
        return _assert_trains(case.converted(CHANNELS).train(mode == "train"), case.entry, {})
    _backward(_once(model, case.entry))
    # with plain signs every layer behind a ReLU is constant, and a BatchNorm in training makes of that gradients without end
    return _assert_trains(case.converted(CHANNELS).train(mode == "train"), case.entry, _gradients(model))


def _assert_trains(converted: nn.Module, entry: Entry, expected: dict[str, Tensor]):
    _backward(_once(converted, entry))
    gradients = _gradients(converted)
    assert gradients.keys() >= expected.keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    latent = {f"{name}.weight".removeprefix("."): module for name, module in converted.named_modules() if _is_binary(module)}
    # where a float layer gets a gradient, unless its weight is still 0: then so is its scale, which is trained first
    live = [name for name, layer in latent.items() if name in expected and expected[name].any() and layer.weight.any()]
    assert any(gradients[name].any() for name in live) or not live  # without a formula for the sign they are 0, silently


def test_shared_module_stays_one_module():
    model = _quietly(SharedModule(), "bitorch")
    assert isinstance(model.conv, qconvert.QConv3d)
    assert model.same is model.conv


def test_tied_parameter_stays_one_parameter():
    model = _quietly(TiedParameter(), "bitorch")
    assert isinstance(model.encode, qconvert.QConv3d)
    assert model.decode.weight is model.encode.weight
    assert isinstance(model.decode.weight, nn.Parameter)


def test_plain_list_sees_the_conversion():
    model = _quietly(PlainList(), "bitorch")
    assert model.layers == [model.first, model.second]
    assert all(isinstance(layer, qconvert.QConv3d) for layer in model.layers)


def test_subclass_that_never_convolves_stays_float():
    original = StandardizedModel()
    model = _quietly(original, "bitorch")
    decision = next(d for d in qconvert.plan(original, "bitorch").decisions if d.site.name == "standardized")
    assert type(model.standardized) is type(original.standardized)
    assert not decision.convert
    assert decision.reason == "StandardizedConv3d.forward never reaches nn.Conv3d.forward"


def _quietly(model: nn.Module, rules: Any) -> nn.Module:
    return qconvert.binarize(model, rules, report=False)


def _once(model: nn.Module, entry: Entry) -> Any:
    """Run the model on a new example input, with every random draw as in any other call of this function."""
    inputs = _inputs(entry)
    return run(model, inputs)


def _inputs(entry: Entry) -> Any:
    seeded()
    return entry.inputs()


def _results(model: nn.Module, entry: Entry) -> Any:
    """Run the model as often as the entry says; return the outputs and where the random generators are afterwards."""
    inputs = _inputs(entry)
    with torch.no_grad():
        outputs = [run(model, copy.deepcopy(inputs)) for _ in range(entry.calls)]
    return outputs, torch.get_rng_state(), random.getstate()


def _assert_identical(actual: Any, expected: Any):
    """Bit by bit, at any depth, NaN and -0.0 included."""
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec
    for left, right in zip(actual_leaves, expected_leaves, strict=True):
        assert type(left) is type(right)
        if isinstance(left, Tensor):
            assert (left.shape, left.dtype) == (right.shape, right.dtype)
            assert torch.equal(_bits(left), _bits(right))
        else:
            assert left == right


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else flat


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every Parameter and buffer, those that no checkpoint holds too."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _snapshot(model: nn.Module) -> Any:
    """Everything that a conversion could change: tensors by value, all else by identity."""
    attributes = {}
    for name, module in model.named_modules(remove_duplicate=False):
        attributes[name] = {key: _contents(value) for key, value in vars(module).items()}
        attributes[name]["class"] = id(type(module))
    return {key: tensor.detach().clone() for key, tensor in _tensors(model).items()}, attributes


def _contents(value: Any) -> Any:
    """The object's identity, and a tensor's value; of a container also those of what is in it (hooks, modules, caches)."""
    if isinstance(value, Tensor):
        return id(value), value.detach().clone()
    if isinstance(value, dict):
        return id(value), [(key, _contents(inner)) for key, inner in value.items()]
    if isinstance(value, (list, tuple, set)):
        return id(value), [_contents(inner) for inner in value]
    return (id(value), value) if isinstance(value, (bool, int, float, str)) else id(value)


def _storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(model).values() if tensor.numel()}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _convs(model: nn.Module) -> dict[str, nn.Conv3d]:
    return {name: module for name, module in model.named_modules() if _is_conv3d(module)}


def _is_conv3d(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv3d)


def _is_binary(module: nn.Module) -> bool:
    return isinstance(module, qconvert.QConv3d)


def _floats(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _shapes(output: Any) -> Any:
    return pytree.tree_map(lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, output)


def _backward(output: Any):
    # a sum would be no loss: behind a softmax or a normalisation its gradient is 0 everywhere
    sum((leaf * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum() for leaf in _floats(output)).backward()
