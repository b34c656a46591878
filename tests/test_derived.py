"""Classes that a conversion derives from the user's: what those do at a subclass, or torch, is not in the way."""

import abc
import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from models import SpectralNormed, WeightNormed
from small import CHANNELS, binary_layers, clip, convert
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models.video.resnet import Conv3DSimple

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


# --- parametrizations that come and go ---

BUILDERS = {"weight_norm": WeightNormed, "spectral_norm": SpectralNormed}
every_parametrized = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


class Subclass(nn.Conv3d):
    """Its counterpart is a class of its own."""


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


@every_parametrized
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
def test_a_parametrization_is_removed_after_a_conversion(build: Any, inplace: bool):
    model = build().eval()
    converted = convert(model, inplace=inplace)
    expected = converted(clip())
    parametrize.remove_parametrizations(converted.conv, "weight")
    assert type(converted.conv) is QConv3d
    assert torch.allclose(converted(clip()), expected)
    if build is WeightNormed:
        converted.conv._load_state_dict_pre_hooks.clear()  # weight_norm leaves one behind that torch cannot pickle
    for twin in copies(converted):
        assert torch.equal(twin(clip()), converted(clip()))
    if not inplace:  # the one that came in has its own still
        parametrize.remove_parametrizations(model.conv, "weight")
        assert type(model.conv) is nn.Conv3d


def test_a_parametrization_of_a_subclass_is_removed_after_a_conversion():
    model = nn.Sequential(parametrize.register_parametrization(Conv3DSimple(2, 4), "weight", Doubled())).eval()
    converted = convert(model)
    expected = converted(clip())
    assert isinstance(converted[0], Conv3DSimple)
    parametrize.remove_parametrizations(converted[0], "weight")
    assert type(converted[0]) is type(convert(nn.Sequential(Conv3DSimple(2, 4)))[0])
    assert torch.equal(converted(clip()), expected)


def test_the_weight_below_a_parametrization_comes_back():
    conv = nn.Conv3d(2, 4, 3)
    weight = conv.weight
    layer = QConv3d.from_float(parametrize.register_parametrization(conv, "weight", Doubled()))
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert layer.weight is weight


def test_models_converted_from_one_lose_a_parametrization_apart():
    model = WeightNormed().eval()
    first, second = convert(model), convert(model)
    parametrize.remove_parametrizations(first.conv, "weight")
    assert torch.equal(second(clip()), convert(model)(clip()))
    parametrize.register_parametrization(second.conv, "bias", Doubled())
    assert not parametrize.is_parametrized(model.conv, "bias")
    assert isinstance(model.conv.bias, nn.Parameter)


@pytest.mark.parametrize("build", [lambda: nn.Conv3d(2, 4, 3), lambda: Subclass(2, 4, 3), lambda: WeightNormed().conv])
@pytest.mark.parametrize("name", ["weight", "bias", "scale"])
def test_a_parametrization_comes_and_goes_after_a_conversion(build: Any, name: str):
    layer = convert(nn.Sequential(build()).eval())[0]
    kind, expected = type(layer), layer(clip())
    is_new = not parametrize.is_parametrized(layer)
    parametrize.register_parametrization(layer, name, Doubled())  # of half the weight; a weight norm's twice has its signs
    for twin in (layer, copy.deepcopy(layer)):
        assert isinstance(twin, QConv3d)
        torch.testing.assert_close(twin(clip()), expected)
    parametrize.remove_parametrizations(layer, name)
    assert parametrize.is_parametrized(layer) or type(layer) is (kind if is_new else QConv3d)
    for twin in (layer, copy.deepcopy(layer)):
        assert isinstance(twin, QConv3d)
        torch.testing.assert_close(twin(clip()), expected)


class Shifted(Functional):
    """Its kernel is a Parameter, and what it adds is parametrized."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(()))
        parametrize.register_parametrization(self, "shift", Doubled())

    def forward(self, x):
        return F.conv3d(x, self.kernel) + self.shift


def test_a_rewritten_module_can_lose_its_parametrization():
    model = Shifted().eval()
    converted = convert(model)
    assert binary_layers(converted) == ["conv3d"]
    expected = converted(clip())
    parametrize.remove_parametrizations(converted, "shift")
    assert type(converted) is not type(model)
    assert isinstance(converted, Shifted)
    assert torch.equal(converted(clip()), expected)
    for twin in copies(converted):
        assert torch.equal(twin(clip()), expected)
    assert parametrize.is_parametrized(model, "shift")
    assert model.shift == 1


def test_a_rewritten_module_can_be_parametrized():
    converted = convert(Functional().eval())
    kind = type(converted)
    parametrize.register_parametrization(converted, "kernel", Doubled())
    expected = converted(clip())
    parametrize.remove_parametrizations(converted, "kernel")
    assert type(converted) is kind
    assert torch.equal(converted(clip()), expected)


def test_a_parametrized_layer_is_pickled_as_torch_has_it():
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(convert(WeightNormed()))
