"""`from_float`: the layer takes over everything that the float convolution had, and leaves it as it was."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import nn
from torch.nn.utils import prune
from torchvision.models.video.resnet import Conv3DSimple

import qconvert
from qconvert.errors import ModelError, QuantizerError
from qconvert.layers import QConv3d, QConv3d_NoAct
from qconvert.layers.subclass import quantized_class

BOTH = pytest.mark.parametrize("cls", [QConv3d, QConv3d_NoAct])
GEOMETRY = {"stride": (1, 2, 1), "padding": (0, 1, 2), "dilation": (1, 1, 2), "groups": 2, "padding_mode": "circular"}
FLOAT = {"input_quantization": "identity", "weight_quantization": "identity", "gradient_cancellation_threshold": None}
X = torch.randn(1, 2, 5, 6, 7, generator=torch.Generator().manual_seed(1))


class EndsInSuper(nn.Conv3d):
    """As diffusers' causal convolutions: pads the past by hand, then calls Conv3d's forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.past = {"frames": 2}

    def forward(self, x):
        return super().forward(F.pad(x, (0, 0, 0, 0, self.past["frames"], 0)))


class CallsConvForward(nn.Conv3d):
    """As a weight-standardizing convolution: makes another weight, then calls _conv_forward."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class HasOwnScale(nn.Conv3d):
    """Its attribute has the name of one of the layer's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = 2.0

    def forward(self, x):
        return self.scale * super().forward(x)


class HasOwnActivation(nn.Conv3d):
    """Its module has the name of one of the layer's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(super().forward(x))


class ExtendsConvForward(nn.Conv3d):
    """As `CallsConvForward`, and with methods that QConv3d has too: the subclass's come first."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)

    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self):
        return "mine"


SUBCLASSES = {
    "Conv3DSimple": lambda: Conv3DSimple(2, 4),
    "EndsInSuper": lambda: EndsInSuper(2, 4, 3),
    "CallsConvForward": lambda: CallsConvForward(2, 4, 3),
    "ExtendsConvForward": lambda: ExtendsConvForward(2, 4, 3),
}
every_subclass = pytest.mark.parametrize("subclass", SUBCLASSES)


# --- taken over ---


@BOTH
def test_same_parameter_objects(cls):
    conv = nn.Conv3d(2, 4, 3)
    layer = cls.from_float(conv)
    assert type(layer) is cls
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias


def test_arguments_of_the_convolution():
    conv = nn.Conv3d(2, 4, (1, 2, 3), **GEOMETRY)
    layer = QConv3d.from_float(conv)
    for name in (*nn.Conv3d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
        assert getattr(layer, name) == getattr(conv, name)


def test_optimizer_built_before_trains_the_layer():
    conv = nn.Conv3d(2, 4, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    layer = QConv3d.from_float(conv)
    before = layer.weight.detach().clone()
    layer(X).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


@BOTH
def test_same_state_dict_keys(cls):
    conv = nn.Conv3d(2, 4, 3)
    conv.register_buffer("steps", torch.tensor(3))
    conv.register_buffer("cache", torch.tensor(4), persistent=False)
    layer = cls.from_float(conv)
    assert list(layer.state_dict()) == list(conv.state_dict()) == ["weight", "bias", "steps"]
    assert layer.steps is conv.steps
    assert layer.cache is conv.cache


def test_keys_added_for_what_is_learned_beside_the_weight():
    conv = nn.Conv3d(2, 4, 3, bias=False)
    layer = QConv3d.from_float(conv, threshold=0.0, scale="channel", weight_quantization="lsq")
    assert set(layer.state_dict()) == {"weight", "scale", "_weight_quantize.step", "activation.threshold"}


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad(requires_grad):
    conv = nn.Conv3d(2, 4, 3).requires_grad_(requires_grad)
    layer = QConv3d.from_float(conv)
    assert layer.weight.requires_grad is layer.bias.requires_grad is requires_grad


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_flag(training):
    assert QConv3d.from_float(nn.Conv3d(2, 4, 3).train(training)).training is training


@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
def test_training_flag_of_the_quantizers(training):
    layer = QConv3d.from_float(nn.Conv3d(2, 4, 3).train(training), weight_quantization="progressive_sign")
    assert {module.training for module in layer.modules()} == {training}


def test_hooks_fire():
    conv, calls = nn.Conv3d(2, 4, 3), []
    conv.register_forward_pre_hook(lambda module, args: calls.append("before"))
    conv.register_forward_hook(lambda module, args, output: calls.append("after"))
    conv.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
    layer = QConv3d.from_float(conv)
    layer(X.clone().requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]


def test_hook_on_the_weight_fires():
    conv, calls = nn.Conv3d(2, 4, 3), []
    conv.weight.register_hook(lambda gradient: calls.append(gradient.shape))
    QConv3d.from_float(conv)(X).sum().backward()
    assert calls == [conv.weight.shape]


def test_own_attributes():
    conv = nn.Conv3d(2, 4, 3)
    conv.note = "kept"
    assert QConv3d.from_float(conv).note == "kept"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtype(dtype):
    layer = QConv3d.from_float(nn.Conv3d(2, 4, 3, dtype=dtype), threshold=0.5, scale="channel", weight_quantization="lsq")
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}


def test_meta_device():
    conv = nn.Conv3d(2, 4, 3, device="meta")
    settings = {"threshold": 0.5, "scale": "channel", "weight_quantization": "lsq", "input_quantization": "lsq"}
    layer = QConv3d.from_float(conv, **settings)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer(X.to("meta")).shape == (1, 4, 3, 4, 5)


def test_settings_are_those_of_the_constructor():
    layer = QConv3d.from_float(nn.Conv3d(2, 4, 3), pad_value=0.5, gradient_cancellation_threshold=2.0, threshold=0.25)
    assert layer.pad_value == 0.5
    assert layer.activation.gradient_cancellation_threshold == 2.0
    assert layer.activation.threshold.tolist() == [0.25, 0.25]
    with pytest.raises(QuantizerError, match=r"^unknown quantizer 'sgn'"):
        QConv3d.from_float(nn.Conv3d(2, 4, 3), weight_quantization="sgn")


# --- and nothing else happens ---


def test_nothing_is_initialized(monkeypatch):
    conv = nn.Conv3d(2, 4, 3)

    def refuse(*_, **__):
        raise AssertionError("from_float initialized a tensor")

    for name in [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]:
        monkeypatch.setattr(nn.init, name, refuse)
    with pytest.raises(AssertionError, match="initialized"):  # so the next line can fail
        nn.Conv3d(2, 4, 3)
    assert torch.equal(QConv3d.from_float(conv, scale="channel", threshold=0.0).weight, conv.weight)


def test_random_state_is_not_touched():
    conv = nn.Conv3d(2, 4, 3)
    before = torch.get_rng_state()
    QConv3d.from_float(conv, scale="channel", threshold=0.0, weight_quantization="lsq")
    assert torch.equal(torch.get_rng_state(), before)


def snapshot(module):
    """The module's attributes, its dicts and sets by value, everything else by identity."""
    return {key: copy.copy(value) if isinstance(value, dict | set) else value for key, value in vars(module).items()}


def test_original_is_unchanged():
    conv = nn.Conv3d(2, 4, 3)
    conv.register_forward_hook(lambda module, args, output: None)
    before, output = snapshot(conv), conv(X)
    layer = QConv3d.from_float(conv, scale="channel", threshold=0.0)
    layer.register_buffer("steps", torch.tensor(3))
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert type(conv) is nn.Conv3d
    assert snapshot(conv) == before
    assert torch.equal(conv(X), output)


def test_original_is_unchanged_by_buffers_that_are_not_saved():
    conv = nn.Conv3d(2, 4, 3)
    QConv3d.from_float(conv).register_buffer("cache", torch.tensor(3), persistent=False)
    assert conv._non_persistent_buffers_set == set()


def test_original_is_unchanged_by_a_failure():
    conv = nn.Conv3d(2, 4, 3)
    before = snapshot(conv)
    with pytest.raises(QuantizerError):
        QConv3d.from_float(conv, gradient_cancellation_threshold=-1)
    assert snapshot(conv) == before


def test_layer_and_original_are_moved_apart():
    conv = nn.Conv3d(2, 4, 3)
    layer = QConv3d.from_float(conv)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    assert conv.weight.count_nonzero() > 0


# --- subclasses ---


@every_subclass
@BOTH
def test_subclass_is_both(cls, subclass):
    conv = SUBCLASSES[subclass]()
    layer = cls.from_float(conv)
    assert isinstance(layer, type(conv))
    assert isinstance(layer, cls)
    assert type(layer).__name__ == f"Q{subclass}"
    assert layer.weight is conv.weight


@every_subclass
def test_forward_of_the_subclass_stays(subclass):
    conv = SUBCLASSES[subclass]()
    assert torch.equal(QConv3d.from_float(conv, **FLOAT)(X), conv(X))


@every_subclass
def test_weight_and_input_of_the_subclass_are_quantized(subclass):
    conv = SUBCLASSES[subclass]()
    conv.bias = None
    y = QConv3d.from_float(conv, pad_value=-1)(X)
    assert torch.equal(y, y.round())  # sums of +-1
    assert y.unique().numel() > 2


def test_causal_padding_comes_before_the_quantizer():
    # the subclass's own zeros are an input like any other: their sign is +1
    conv = EndsInSuper(2, 4, 3, bias=False)
    past = F.pad(X, (0, 0, 0, 0, 2, 0))
    expected = F.conv3d(torch.where(past < 0, -1.0, 1.0), torch.where(conv.weight < 0, -1.0, 1.0))
    assert torch.equal(QConv3d.from_float(conv)(X), expected)


@pytest.mark.parametrize("subclass", [CallsConvForward, ExtendsConvForward])
def test_weight_made_in_the_forward_is_what_is_quantized(subclass):
    conv = subclass(2, 4, 3, bias=False)
    nn.init.uniform_(conv.weight, 1, 2)  # all positive, until their mean is taken off
    expected = F.conv3d(X, torch.where(conv.weight < conv.weight.mean(), -1.0, 1.0))
    assert torch.equal(QConv3d_NoAct.from_float(conv)(X), expected)


def test_methods_of_the_subclass_come_first():
    layer = QConv3d.from_float(ExtendsConvForward(2, 4, 3))
    nn.init.zeros_(layer.weight)
    layer.reset_parameters()
    assert layer.weight.unique().tolist() == [0.5]
    assert layer.extra_repr() == "mine"


def test_static_method_of_the_subclass_works():
    layer = QConv3d.from_float(Conv3DSimple(2, 4, stride=2))
    assert layer.get_downsample_stride(2) == (2, 2, 2)
    assert type(layer).get_downsample_stride(3) == (3, 3, 3)


def test_dicts_of_the_subclass_are_not_shared():
    conv = EndsInSuper(2, 4, 3)
    QConv3d.from_float(conv).past["frames"] = 0
    assert conv.past == {"frames": 2}


def test_one_class_per_subclass():
    layers = [QConv3d.from_float(Conv3DSimple(2, 4)) for _ in range(2)]
    assert type(layers[0]) is type(layers[1])


def test_class_of_plain_and_of_quantized_layers():
    assert quantized_class(nn.Conv3d, QConv3d) is QConv3d
    assert quantized_class(QConv3d, QConv3d) is QConv3d
    assert quantized_class(QConv3d, QConv3d_NoAct) is QConv3d  # it is one already
    assert quantized_class(QConv3d_NoAct, QConv3d) is QConv3d


@every_subclass
def test_quantizing_again_changes_the_quantizers_only(subclass):
    conv = SUBCLASSES[subclass]()
    once = QConv3d.from_float(conv, scale="channel", threshold=0.5)
    twice = QConv3d.from_float(once, **FLOAT)
    assert type(twice) is type(once)
    assert torch.equal(twice(X), conv(X))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}  # noqa: S301 (our own bytes)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("subclass", [*SUBCLASSES, "Conv3d"])
def test_copies(subclass, copied):
    conv = nn.Conv3d(2, 4, 3) if subclass == "Conv3d" else SUBCLASSES[subclass]()
    layer = QConv3d.from_float(conv, threshold=0.25, scale="channel", weight_quantization="lsq").eval()
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert twin.weight is not layer.weight
    assert twin.training is False
    assert twin.state_dict().keys() == layer.state_dict().keys()
    assert torch.equal(twin(X), layer(X))


@pytest.mark.parametrize(("subclass", "name"), [(HasOwnScale, "scale"), (HasOwnActivation, "activation")])
def test_subclass_whose_attribute_would_be_replaced_is_refused(subclass, name):
    conv = subclass(2, 4, 3)
    with pytest.raises(ModelError, match=f"cannot be quantized: it has attributes of its own named {name}, which"):
        QConv3d.from_float(conv, **FLOAT)
    (decision,) = qconvert.plan(nn.Sequential(conv), "bitorch").decisions
    assert (decision.convert, name in decision.reason) == (False, True)


def test_weight_norm_parametrization():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 4, 3))
    layer = QConv3d.from_float(conv, weight_quantization="ternary")
    layer(X).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert set(gradients) == {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}
    assert all(gradient is not None and gradient.count_nonzero() > 0 for gradient in gradients.values())


class MaskedByLogits(nn.Conv3d):
    """It has a Parameter whose name begins as the weight's do, and which has nothing to do with it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight_mask_logits = nn.Parameter(torch.zeros(4))


class NamedLikeAHooks(nn.Conv3d):
    """It has a Parameter with the name that weight_norm uses, beside a weight of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight_g = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize("subclass", [MaskedByLogits, NamedLikeAHooks])
def test_what_is_added_to_a_frozen_weight_is_frozen_whatever_else_is_trained(subclass):
    conv = subclass(2, 4, 3)
    conv.weight.requires_grad_(requires_grad=False)
    layer = QConv3d.from_float(conv, threshold=0.0, scale="channel", weight_quantization="lsq")
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in conv.named_parameters() if parameter.requires_grad}


def test_a_weight_that_a_hook_computes_does_not_look_elsewhere_either():
    conv = prune.random_unstructured(MaskedByLogits(2, 4, 3), "weight", 0.5)
    conv.weight_orig.requires_grad_(requires_grad=False)
    conv.weight = conv.weight.detach()
    assert not QConv3d.from_float(conv, scale="channel").scale.requires_grad


# --- refused ---


@BOTH
def test_lazy_convolution_without_a_weight(cls):
    message = r"^this LazyConv3d cannot be quantized: no weight yet \(a lazy module\): run the model once"
    with pytest.raises(ModelError, match=message):
        cls.from_float(nn.LazyConv3d(4, 3))


def test_lazy_convolution_that_has_run():
    conv = nn.LazyConv3d(4, 3)
    conv(X)
    assert QConv3d.from_float(conv).weight is conv.weight


@pytest.mark.parametrize(
    "module", [nn.Conv2d(2, 4, 3), nn.ConvTranspose3d(2, 4, 3), "conv"], ids=["2D", "transposed", "string"]
)
def test_only_conv3d(module):
    with pytest.raises(ModelError, match=f"^from_float takes a Conv3d, got {type(module).__name__}$"):
        QConv3d.from_float(module)
