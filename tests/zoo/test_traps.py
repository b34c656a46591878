"""What the generic tests of test_zoo.py cannot see in a trap: who gets a gradient, which hooks fire, what a report says."""

import copy
from typing import Any

import pytest
import torch
from models import (
    BackwardHooked,
    Checkpointed,
    CheckpointedByHooks,
    ComputedWeight,
    ConvForward,
    DeadConv,
    Entry,
    Fourier,
    FrozenParameters,
    HookedConv,
    HookWeightNormed,
    InheritedForward,
    LazyConv,
    NoGradPart,
    ParameterElsewhere,
    Pruned,
    SpectralNormed,
    StateDictHooked,
    TrainingOnly,
    WeightNormed,
    run,
    seeded,
)
from small import CHANNELS, PLAIN, assert_equal, binary_layers, clip, convert, every_trap, loss, output, tensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qconvert

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # of reentrant checkpointing
]

IDENTITY = {"rule": [{"weight": "identity", "input": "identity"}]}


def reasons(model: nn.Module) -> dict[str, tuple[bool, str]]:
    """Return for each site whether it is to be converted by rules that select everything, and why."""
    return {each.site.name: (each.convert, each.reason) for each in qconvert.plan(model, "bitorch").decisions}


def gradients(model: nn.Module, entry: Entry) -> dict[str, Tensor | None]:
    seeded()
    leaves = pytree.tree_leaves(run(model, entry.inputs()))
    sum(loss(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- gradients ---


@every_trap
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_identity_conversion_has_the_gradients_of_the_float_model(entry: Entry, training: bool):
    seeded()
    model = entry.build().train(training)
    expected = gradients(copy.deepcopy(model), entry)

    actual = gradients(convert(model.eval(), IDENTITY).train(training), entry)

    assert actual.keys() == expected.keys()
    assert [name for name in actual if actual[name] is None] == [name for name in expected if expected[name] is None]
    for name, gradient in expected.items():
        assert gradient is None or torch.equal(actual[name], gradient), name


def test_a_part_without_gradients_has_none_converted():
    converted = convert(NoGradPart())
    loss(converted(clip())).backward()
    assert {name for name, parameter in converted.named_parameters() if parameter.grad is not None} == {
        name for name, _ in converted.named_parameters() if name.startswith("head.")
    }


def test_what_is_frozen_stays_frozen():
    converted = convert(FrozenParameters())
    trained = {name for name, parameter in converted.named_parameters() if parameter.requires_grad}
    assert "head.weight" in trained
    assert "head.bias" not in trained
    assert all(name.startswith("head.") for name in trained)
    loss(converted(clip())).backward()
    assert converted.head.weight.grad.any()


@pytest.mark.parametrize("build", [Checkpointed, CheckpointedByHooks])
def test_checkpointing_leaves_the_gradients_as_they_are_without(build):
    converted = convert(build().eval())
    plain = nn.Sequential(converted.stem, converted.block)
    expected = torch.autograd.grad(loss(plain(clip())), list(converted.parameters()))
    loss(converted(clip())).backward()
    assert_equal([parameter.grad for parameter in converted.parameters()], expected)
    assert converted.block[0].weight.grad.any()


# --- hooks ---


def test_forward_hooks_fire_once_a_call():
    converted = convert(HookedConv())
    assert converted.kept == []
    for calls in (1, 2):
        converted(clip())
        assert len(converted.kept) == calls


def test_hooks_of_a_copy_belong_to_the_copy():
    model = HookedConv()
    converted = convert(model)
    converted(clip())
    assert (len(model.kept), len(converted.kept)) == (0, 1)


def test_backward_hooks_fire_and_change_the_gradient():
    hooked = convert(BackwardHooked())
    plain = copy.deepcopy(hooked)
    plain.conv._backward_pre_hooks.clear()
    plain.conv._backward_hooks.clear()
    for model in (hooked, plain):
        loss(model(clip())).backward()
    assert plain.conv.weight.grad.any()
    assert torch.equal(hooked.conv.weight.grad, 2 * plain.conv.weight.grad)  # by the hook on what comes
    assert torch.equal(hooked.stem.weight.grad, plain.stem.weight.grad)  # and halved by the one on what goes


def test_backward_hooks_see_the_layer_that_it_has_become():
    model = BackwardHooked()
    seen = []
    handle = model.conv.register_full_backward_hook(lambda module, inputs, outputs: seen.append(module))
    converted = convert(model, inplace=True)
    loss(converted(clip())).backward()
    assert seen == [converted.conv]
    assert binary_layers(converted) == ["stem", "conv"]
    handle.remove()
    loss(converted(clip())).backward()
    assert len(seen) == 1


def test_state_dict_hooks_rename_as_before():
    converted = convert(StateDictHooked())
    state = converted.state_dict()
    assert {"conv.kernel", "conv.bias"} <= state.keys()
    assert "conv.weight" not in state
    twin = convert(StateDictHooked())
    twin.load_state_dict(state, strict=True)
    assert torch.equal(twin.conv.weight, converted.conv.weight)


def test_state_dict_hooks_run_when_a_state_dict_is_made():
    model = StateDictHooked()
    made = []
    model.register_state_dict_post_hook(lambda *_: made.append("post"))
    model.conv.register_state_dict_pre_hook(lambda *_: made.append("pre"))
    converted = convert(model, inplace=True)
    made.clear()
    converted.state_dict()
    assert made == ["pre", "post"]


def test_state_dict_hooks_do_not_run_when_a_model_is_counted():
    model = StateDictHooked()
    made = []
    model.conv.register_state_dict_pre_hook(lambda *_: made.append("pre"))
    qconvert.profile(model, clip())
    assert made == []


# --- weights that are computed ---


every_computed_weight = pytest.mark.parametrize("build", [WeightNormed, HookWeightNormed, SpectralNormed, Pruned])


@every_computed_weight
def test_a_computed_weight_is_what_is_quantized(build):
    model = build().eval()
    converted = convert(model, PLAIN)
    x = clip()
    expected = nn.functional.conv3d(signs(x - 0.25), signs(model.conv.weight), padding=1) + model.conv.bias.view(-1, 1, 1, 1)
    assert torch.equal(converted.conv(x), expected)


def signs(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0)


@every_computed_weight
def test_what_a_weight_is_computed_from_is_trained(build):
    converted = convert(build().eval())
    sources = [name for name, _ in build().conv.named_parameters() if name != "bias"]
    y = converted(clip())
    loss(y).backward()
    assert all(converted.conv.get_parameter(name).grad.any() for name in sources)
    torch.optim.SGD([converted.conv.get_parameter(name) for name in sources], lr=1.0).step()
    assert not torch.equal(converted(clip()), y)


@every_computed_weight
def test_what_is_added_beside_a_computed_weight_is_trained(build):
    converted = convert(build())
    assert {name for name, parameter in converted.named_parameters() if not parameter.requires_grad} == set()


def test_a_spectral_norm_in_training_is_not_iterated_by_a_conversion():
    model = SpectralNormed()
    converted = convert(model, IDENTITY)
    assert_equal(tensors(converted).values(), tensors(model).values())


def test_a_spectral_norm_in_training_is_not_iterated_by_a_count():
    model = SpectralNormed()
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    qconvert.profile(model, clip())
    assert_equal(tensors(model).values(), before.values())


# --- which convolutions there are ---


def test_subclasses_with_a_forward_that_reaches_a_convolution_are_converted():
    assert binary_layers(convert(InheritedForward())) == ["first", "second"]
    assert binary_layers(convert(ConvForward())) == ["conv", "centered"]


def test_a_subclass_that_never_convolves_stays_as_it_is():
    model = Fourier().eval()
    assert reasons(model)["fourier"] == (False, "FourierConv3d.forward never reaches nn.Conv3d.forward")
    converted = convert(model)
    assert type(converted.fourier) is type(model.fourier)
    x = torch.randn(2, 4, 4, 6, 6)
    assert torch.equal(converted.fourier(x), model.fourier(x))
    entry = Entry("fourier", Fourier, clip, 2)
    assert_equal(output(convert(model, IDENTITY), entry), output(model, entry))


def test_a_functional_convolution_with_a_computed_weight_is_listed():
    decisions = qconvert.plan(ComputedWeight(), "bitorch").decisions
    (functional,) = [each for each in decisions if each.site.kind == "functional conv3d"]
    assert not functional.convert
    assert functional.reason
    assert [each.site.name for each in decisions if each.convert] == ["conv"]


def test_a_convolution_that_never_runs_is_converted_and_said_to_be_never_called():
    converted = convert(DeadConv())
    assert binary_layers(converted) == ["conv", "unused"]
    assert {(each.name, each.reason) for each in qconvert.profile(converted, clip()).uncounted} >= {
        ("unused", "never called")
    }


def test_a_convolution_that_runs_in_training_only_is_converted():
    converted = convert(TrainingOnly())
    assert binary_layers(converted) == ["conv", "auxiliary"]
    loss(converted(clip())[1]).backward()
    assert converted.auxiliary.weight.grad.any()
    assert isinstance(converted.eval()(clip()), Tensor)


def test_a_weight_used_elsewhere_is_float_there():
    converted = convert(ParameterElsewhere(), PLAIN)
    y = converted.encode(clip()).tanh()
    assert torch.equal(converted(clip()), nn.functional.conv_transpose3d(y, converted.encode.weight, padding=1))


# --- inputs ---


@every_trap
def test_example_inputs_are_as_they_were_after_a_conversion(entry: Entry, capsys):
    seeded()
    inputs = entry.inputs()
    before = copy.deepcopy(inputs)
    qconvert.binarize(entry.build().eval(), CHANNELS, example_inputs=inputs)
    assert "Conv3d found" in capsys.readouterr().out
    assert [type(leaf) for leaf in leaves_of(inputs)] == [type(leaf) for leaf in leaves_of(before)]
    assert_equal(leaves_of(inputs), leaves_of(before))


def leaves_of(inputs: Any) -> list[Any]:
    """Return what is in containers, and in a dataclass that pytree does not know."""
    return pytree.tree_leaves(vars(inputs) if hasattr(inputs, "__dataclass_fields__") else inputs)


# --- lazy modules ---


def test_a_lazy_convolution_is_initialised_by_the_example_input():
    model = LazyConv()
    converted = convert(model, example_inputs=clip())
    assert binary_layers(converted) == ["stem", "head"]
    assert converted.stem.in_channels == 2
    assert converted(clip()).shape == (2, 4, 4, 6, 6)
    assert isinstance(model.stem.weight, nn.UninitializedParameter), "the model that came in is as it was"


def test_a_lazy_convolution_is_initialised_by_the_input_of_the_rules(capsys):
    rules = {"model": {"input_shape": [1, 2, 4, 6, 6]}, **CHANNELS}
    converted = qconvert.binarize(LazyConv(), rules)
    assert binary_layers(converted) == ["stem", "head"]
    assert "2 Conv3d found, 2 converted" in capsys.readouterr().out


def test_a_trial_run_leaves_nothing_but_the_weights_behind():
    class Counts(LazyConv):
        runs = 0

        def forward(self, x):
            self.runs += 1
            return super().forward(x)

    model = Counts()
    before = torch.get_rng_state()
    converted = convert(model, example_inputs=clip())
    assert (model.runs, converted.runs) == (0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert converted.stem.training


def test_an_example_that_a_lazy_model_does_not_take_is_an_error():
    with pytest.raises(qconvert.InputError, match=r"LazyConv does not run on the example input \(3, 3\)"):
        convert(LazyConv(), example_inputs=torch.zeros(3, 3))


def test_a_lazy_convolution_in_place_is_left_and_named():
    model = LazyConv()
    assert binary_layers(convert(model, example_inputs=clip(), inplace=True)) == ["head"]


def test_a_lazy_convolution_without_an_example_is_left_and_named():
    model = LazyConv()
    assert reasons(model)["stem"] == (False, "no weight yet (a lazy module): run the model once before converting it")
    converted = convert(model)
    assert binary_layers(converted) == ["head"]
    assert converted(clip()).shape == (2, 4, 4, 6, 6)


def test_a_lazy_convolution_that_has_run_is_converted():
    model = LazyConv()
    model(clip())
    assert binary_layers(convert(model)) == ["stem", "head"]
