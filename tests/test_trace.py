"""Tracing: what is found, in which role, and that the model is left alone."""

import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn
from torchvision.models.video import r3d_18

import qconvert
from qconvert import ModelError, trace
from qconvert.layers import QConv3d
from qconvert.trace import copied

IDENTITY = {"rule": [{"weight": "identity", "input": "identity"}]}


class Scaled(nn.Conv3d):
    """A subclass with a forward of its own that ends in Conv3d's."""

    def forward(self, x, factor=2.0):
        return super().forward(x * factor)


class Standardized(nn.Conv3d):
    """A subclass whose forward never gets to Conv3d's."""

    def forward(self, x):
        return F.conv3d(x, self.weight - self.weight.mean(), None, self.stride, self.padding)


class Branching(nn.Module):
    """Control flow on a value: fx cannot follow it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 1)
        self.body = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, 3, padding=1))
        self.head = nn.Conv3d(4, 2, 1)
        self.calls = 0
        self.register_buffer("steps", torch.zeros(()))
        self.cache = []

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        self.cache.append(x)
        x = self.stem(x)
        if x.mean() > 0:
            x = self.body(x)
        return self.head(x)


def roles(model: nn.Module) -> dict[str, set[str]]:
    return {site.name: set(site.roles) for site in trace(model).sites if site.roles}


def test_r3d_18_finds_all_20_with_their_roles():
    traced = trace(r3d_18())
    conv3d = [site for site in traced.sites if site.kind == "Conv3d"]
    assert len(conv3d) == 20
    assert sum(site.type == "Conv3d" for site in conv3d) == 4
    assert sum(site.type == "Conv3DSimple" for site in conv3d) == 16
    assert roles(traced.model) == {
        "stem.0": {"first"},
        "layer2.0.downsample.0": {"shortcut"},
        "layer3.0.downsample.0": {"shortcut"},
        "layer4.0.downsample.0": {"shortcut"},
        "layer4.1.conv2.0": {"last"},
    }


def test_a_region_runs_as_a_graph_module_of_the_users_layers():
    model = r3d_18().eval()
    (graph_module,) = trace(model).regions.values()
    assert isinstance(graph_module, fx.GraphModule)
    x = torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(graph_module(x), model(x))
    assert graph_module.get_submodule("stem.0") is model.stem[0]
    targets = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Conv3d)} <= targets
    graph_module.graph.lint()


def test_the_graph_of_a_converted_model_lints_and_keeps_every_layer_whole():
    converted = qconvert.binarize(r3d_18().eval(), "bitorch", report=False)
    (graph_module,) = trace(converted).regions.values()
    graph_module.graph.lint()
    called = [graph_module.get_submodule(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    assert sum(isinstance(module, QConv3d) for module in called) == 20
    x = torch.randn(1, 3, 4, 32, 32)
    assert torch.equal(graph_module(x), converted(x))


def test_untraceable_model_is_taken_apart_in_the_order_of_registration():
    model = Branching()
    traced = trace(model)
    assert [module.name for module in traced.opaque] == [""]
    assert "control flow" in traced.opaque[0].reason
    assert "test_trace.py:" in traced.opaque[0].reason
    assert set(traced.regions) == {"stem", "body", "head"}
    assert roles(model) == {"stem": {"first"}, "head": {"last"}}
    x = torch.randn(1, 1, 4, 4, 4)
    for name, graph_module in traced.regions.items():
        part = model.get_submodule(name)
        x, expected = graph_module(x), part(x)
        assert torch.equal(x, expected)


def test_an_untraceable_part_is_one_node_of_the_rest():
    model = nn.Sequential(nn.Conv3d(1, 1, 1), Branching(), nn.Conv3d(2, 2, 1))
    traced = trace(model)
    assert [module.name for module in traced.opaque] == ["1"]
    assert roles(model) == {"0": {"first"}, "2": {"last"}}
    root = traced.regions[""]
    assert [node.target for node in root.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    root.graph.lint()


def test_tracing_leaves_no_mark_on_the_model():
    model = Branching()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model)
    trace(nn.Sequential(model))
    assert (model.calls, model.cache) == (0, [])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_list_arguments_are_as_they_were_for_the_opaque_node():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 1)

        def forward(self, xs):
            xs[0] = self.conv(xs[0])
            return xs[0] if xs[0].mean() > 0 else xs[1]

    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Overwrites()

        def forward(self, x, y):
            return self.part([x, y])

    traced = trace(Owner())
    root = traced.regions[""]
    root.graph.lint()
    call = next(node for node in root.graph.nodes if node.op == "call_module")
    assert [node.name for node in call.args[0]] == ["x", "y"]


def test_defaults_of_the_forward_are_used_not_proxies():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 1)
            self.other = nn.Conv3d(1, 1, 1)

        def forward(self, x, mask=None, flag=True):
            if mask is not None:
                x = self.other(x)
            return self.conv(x) if flag else x

    assert roles(Optional())["conv"] == {"first", "last"}


def test_bare_convolution_is_a_region_of_its_own():
    conv = nn.Conv3d(2, 3, 1)
    traced = trace(conv)
    assert [(site.name, site.roles) for site in traced.sites] == [("", {"first", "last"})]
    x = torch.randn(1, 2, 2, 2, 2)
    assert torch.equal(traced.regions[""](x), conv(x))


def test_shared_module_is_one_site_with_all_its_names():
    conv = nn.Conv3d(2, 2, 1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv, nn.Conv3d(2, 2, 1))})
    sites = trace(model).sites
    assert [(site.name, site.aliases) for site in sites] == [("a", ("b.0",)), ("b.1", ())]


def test_other_convolutions_are_listed_and_a_functional_one_is_convertible():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 1)
            self.up = nn.ConvTranspose3d(2, 1, 2)
            self.kernel = nn.Parameter(torch.randn(1, 1, 1, 1, 1))

        def forward(self, x):
            return F.conv3d(self.up(self.conv(x)), self.kernel)

    kinds = {site.name: (site.kind, site.blocker) for site in trace(Mixed()).sites}
    assert kinds == {
        "conv": ("Conv3d", None),
        "up": ("ConvTranspose3d", "not a Conv3d"),
        "conv3d": ("functional conv3d", None),
    }


def test_subclass_is_convertible_if_its_forward_reaches_conv3ds():
    model = nn.ModuleList([nn.Conv3d(1, 1, 1), Scaled(1, 1, 1), Standardized(1, 1, 1), nn.LazyConv3d(1, 1)])
    blockers = [site.blocker for site in trace(model).sites]
    assert blockers[:2] == [None, None]
    assert blockers[2] == "Standardized.forward never reaches nn.Conv3d.forward"
    assert "run the model once" in blockers[3]


def test_wrappers_are_looked_through():
    model = nn.Sequential(nn.Conv3d(1, 1, 1))
    assert trace(nn.DataParallel(model)).model is model
    assert trace(torch.compile(model)).model is model
    assert trace(torch.compile(nn.DataParallel(model))).model is model


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, got int"):
        trace(3)
    with pytest.raises(ModelError, match="ScriptModule has no Python forward"):
        trace(torch.jit.trace(nn.Conv3d(1, 1, 1), torch.zeros(1, 1, 1, 1, 1)))


def test_a_container_as_default_leaves_a_region_that_runs():
    class Resizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 1)

        def forward(self, x, size=(4, 4, 4), factor=2.0, options={}):  # noqa: B006 (what users write)
            return F.interpolate(self.conv(x) * factor, size=size)

    model, x = Resizing(), torch.randn(1, 1, 2, 2, 2)
    assert torch.equal(trace(model).regions[""](x, (4, 4, 4)), model(x))


def test_hooks_of_the_user_see_neither_the_trace_nor_the_count():
    seen = []
    model = nn.Sequential(nn.Sequential(nn.Conv3d(1, 1, 1)), nn.Conv3d(1, 1, 1))
    for module in (model, model[0], model[1]):
        module.register_forward_hook(lambda module, args, output: seen.append(type(output)))
        module.register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    converted = qconvert.binarize(model, "bitorch", example_inputs=torch.zeros(1, 1, 2, 2, 2))
    assert seen == []
    converted(torch.zeros(1, 1, 2, 2, 2))
    assert len(seen) == 6


def test_generators_are_as_they_were():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 1)

        def forward(self, x):
            return self.conv(x) * np.random.rand() * random.random() * torch.rand(1)  # noqa: S311 (the global one)

    def states():
        return (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist())

    model = Draws()
    before = states()
    trace(model)
    assert states() == before


def test_a_forward_put_on_the_instance_is_left_alone():
    model = nn.Sequential(nn.Conv3d(1, 1, 1))
    conv = model[0]
    conv.forward = lambda x: F.conv3d(x, conv.weight)
    assert trace(model).sites[0].blocker == "its forward was replaced on the instance"


class SetsItsNorm(nn.Module):
    """It sets attributes of a layer of torch's while it runs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 1)
        self.norm = nn.BatchNorm3d(2)
        self.kernel = nn.Parameter(torch.randn(2, 2, 1, 1, 1))

    def forward(self, x):
        self.norm.eval()
        self.norm.momentum, self.norm.last = 0.3, x
        return nn.functional.conv3d(self.norm(self.conv(x)), self.kernel)


def test_what_a_forward_sets_on_a_layer_of_torchs_is_put_back():
    model = SetsItsNorm()
    trace(model)
    assert model.norm.training
    assert model.norm.momentum == 0.1
    assert not hasattr(model.norm, "last")


def test_operations_called_by_keyword_are_looked_at():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(2, 2, 1)
            self.norm = nn.BatchNorm3d(2)

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(input=y)
            y += 1
            return y + z

    (found,) = trace(ByKeyword()).overwrites
    assert found.obstacle is None
    assert "BatchNorm3d has read" in found.reason


def test_lazy_buffers_are_copied():
    model = nn.Sequential(nn.LazyConv3d(4, 1), nn.LazyBatchNorm3d())
    twin = copied(model)
    assert isinstance(twin[1].running_mean, nn.UninitializedBuffer)
    assert twin(torch.randn(1, 2, 3, 3, 3)).shape == (1, 4, 3, 3, 3)
    assert isinstance(model[1].running_mean, nn.UninitializedBuffer)


class HasAKernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 1)
        self.kernel = nn.Parameter(torch.randn(2, 2, 1, 1, 1))


class ByValue(HasAKernel):
    """Its forward cannot be traced, so no graph shows its functional convolution."""

    def forward(self, x):
        y = F.conv3d(x, self.kernel)
        return self.conv(y) if y.sum() > 0 else y


class InALambda(HasAKernel):
    """The same, in a function inside the forward."""

    def forward(self, x):
        convolve = lambda y: F.conv3d(y, self.kernel)  # noqa: E731
        return self.conv(convolve(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("build", [ByValue, InALambda])
def test_a_functional_convolution_that_no_graph_shows_is_listed(build):
    sites = {site.name: site for site in trace(build()).sites}
    assert sites.keys() == {"conv", "conv3d"}
    assert sites["conv3d"].kind == "functional conv3d"
    assert sites["conv3d"].blocker.startswith("its forward cannot be traced on its own (TraceError: ")


class InAHelper(HasAKernel):
    """The same, in a function of the module that a function of the module calls."""

    def forward(self, x):
        y = helper(x, self.kernel)
        return self.conv(y) if y.sum() > 0 else y


def helper(x, weight):
    return inner_helper(x, weight) * 2


def inner_helper(x, weight):
    return F.conv3d(x, weight)


class General(HasAKernel):
    """A convolution of any rank."""

    def forward(self, x):
        y = torch.convolution(x, self.kernel, None, [1], [0], [1], False, [0], 1)
        return self.conv(y) if y.sum() > 0 else y


@pytest.mark.parametrize("build", [InAHelper, General])
def test_a_functional_convolution_under_another_name_is_listed(build):
    sites = {site.name: site for site in trace(build()).sites}
    assert sites.keys() == {"conv", "conv3d"}
    assert sites["conv3d"].kind == "functional conv3d"
    assert sites["conv3d"].blocker.startswith("its forward cannot be traced on its own (TraceError: ")


class Calls(nn.Module):
    """A convolution by torch.convolution or the like."""

    def __init__(self, convolution, rank=5, size=1, computed=False, transposed=False):
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 1)
        self.kernel = nn.Parameter(torch.randn(2, 2, *[1] * (rank - 2)))
        self.convolution = convolution
        self.arguments = [1] * size, [0] * size, [1] * size, transposed, [0] * size, 1
        self.computed = computed

    def forward(self, x):
        x = self.conv(x)
        weight = self.kernel * 2 if self.computed else self.kernel
        return self.convolution(x, weight, None, *self.arguments)


every_general = pytest.mark.parametrize(
    "convolution", [torch.convolution, torch.ops.aten.convolution, torch.ops.aten.convolution.default]
)


@every_general
@pytest.mark.parametrize("settings", [{}, {"size": 3}, {"size": 3, "computed": True}], ids=str)
def test_a_general_convolution_is_listed_and_stays(convolution, settings):
    model = Calls(convolution, **settings)
    x = torch.randn(1, 2, 2, 2, 2)
    functional = [decision for decision in qconvert.plan(model, IDENTITY).decisions if decision.site.name != "conv"]
    assert [each.site.kind for each in functional] == ["functional conv3d"]
    assert not functional[0].convert
    assert "call F.conv3d" in functional[0].reason
    assert torch.equal(qconvert.binarize(model, IDENTITY, report=False)(x), model(x))


@every_general
@pytest.mark.parametrize(
    "settings", [{"rank": 4}, {"rank": 4, "size": 2, "computed": True}, {"transposed": True, "size": 3}], ids=str
)
def test_a_general_convolution_that_is_none_of_3d_is_not_listed(convolution, settings):
    assert [site.name for site in trace(Calls(convolution, **settings)).sites] == ["conv"]


class NamesItsOwn(HasAKernel):
    """It names a convolution that is no function of torch's, and a plain one of rank 4."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 2, 1, 1))

    def convolution(self, x):
        return torch.convolution(x[0], self.kernel, None, [1], [0], [1], False, [0], 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else self.convolution(x)


def test_a_general_convolution_that_no_graph_shows_needs_a_weight_of_3d():
    assert [site.name for site in trace(NamesItsOwn()).sites] == ["conv"]


# --- what copy.deepcopy cannot copy ---


class Locked(nn.Module):
    """It holds a lock, and a functional convolution that its forward calls under it."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.conv = nn.Conv3d(2, 2, 1)
        self.body = nn.Sequential(nn.Conv3d(2, 2, 1), nn.ReLU(), nn.Conv3d(2, 2, 1))
        self.kernel = nn.Parameter(torch.randn(2, 2, 1, 1, 1))
        self.calls = 0

    def forward(self, x):
        with self.lock:
            self.calls += 1
            return F.conv3d(self.body(self.conv(x)), self.kernel)


class Outer(nn.Module):
    """It can be copied but for what is inside it, and runs code of that beside its forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(2, 2, 1)
        self.locked = Locked()
        self.head = nn.Conv3d(2, 2, 1)

    def forward(self, x):
        self.locked.calls += 1
        return self.head(self.locked(self.stem(x)))


def test_what_cannot_be_copied_is_opaque():
    traced = trace(Locked())
    assert [str(each) for each in traced.opaque] == [
        "Not traceable: the model (Locked): it cannot be copied: TypeError: cannot pickle '_thread.lock' object"
    ]
    assert set(traced.graphs) == {"conv", "body"}
    blockers = {site.name: site.blocker for site in traced.sites}
    assert blockers.keys() == {"conv", "body.0", "body.2", "conv3d"}
    assert "cannot pickle '_thread.lock' object" in blockers["conv3d"]


def test_around_what_cannot_be_copied_the_path_is_known():
    model = Outer()
    seen = []
    model.locked.body.register_forward_hook(lambda *_: seen.append("hook"))
    traced = trace(model)
    assert [each.name for each in traced.opaque] == ["locked"]
    assert set(traced.graphs) == {"", "locked.conv", "locked.body"}
    assert roles(model) == {"stem": {"first"}, "head": {"last"}}
    assert model.locked.calls == 0
    assert len(model.locked.body._forward_hooks) == 1
    assert seen == []


@pytest.mark.parametrize("build", [Locked, Outer])
def test_what_cannot_be_copied_is_converted_in_place(build):
    model = build()
    x = torch.randn(1, 2, 2, 2, 2)
    names = [site.name for site in trace(model).sites if site.kind == "Conv3d"]
    plan = qconvert.plan(model, IDENTITY)
    assert [decision.site.name for decision in plan.decisions if decision.convert] == names
    expected = model(x)
    converted = qconvert.binarize(model, IDENTITY, inplace=True, report=False)
    assert converted is model
    assert all(isinstance(model.get_submodule(name), QConv3d) for name in names)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("settings", [{"report": False}, {"inplace": True}, {"inplace": True, "calibration_data": [0]}])
def test_what_needs_a_copy_says_how_to_do_without(settings):
    model = Outer()
    message = r"copy\.deepcopy\(Outer\) fails: TypeError: cannot pickle '_thread.lock'.*inplace=True, report=False"
    with pytest.raises(ModelError, match=message):
        qconvert.binarize(model, IDENTITY, **settings)
    assert not any(isinstance(module, QConv3d) for module in model.modules())


def test_a_count_of_what_cannot_be_copied_says_so():
    with pytest.raises(ModelError, match=r"copy\.deepcopy\(Outer\) fails"):
        qconvert.profile(Outer(), torch.zeros(1, 2, 2, 2, 2))


def test_a_generator_and_a_method_that_refuses_to_copy():
    class Refuses(nn.Sequential):
        def __deepcopy__(self, memo):
            raise NotImplementedError("never\nat all")

    stream = nn.Sequential(nn.Conv3d(1, 1, 1))
    stream.stream = (value for value in ())
    reasons = [each.reason for each in trace(nn.Sequential(stream, Refuses(nn.Conv3d(1, 1, 1)))).opaque]
    assert reasons == [
        "it cannot be copied: TypeError: cannot pickle 'generator' object",
        "it cannot be copied: NotImplementedError: never",
    ]
