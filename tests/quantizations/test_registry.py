"""Quantizers by name: unknown names, unknown settings, custom quantizers."""

import re

import pytest
import torch

import qconvert.quantizations
from qconvert.errors import QConvertError, QuantizerError
from qconvert.layers import QConv3d
from qconvert.quantizations import (
    Quantization,
    Sign,
    quantization_from_name,
    quantization_names,
    quantizer,
    register_custom_quantization,
    registry,
)


@pytest.fixture
def own_registry(monkeypatch):
    """A registry that the test may change."""
    monkeypatch.setattr(registry, "_by_name", dict(registry._by_name))


def public_quantizers():
    public = [getattr(qconvert.quantizations, name) for name in qconvert.quantizations.__all__]
    return [cls for cls in public if isinstance(cls, type) and issubclass(cls, Quantization) and cls is not Quantization]


@pytest.mark.parametrize("cls", public_quantizers(), ids=lambda cls: cls.name)
def test_every_public_quantizer_has_its_name(cls):
    assert cls.name in quantization_names()
    assert quantization_from_name(cls.name) is cls
    assert type(quantizer(cls.name)) is cls


def test_unknown_name_lists_the_known_and_suggests_the_nearest():
    with pytest.raises(
        QuantizerError, match=r"^unknown quantizer 'sing'\. Known: identity, sign, .*lsq\. Did you mean 'sign'\?$"
    ):
        quantization_from_name("sing")


def test_unknown_name_without_a_near_one_suggests_nothing():
    with pytest.raises(QuantizerError, match=r"^unknown quantizer 'xyz'\. Known: .*lsq\.$"):
        quantization_from_name("xyz")


@pytest.mark.parametrize("error", [ValueError, QConvertError])
def test_unknown_name_is_caught_as(error):
    with pytest.raises(error, match="iNvAlIdNaMe"):
        quantization_from_name("iNvAlIdNaMe")


def test_a_name_that_is_no_string_is_an_error():
    with pytest.raises(QuantizerError, match=r"^a quantizer is a name or a Quantization module, got 1$"):
        quantizer(1)


def test_a_module_is_taken_as_it_is():
    module = Sign()
    assert quantizer(module) is module


def test_settings_reach_the_constructor():
    assert quantizer("inputdorefa", bits=3).bit_width == 3
    assert quantizer("swishsign", beta=2.0).beta == 2.0
    assert quantizer("lsq", bits=3, signed=False).highest == 7


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("inputdorefa", "bit", "quantizer 'inputdorefa' has no setting 'bit'. Its settings: bits. Did you mean 'bits'?"),
        ("lsq", "colour", "quantizer 'lsq' has no setting 'colour'. Its settings: bits, signed."),
        ("sign", "bits", "quantizer 'sign' has no setting 'bits'. It has no settings."),
    ],
    ids=["near", "far", "none"],
)
def test_unknown_setting(name, setting, message):
    with pytest.raises(QuantizerError, match=f"^{re.escape(message)}$"):
        quantizer(name, **{setting: 1})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("inputdorefa", {"bits": 0}, "inputdorefa: bits must be a whole number from 1 to 16, got 0"),
        ("weightdorefa", {"bits": 17}, "weightdorefa: bits must be a whole number from 1 to 16, got 17"),
        ("lsq", {"bits": 1}, "lsq: bits must be a whole number from 2 to 16, got 1"),
        ("swishsign", {"beta": 0}, "swishsign: beta must be above 0, got 0"),
        ("swishsign", {"beta": float("nan")}, "swishsign: beta must be above 0, got nan"),
        ("progressive_sign", {"alpha": -1}, "progressive_sign: alpha must be above 0, got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_setting_out_of_range(name, settings, message):
    with pytest.raises(QuantizerError, match=f"^{re.escape(message)}$"):
        quantizer(name, **settings)


class Halves(Quantization):
    name = "halves"
    bit_width = 8

    def quantize(self, x):
        return torch.round(2 * x) / 2


@pytest.mark.usefixtures("own_registry")
def test_custom_quantizer_is_found_by_layers():
    register_custom_quantization(Halves)
    register_custom_quantization(Halves)  # a second time, as when a notebook cell runs again
    assert quantization_names()[-1] == "halves"
    layer = QConv3d(1, 1, 1, input_quantization="halves", weight_quantization="halves")
    assert isinstance(layer.activation.activation_function, Halves)
    assert isinstance(layer._weight_quantize, Halves)


@pytest.mark.usefixtures("own_registry")
def test_custom_quantizer_may_be_replaced_by_its_newer_self():
    register_custom_quantization(Halves)
    newer = type("Halves", (Halves,), {})
    register_custom_quantization(newer)
    assert quantization_from_name("halves") is newer


@pytest.mark.usefixtures("own_registry")
def test_bundled_name_cannot_be_taken():
    impostor = type("Impostor", (Quantization,), {"name": "sign"})
    with pytest.raises(QuantizerError, match=r"^the name 'sign' belongs to qconvert's own Sign$"):
        register_custom_quantization(impostor)
    assert quantization_from_name("sign") is Sign


@pytest.mark.usefixtures("own_registry")
@pytest.mark.parametrize("thing", [Sign(), torch.nn.ReLU, "sign"], ids=["instance", "other class", "name"])
def test_only_subclasses_can_be_registered(thing):
    with pytest.raises(QuantizerError, match=r"^a custom quantizer must be a subclass of Quantization, got "):
        register_custom_quantization(thing)
