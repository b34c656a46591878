"""What a forward may do with a stand-in and may not: whether the graph of a module alone is all that its forward does."""

import functools
from collections import OrderedDict
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qconvert import alone
from qconvert.alone import own_forward

CALLS = 0
EPSILON = {torch.float16: 1e-3}


class Part(nn.Module):
    """A child with a method of its own, which a caller can run beside its forward."""

    calls = 0

    def encode(self, x):
        return x * 2 if type(x) is Tensor else x

    def forward(self, x):
        return x


class Holder:
    """A plain object that a module holds."""

    def __init__(self):
        self.seen = {1}
        self.array = np.zeros(2)

    def scaled(self, x):
        return x * 2 if type(x) is Tensor else x


class Block(nn.Module):
    """What the forwards below find in their module."""

    def __init__(self):
        super().__init__()
        self.part = Part()
        self.norm = nn.BatchNorm3d(4)
        self.state = SimpleNamespace(n=0, inner=[Holder()])
        self.holder = Holder()
        self.mode = "same"


def is_tensor(x):
    return type(x) is Tensor


@functools.singledispatch
def scaled(x):
    return x


@scaled.register
def _(x: Tensor):
    return x * 2


# --- forwards that ask what a stand-in is ---


def asks_type(self, x):
    return x * 2 if type(x) is Tensor else x


def asks_type_of_a_parameter(self, x):
    return x * 2 if type(self.norm.weight) is nn.Parameter else x


def asks_issubclass(self, x):
    return x * 2 if issubclass(type(x), Tensor) else x


def asks_class(self, x):
    return x * 2 if x.__class__ is Tensor else x


def asks_in_a_helper(self, x):
    return x * 2 if is_tensor(x) else x


def asks_in_a_closure(self, x):
    def doubled():
        return x * 2 if type(x) is Tensor else x

    return doubled()


def asks_in_a_method_of_a_child(self, x):
    return self.part.encode(x)


def asks_in_a_method_of_an_object(self, x):
    return self.holder.scaled(x)


def asks_isinstance(self, x):
    return x * 2 if isinstance(x, (list, tuple)) else x


def asks_whether_its_size_is_a_tuple(self, x):
    return x * 2 if isinstance(x.shape, tuple) else x


def asks_for_a_parameter(self, x):
    return x * 2 if isinstance(x, nn.Parameter) else x


def asks_in_torchscripts_way(self, x):
    return x * 2 if torch.jit.isinstance(x, torch.Tensor) else x


def asks_isinstance_of_what_is_iterable(self, x):
    from collections.abc import Iterable  # noqa: PLC0415

    return x * 2 if isinstance(x, Iterable) else x


def matches_a_class(self, x):
    match x:
        case Tensor():
            return x * 2
    return x


def matches_a_sequence(self, x):
    match x:
        case [first, *_]:
            return first
    return x


def dispatches(self, x):
    return scaled(x)


def asks_for_an_attribute(self, x):
    return x * 2 if hasattr(x, "foo") else x


def takes_a_default(self, x):
    return x * getattr(x, "foo", 2.0)


def asks_for_an_attribute_that_tensors_have(self, x):
    return x * 2 if hasattr(x, "shape") else x


def asks_for_the_very_dtype(self, x):
    return x * 2 if x.dtype is torch.float32 else x


def asks_for_a_gradient(self, x):
    return x * 2 if x.grad is None else x


def looks_up(self, x):
    return x * EPSILON.get(x.dtype, 1.0)


def asks_whether_it_can_be_called(self, x):
    return x(x) if callable(x) else x


# --- forwards that go on where a stand-in refuses ---


class Swallow:
    """What suppresses anything, in code that no name leads to."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return True


def swallowed(question):
    def forward(self, x):
        with Swallow():
            return x * question(x)
        return x

    forward.__name__ = f"swallows_{question.__name__}"
    return forward


def catches(self, x):
    try:
        return self.part(x) @ x
    except RuntimeError:
        return x


def suppresses(self, x):
    with suppress(RuntimeError):
        return self.part(x) @ x
    return x


def swallows_no_grad(self, x):
    with Swallow(), torch.no_grad():
        return x * 2
    return x


def assigns(self, x):
    x = self.part(x)
    with Swallow():
        x[0] = 1
    return x


# --- forwards that ask how they are run ---


def asks_for_autocast(self, x):
    return x * 2 if torch.is_autocast_enabled() else x


def asks_for_autocast_on_cpu(self, x):
    return x * 2 if torch.is_autocast_enabled("cpu") else x


def asks_for_fx(self, x):
    return x * 2 if torch.fx._symbolic_trace.is_fx_tracing() else x


def asks_for_a_proxy(self, x):
    return x * 2 if isinstance(x, torch.fx.Proxy) else x


def makes_what_is_missing(self, x, mask=None):
    if mask is None:
        mask = torch.ones(5)
    return x * mask


def counts_what_is_missing(self, x, mask=None):
    if mask is None:
        self.state.n += 1
    return x * 2


# --- forwards that leave something behind ---


def counts_in_an_object(self, x):
    self.state.n += 1
    return x * 2


def adds_to_a_set(self, x):
    self.state.inner[0].seen.add(2)
    return x * 2


def writes_to_an_array(self, x):
    self.holder.array[0] += 1
    return x * 2


def remembers_in_a_list_of_an_object(self, x):
    self.state.inner.append(x)
    return x * 2


def counts_in_a_global(self, x):
    global CALLS  # noqa: PLW0603
    CALLS += 1
    return x * 2


def counts_in_a_child(self, x):
    self.part.calls += 1
    return self.part(x) * 2


def switches_a_child(self, x):
    self.norm.eval()
    return self.norm(x) * 2


KIND = "it asks for the type of a value"
VALUE = "what it does depends on a value"
REFUSED = {
    asks_type: KIND,
    asks_type_of_a_parameter: KIND,
    asks_issubclass: KIND,
    asks_class: KIND,
    asks_in_a_helper: KIND,
    asks_in_a_closure: KIND,
    asks_in_a_method_of_a_child: KIND,
    asks_in_a_method_of_an_object: KIND,
    asks_isinstance: KIND,
    asks_in_torchscripts_way: KIND,
    asks_whether_its_size_is_a_tuple: KIND,
    asks_for_a_parameter: KIND,
    asks_isinstance_of_what_is_iterable: KIND,
    matches_a_class: KIND,
    matches_a_sequence: KIND,
    dispatches: KIND,
    asks_for_an_attribute: "it asks for 'foo', which a tensor lacks",
    takes_a_default: "it asks for 'foo', which a tensor lacks",
    asks_for_an_attribute_that_tensors_have: "it looks at 'shape' of a value in Python",
    asks_for_the_very_dtype: "it looks at 'dtype' of a value in Python",
    asks_for_a_gradient: "it looks at 'grad' of a value in Python",
    looks_up: VALUE,
    asks_whether_it_can_be_called: KIND,
    **{swallowed(question): VALUE for question in (len, bool, float, int, complex, list, range, tuple, reversed)},
    swallowed(lambda x: 2 if 1 in x else 3): VALUE,
    catches: "it catches exceptions",
    suppresses: "it catches exceptions",
    swallows_no_grad: "part of it runs under no_grad",
    assigns: "it assigns to a part of a value",
    asks_for_autocast: "it asks whether autocast is on",
    asks_for_autocast_on_cpu: "it asks whether autocast is on",
    asks_for_fx: "it asks whether it is traced",
    asks_for_a_proxy: "it asks whether it is traced",
    makes_what_is_missing: "what it does depends on the argument 'mask'",
    counts_what_is_missing: "what it does depends on the argument 'mask'",
    counts_in_an_object: "it sets state of the module",
    adds_to_a_set: "it sets state of the module",
    writes_to_an_array: "it sets holder of the module",
    remembers_in_a_list_of_an_object: "it sets state of the module",
    counts_in_a_global: "it sets a global",
    counts_in_a_child: "it sets part.calls of the module",
    switches_a_child: "it sets norm.training of the module",
}


def block(forward) -> nn.Module:
    return type("Block", (Block,), {"forward": forward})()


@pytest.mark.parametrize("forward", REFUSED, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_forward_that_asks_more_than_a_graph_tells_is_refused(forward, mode):
    assert REFUSED[forward] in str(own_forward(block(forward).train(mode)).obstacle)


# --- forwards that may be rewritten ---


def converts(self, x):
    return x.type(torch.float64).to(x.dtype)


def reads_a_dataclass(self, x):
    return self.part(x).hidden * x.get("factor", 2.0)


def asks_its_settings(self, x):
    if isinstance(self.mode, str) and hasattr(self, "part") and self.state.n == 0 and len(self.mode) == 4:
        return self.part(x) * 2
    return x


def takes_sizes_apart(self, x):
    batch, channels, *_ = x.shape[0], x.shape[1]
    return x.reshape(batch, channels, -1) + torch.zeros((x.shape[0], 1, 1)) + torch.arange(x.size(1)).view(-1, 1)


def asks_for_scripting(self, x):
    return x * 2 if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling() else x


def names_its_class(self, x):
    return F.relu(x) * len(type(self).__name__)


HONEST = [converts, reads_a_dataclass, asks_its_settings, takes_sizes_apart, asks_for_scripting, names_its_class]


@pytest.mark.parametrize("forward", HONEST)
def test_a_forward_that_asks_itself_only_is_not_refused(forward):
    assert own_forward(block(forward)).obstacle is None


def test_isinstance_stays_pythons_own_meanwhile():
    seen = []

    def forward(self, x):
        seen.append(isinstance)
        return x * 2

    assert own_forward(block(forward)).obstacle is None
    assert {function.__module__ for function in seen} == {"builtins"}


class Twice(nn.Sequential):
    def __iter__(self):
        return iter([*super().__iter__()] * 2)


def test_a_sequence_is_written_down_as_it_would_be_traced(monkeypatch):
    shared = nn.Conv3d(2, 2, 1)
    for module in (nn.Sequential(shared, nn.ReLU()), nn.Sequential(), nn.Sequential(OrderedDict(one=shared, two=nn.ReLU()))):
        own = own_forward(module)
        with monkeypatch.context() as patched:
            patched.setattr(alone, "_is_a_sequence", lambda _: False)
            traced = own_forward(module)
        assert own.obstacle is traced.obstacle is None
        assert str(own.graph) == str(traced.graph)


def test_a_sequence_that_runs_otherwise_is_traced():
    assert str(own_forward(Twice(nn.ReLU())).graph).count("call_module") == 2
    assert own_forward(nn.Sequential(nn.ReLU(), None)).obstacle is not None
