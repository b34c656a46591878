"""Classes that a conversion derives from the user's: what those do at a subclass, or torch, is not in the way."""

import abc
import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from small import CHANNELS, binary_layers, clip, convert
from torch import nn

import qconvert
from qconvert import ModelError, QConv3d
from qconvert.generated import Source, with_forward

# --- classes that watch their subclasses ---


class Demanding:
    def __init_subclass__(cls, *, kind, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.kind = kind


class Registered:
    registry: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__name__ in Registered.registry:
            raise ValueError(f"there is a {cls.__name__} already")
        Registered.registry[cls.__name__] = cls


class Final:
    def __init_subclass__(cls, **kwargs):
        if len(cls.__mro__) > cls.depth:
            raise TypeError("no subclasses, please")


class Abstract(abc.ABC):
    @abc.abstractmethod
    def gain(self): ...


class HasGain:
    def gain(self):
        return 2.0

    def forward(self, x):
        return self.gain() * super().forward(x)


class DemandingConv(HasGain, nn.Conv3d, Demanding, kind="conv"):
    pass


class RegisteredConv(HasGain, nn.Conv3d, Registered):
    pass


class FinalConv(HasGain, nn.Conv3d, Final):
    depth = len(nn.Conv3d.__mro__) + 3


class AbstractConv(HasGain, nn.Conv3d, Abstract):
    pass


CONVOLUTIONS = [DemandingConv, RegisteredConv, FinalConv, AbstractConv]


class Functional(nn.Module):
    """A module whose forward is rewritten."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3, 3))

    def forward(self, x):
        return F.conv3d(x, self.kernel)


class DemandingFunctional(Functional, Demanding, kind="functional"):
    pass


class RegisteredFunctional(Functional, Registered):
    pass


class FinalFunctional(Functional, Final):
    depth = len(Functional.__mro__) + 2


class AbstractFunctional(Functional, Abstract):
    def gain(self):
        return 1.0


FUNCTIONAL = [DemandingFunctional, RegisteredFunctional, FinalFunctional, AbstractFunctional]
IDENTITY = {"rule": [{"weight": "identity", "input": "identity", "pad_value": 0.0}]}


def copies(module: nn.Module) -> list[nn.Module]:
    return [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]  # noqa: S301 (our own bytes)


@pytest.mark.parametrize("base", CONVOLUTIONS)
def test_a_convolution_whose_class_watches_its_subclasses_converts(base: type[nn.Conv3d]):
    model = nn.Sequential(base(2, 4, 3))
    registry = dict(Registered.registry)
    converted = convert(model)
    assert isinstance(converted[0], base)
    assert isinstance(converted[0], QConv3d)
    assert getattr(converted[0], "kind", "conv") == "conv"
    assert registry == Registered.registry
    for twin in copies(converted):
        assert type(twin[0]) is type(converted[0])
        assert torch.equal(twin(clip()), converted(clip()))
    assert torch.equal(convert(model, IDENTITY)(clip()), model(clip()))


@pytest.mark.parametrize("base", FUNCTIONAL)
def test_a_module_whose_class_watches_its_subclasses_is_rewritten(base: type[nn.Module]):
    model = nn.Sequential(base())
    registry = dict(Registered.registry)
    converted = convert(model)
    assert isinstance(converted[0], base)
    assert binary_layers(converted) == ["0.conv3d"]
    assert getattr(converted[0], "kind", "functional") == "functional"
    assert registry == Registered.registry
    for twin in copies(converted):
        assert type(twin[0]) is type(converted[0])
        assert torch.equal(twin(clip()), converted(clip()))


def test_a_class_with_abstract_methods_knows_its_instances_as_before():
    converted = convert(nn.Sequential(AbstractConv(2, 4, 3), AbstractConv(4, 4, 3)), CHANNELS)
    quantized = type(converted[0])
    assert type(quantized) is abc.ABCMeta
    assert type(converted[1]) is quantized
    assert isinstance(converted[0], Abstract)
    assert not isinstance(AbstractConv(2, 4, 3), quantized)


def test_a_derived_class_is_derived_from_again():
    source = Source("def forward(self, x):\n    return 3 * self._conv_forward(x, self.weight, self.bias)\n", ())
    conv = RegisteredConv(2, 4, 3)
    rewritten = QConv3d.from_float(conv)
    expected = 3 * rewritten(clip()) / conv.gain()
    rewritten.__class__ = with_forward(rewritten, source)
    conv.__class__ = with_forward(conv, source)
    for layer in (rewritten, QConv3d.from_float(conv)):
        for twin in (layer, copy.deepcopy(layer)):
            assert isinstance(twin, QConv3d)
            assert isinstance(twin, RegisteredConv)
            torch.testing.assert_close(twin(clip()), expected)


class Strict(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict, *, kind: str):
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict, *, kind: str):
        super().__init__(name, bases, namespace)


class StrictConv(nn.Conv3d, metaclass=Strict, kind="conv"):
    pass


class StrictFunctional(Functional, metaclass=Strict, kind="functional"):
    pass


@pytest.mark.parametrize(("base", "place"), [(StrictConv, "layer '1'"), (StrictFunctional, "module '1'")])
def test_where_a_metaclass_refuses_the_error_says_where(base: Any, place: str):
    model = nn.Sequential(nn.Conv3d(2, 2, 1), base(2, 4, 3) if base is StrictConv else base())
    kinds = [type(module) for module in model.modules()]
    message = rf"^{place}.*: no class can derive from {base.__name__}, whose metaclass is Strict: TypeError: .*kind"
    with pytest.raises(ModelError, match=message):
        qconvert.binarize(model, CHANNELS, inplace=True, report=False)
    assert [type(module) for module in model.modules()] == kinds
