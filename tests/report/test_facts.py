"""The facts against arithmetic on paper: bits, calls and MACs of every kind of layer, and what cannot be counted."""

import copy
import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from models import (
    DeadConv,
    FunctionalConv,
    KeywordOnly,
    MutatedBuffers,
    NeedsValues,
    SharedModule,
    TiedParameter,
    TwoConvs,
    Unbatched,
    WeightNormed,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import qconvert

CLIP = (1, 2, 4, 6, 6)
# MACs = outputs x (inputs of one output); the shapes of TwoConvs on CLIP, by hand
FIRST = (8 * 4 * 6 * 6) * (2 * 27)
SECOND = (4 * 2 * 3 * 3) * (8 * 9)
HEAD = 3 * 4
# Parameters: weights, then the bias where there is one
FIRST_PARAMETERS = 8 * 2 * 27 + 8
SECOND_WEIGHTS = 4 * 8 * 9
NORM_PARAMETERS = 8 + 8
HEAD_PARAMETERS = 3 * 4 + 3
NORM_BUFFER_BITS = 32 * (8 + 8) + 64  # mean and variance, and the number of batches as an int64


def _profiled(model: nn.Module, inputs: Any = None) -> dict[str, dict[str, Any]]:
    """The layers of a profile by name."""
    return {layer["name"]: layer for layer in qconvert.profile(model, inputs).to_dict()["layers"]}


def _converted(weight: Any, inputs: Any, model: nn.Module | None = None) -> nn.Module:
    """TwoConvs with its second convolution converted."""
    rules = {"rule": [{"layers": "second", "weight": weight, "input": inputs}]}
    return qconvert.binarize(model or TwoConvs(), rules, report=False)


class TestFloatModel:
    def test_every_layer_holds_what_arithmetic_says(self):
        layers = _profiled(TwoConvs(), torch.zeros(CLIP))
        assert list(layers) == ["first", "norm", "second", "head"]
        assert {name: layer["parameters"] for name, layer in layers.items()} == {
            "first": FIRST_PARAMETERS,
            "norm": NORM_PARAMETERS,
            "second": SECOND_WEIGHTS,
            "head": HEAD_PARAMETERS,
        }
        assert all(layer["parameter_bits"] == 32 * layer["parameters"] for layer in layers.values())
        assert [layer["buffer_bits"] for layer in layers.values()] == [0, NORM_BUFFER_BITS, 0, 0]

    def test_every_layer_computes_what_arithmetic_says(self):
        layers = _profiled(TwoConvs(), torch.zeros(CLIP))
        assert [layer["macs"] for layer in layers.values()] == [FIRST, 0, SECOND, HEAD]
        assert [layer["flops"] for layer in layers.values()] == [2 * FIRST, 0, 2 * SECOND, 2 * HEAD]
        assert [layer["bops"] for layer in layers.values()] == [0] * 4
        assert [layer["calls"] for layer in layers.values()] == [1] * 4

    def test_shapes_are_those_of_the_layers_tensors(self):
        layers = _profiled(TwoConvs(), torch.zeros(CLIP))
        assert (layers["second"]["input_shape"], layers["second"]["output_shape"]) == ((1, 8, 4, 6, 6), (1, 4, 2, 3, 3))
        assert (layers["head"]["input_shape"], layers["head"]["output_shape"]) == ((1, 4), (1, 3))

    def test_operations_grow_with_the_batch_and_bits_do_not(self):
        one = qconvert.profile(TwoConvs(), torch.zeros(CLIP)).totals
        three = qconvert.profile(TwoConvs(), torch.zeros(3, *CLIP[1:])).totals
        assert three.macs == 3 * one.macs == 3 * (FIRST + SECOND + HEAD)
        assert three.parameter_bits == one.parameter_bits

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_bits_are_those_of_the_dtype(self, dtype: torch.dtype):
        width = torch.finfo(dtype).bits
        layers = _profiled(TwoConvs().to(dtype), torch.zeros(CLIP, dtype=dtype))
        assert layers["first"]["parameter_bits"] == width * FIRST_PARAMETERS
        assert layers["norm"]["buffer_bits"] == width * (8 + 8) + 64  # the counter is an integer in every model
        assert layers["second"]["precision"] == f"W{width}A{width}"
        assert layers["second"]["flops"] == 2 * SECOND

    @pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
    def test_groups_divide_the_macs(self, groups: int):
        conv = nn.Conv3d(4, 8, 3, groups=groups, dilation=(1, 2, 1), padding=1)
        # the dilated kernel spans 5 along H: 6 + 2 - 4 = 4 positions
        assert _profiled(conv, torch.zeros(1, 4, 4, 6, 6))[""]["macs"] == (8 * 4 * 4 * 6) * (4 // groups * 27)

    def test_transposed_convolution_multiplies_every_input_value(self):
        conv = nn.ConvTranspose3d(3, 5, 2, stride=2)
        assert _profiled(conv, torch.zeros(1, 3, 2, 2, 2))[""]["macs"] == (3 * 2 * 2 * 2) * (5 * 8)

    def test_unbatched_input_is_one_clip(self):
        assert _profiled(nn.Conv3d(2, 3, 1), torch.zeros(CLIP[1:]))[""]["macs"] == (3 * 4 * 6 * 6) * 2

    def test_buffers_that_no_checkpoint_holds_are_not_counted(self):
        layers = _profiled(MutatedBuffers())
        assert layers[""]["buffer_bits"] == 64  # `steps`; `level` is not persistent
        assert "level" not in MutatedBuffers().state_dict()


class TestPrecisions:
    """The second convolution of TwoConvs, converted in every way that counts differently."""

    @pytest.mark.parametrize(
        ("weight", "inputs", "precision", "bits", "flops", "bops"),
        [
            pytest.param("sign", "sign", "W1A1", 1, 0, 2 * SECOND, id="W1A1"),
            # float inputs: the weights are small, the work is the same
            pytest.param("sign", "identity", "W1A32", 1, 2 * SECOND, 0, id="W1A32"),
            pytest.param("identity", "sign", "W32A1", 32, 2 * SECOND, 0, id="W32A1"),
            # a ternary weight is stored in 2 bits
            pytest.param("ternary", "sign", "W2A1", 2, 0, 2 * 2 * 1 * SECOND, id="ternary"),
            pytest.param("ternary", "identity", "W2A32", 2, 2 * SECOND, 0, id="ternary weights only"),
            pytest.param(
                {"quantizer": "weightdorefa", "bits": 4},
                {"quantizer": "inputdorefa", "bits": 4},
                "W4A4",
                4,
                0,
                2 * 4 * 4 * SECOND,
                id="W4A4",
            ),
            pytest.param(
                {"quantizer": "weightdorefa", "bits": 8},
                {"quantizer": "inputdorefa", "bits": 2},
                "W8A2",
                8,
                0,
                2 * 8 * 2 * SECOND,
                id="W8A2",
            ),
            # more than 8 bits on one side is no bit operation any more
            pytest.param(
                {"quantizer": "weightdorefa", "bits": 4},
                {"quantizer": "inputdorefa", "bits": 9},
                "W4A9",
                4,
                2 * SECOND,
                0,
                id="W4A9 is float",
            ),
        ],
    )
    def test_layer_counts(self, weight: Any, inputs: Any, precision: str, bits: int, flops: int, bops: int):
        layer = _profiled(_converted(weight, inputs), torch.zeros(CLIP))["second"]
        assert layer["precision"] == precision
        assert (layer["parameters"], layer["parameter_bits"]) == (SECOND_WEIGHTS, bits * SECOND_WEIGHTS)
        assert (layer["macs"], layer["flops"], layer["bops"]) == (SECOND, flops, bops)

    def test_the_other_layers_keep_their_counts(self):
        before = _profiled(TwoConvs(), torch.zeros(CLIP))
        after = _profiled(_converted("sign", "sign"), torch.zeros(CLIP))
        assert {name: before[name] for name in ("first", "norm", "head")} == {
            name: after[name] for name in ("first", "norm", "head")
        }

    def test_totals_of_a_binary_conversion(self):
        totals = qconvert.profile(_converted("sign", "sign"), torch.zeros(CLIP)).to_dict()["totals"]
        floats = FIRST_PARAMETERS + NORM_PARAMETERS + HEAD_PARAMETERS
        assert totals["parameters"] == floats + SECOND_WEIGHTS
        assert totals["parameter_bits"] == 32 * floats + SECOND_WEIGHTS
        assert totals["buffer_bits"] == NORM_BUFFER_BITS
        assert totals["macs"] == FIRST + SECOND + HEAD
        assert totals["float_macs"] == FIRST + HEAD
        assert totals["flops"] == 2 * (FIRST + HEAD)
        assert totals["bops"] == 2 * SECOND
        assert totals["ops"] == 2 * (FIRST + HEAD) + 2 * SECOND / 64
        assert totals["macs_by_precision"] == {"W32A32": FIRST + HEAD, "W1A1": SECOND}

    def test_learned_scale_and_threshold_are_counted_as_floats(self):
        weight, inputs = {"quantizer": "sign", "scale": "channel"}, {"quantizer": "sign", "threshold": "channel"}
        layer = _profiled(_converted(weight, inputs), torch.zeros(CLIP))["second"]
        scales, offsets, thresholds, spreads = 4, 4, 8, 8  # one for each output channel, one for each input channel
        assert layer["parameters"] == SECOND_WEIGHTS + scales + offsets + thresholds
        assert layer["parameter_bits"] == SECOND_WEIGHTS + 32 * (scales + offsets + thresholds)
        assert layer["buffer_bits"] == 32 * spreads

    def test_learned_steps_are_counted_as_floats(self):
        lsq = {"quantizer": "lsq", "bits": 3}
        layer = _profiled(_converted(lsq, lsq), torch.zeros(CLIP))["second"]
        assert layer["parameters"] == SECOND_WEIGHTS + 1 + 1  # a step for the weight and one for the input
        assert layer["parameter_bits"] == 3 * SECOND_WEIGHTS + 32 * 2

    def test_bias_stays_float(self):
        model = qconvert.binarize(TwoConvs(), {"rule": [{"layers": "first", "weight": "sign"}]}, report=False)
        assert _profiled(model)["first"]["parameter_bits"] == 8 * 2 * 27 + 32 * 8

    def test_identity_in_a_bfloat16_model_has_16_bits(self):
        model = _converted("sign", "identity", TwoConvs().bfloat16())
        layer = _profiled(model, torch.zeros(CLIP, dtype=torch.bfloat16))["second"]
        assert (layer["precision"], layer["parameter_bits"]) == ("W1A16", SECOND_WEIGHTS)

    def test_weight_computed_from_other_parameters_is_counted_as_those(self):
        layers = _profiled(qconvert.binarize(WeightNormed(), "bitorch", report=False))
        # magnitude (4), direction (4 x 2 x 27) and bias (4) are floats, whatever becomes of their product
        assert layers["conv"]["parameters"] == 4 + 4 * 2 * 27 + 4
        assert layers["plain"]["parameter_bits"] == 4 * 4 * 27 + 32 * 4


class TestSharing:
    def test_shared_module_is_one_layer_with_two_calls(self):
        layers = _profiled(SharedModule(), torch.zeros(CLIP))
        assert list(layers) == ["conv"]
        assert layers["conv"]["calls"] == 2
        assert layers["conv"]["parameters"] == 2 * 2 * 27 + 2
        assert layers["conv"]["macs"] == 2 * (2 * 4 * 6 * 6) * (2 * 27)

    def test_macs_are_counted_per_call(self):
        layers = _profiled(Unbatched(), torch.zeros(3, *CLIP[1:]))
        assert layers["conv"]["calls"] == 3
        assert layers["conv"]["macs"] == 3 * (4 * 4 * 6 * 6) * (2 * 27)

    def test_tied_parameter_is_counted_at_the_first_layer(self):
        profile = qconvert.profile(TiedParameter(), torch.zeros(CLIP))
        layers = {layer.name: layer for layer in profile.layers}
        weights, biases = 2 * 2 * 27, 2
        assert (layers["encode"].parameters, layers["decode"].parameters) == (weights + biases, biases)
        assert profile.totals.parameters == sum(p.numel() for p in TiedParameter().parameters()) == weights + 2 * biases
        assert layers["encode"].macs == layers["decode"].macs == (2 * 4 * 6 * 6) * (2 * 27)

    def test_tied_parameter_of_a_float_layer_cannot_be_stored_in_one_bit(self):
        rules = {"rule": [{"layers": "encode", "weight": "sign", "input": "sign"}]}
        totals = qconvert.profile(qconvert.binarize(TiedParameter(), rules, report=False)).totals
        assert totals.parameter_bits == 32 * (2 * 2 * 27 + 2 + 2)

    def test_tied_parameter_of_two_binary_layers_is_stored_once_in_one_bit(self):
        totals = qconvert.profile(qconvert.binarize(TiedParameter(), "bitorch", report=False)).totals
        assert totals.parameter_bits == 2 * 2 * 27 + 32 * (2 + 2)


class Owner(nn.Module):
    """Computes with Parameters of its own, by functions."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 2, 1, 1, 1))
        self.matrix = nn.Parameter(torch.randn(36, 5))

    def forward(self, x):
        x = F.conv3d(x, self.kernel).flatten(3)  # N x 3 x 4 x 36
        return F.scaled_dot_product_attention(x, x, x) @ self.matrix


class TestFunctions:
    def test_macs_of_functions_belong_to_the_module_that_calls_them(self):
        layers = _profiled(nn.Sequential(nn.Conv3d(2, 2, 1), Owner()), torch.zeros(CLIP))
        convolution = (3 * 4 * 6 * 6) * 2
        attention = 2 * 3 * 4 * 4 * 36  # 3 heads, 4 tokens: queries by keys, then by values
        product = (3 * 4 * 5) * 36
        assert layers["1"]["type"] == "Owner"
        assert layers["1"]["macs"] == convolution + attention + product
        assert layers["0"]["macs"] == (2 * 4 * 6 * 6) * 2
        assert qconvert.profile(Owner(), torch.zeros(CLIP)).totals.macs == layers["1"]["macs"]

    def test_functions_of_a_module_without_weight_are_float(self):
        profile = qconvert.profile(FunctionalConv(), torch.zeros(CLIP))
        functional = (3 * 4 * 6 * 6) * 4
        assert profile.totals.macs_by_precision == {"float": functional, "W32A32": (4 * 4 * 6 * 6) * (2 * 27)}
        assert next(layer for layer in profile.layers if layer.name == "").flops == 2 * functional

    @pytest.mark.parametrize("mode", ["separate", "self"])  # torch has a fused operator for self-attention in eval mode
    def test_multihead_attention_is_counted(self, mode: str):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                return self.attend(x, x if mode == "self" else x + 1, x, need_weights=False)[0]

        projections = 4 * 7 * 8 * 8  # query, key, value and output of 7 tokens
        attention = 2 * 2 * 7 * 7 * 4  # 2 heads of 4 channels: queries by keys, then by values
        profile = qconvert.profile(Attention(), torch.zeros(1, 7, 8))
        assert profile.totals.macs == projections + attention


class TestUncounted:
    def test_layer_that_is_never_called_is_listed(self):
        profile = qconvert.profile(DeadConv(), torch.zeros(CLIP))
        unused = next(layer for layer in profile.layers if layer.name == "unused")
        assert (unused.calls, unused.macs, unused.parameters) == (0, 0, 4 * 2 * 27 + 4)
        assert [(e.name, e.calls, e.reason) for e in profile.uncounted if not e.calls] == [("unused", 0, "never called")]
        assert "Never called, so without operations: unused." in profile.to_text()

    def test_operator_without_formula_is_listed_with_its_calls(self):
        class Spectrum(nn.Conv3d):
            def forward(self, x):
                return torch.fft.fftn(super().forward(x)).real.view(-1), torch.fft.fftn(x)

        profile = qconvert.profile(Spectrum(2, 2, 1), torch.zeros(CLIP))
        listed = {entry.name: entry.calls for entry in profile.uncounted}
        assert listed["aten._fft_c2c"] == 2
        assert not [name for name in listed if "view" in name or "convolution" in name]  # a view computes nothing
        assert "aten._fft_c2c x2" in profile.to_text()

    def test_every_operator_is_counted_or_listed_in_a_model_that_has_only_those(self):
        assert not qconvert.profile(nn.Conv3d(2, 2, 1), torch.zeros(CLIP)).uncounted


class TestWithoutInputs:
    def test_bits_are_known_and_operations_are_none(self):
        profile = qconvert.profile(TwoConvs())
        totals = profile.to_dict()["totals"]
        assert totals["parameters"] == FIRST_PARAMETERS + NORM_PARAMETERS + SECOND_WEIGHTS + HEAD_PARAMETERS
        assert totals["parameter_bits"] == 32 * totals["parameters"]
        assert [totals[key] for key in ("macs", "float_macs", "flops", "bops", "ops")] == [None] * 5
        for layer in profile.to_dict()["layers"]:
            assert [layer[key] for key in ("calls", "macs", "flops", "bops", "input_shape")] == [None] * 5
        assert not profile.uncounted

    @pytest.mark.parametrize("form", ["to_text", "to_markdown", "to_html"])
    def test_the_report_says_how_to_get_them(self, form: str):
        model = TwoConvs()
        for report in (qconvert.profile(model), qconvert.compare(model, _converted("sign", "sign"))):
            assert "pass example_inputs" in getattr(report, form)()
            assert "1 MAC =" not in getattr(report, form)()


class TestInputs:
    def test_tuple_holds_the_arguments(self):
        class Two(nn.Conv3d):
            def forward(self, left, right):
                return super().forward(left + right)

        assert _profiled(Two(2, 2, 1), (torch.zeros(CLIP), torch.zeros(CLIP)))[""]["macs"] == (2 * 4 * 6 * 6) * 2

    def test_dict_holds_the_keyword_arguments(self):
        assert _profiled(KeywordOnly(), {"clip": torch.zeros(CLIP)})["conv"]["calls"] == 1

    def test_list_is_one_argument(self):
        class FromList(nn.Conv3d):
            def forward(self, clips):
                return super().forward(torch.cat(clips))

        clips = [torch.zeros(CLIP)] * 2
        assert _profiled(FromList(2, 2, 1), clips)[""]["input_shape"] == CLIP
        assert _profiled(FromList(2, 2, 1), clips)[""]["macs"] == 2 * (2 * 4 * 6 * 6) * 2

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            pytest.param(
                torch.zeros(1, 3, 4, 6, 6),
                r"TwoConvs does not run on the example input \(1, 3, 4, 6, 6\) torch\.float32: RuntimeError: .*2 channels",
                id="channels",
            ),
            pytest.param(
                torch.zeros(1, 2, 4),
                r"TwoConvs does not run on the example input \(1, 2, 4\) torch\.float32: RuntimeError: .*input of size",
                id="rank",
            ),
            pytest.param(
                torch.zeros(CLIP, dtype=torch.int64),
                r"TwoConvs does not run on the example input \(1, 2, 4, 6, 6\) torch\.int64: RuntimeError: ",
                id="dtype",
            ),
            pytest.param(
                (torch.zeros(CLIP), torch.zeros(2)),
                r"the example input \(\(1, 2, 4, 6, 6\) torch\.float32, \(2,\) torch\.float32\): TypeError: ",
                id="number of arguments",
            ),
            pytest.param({"clip": 3}, r"does not run on the example input \{'clip': 3\}: TypeError: ", id="keyword"),
        ],
    )
    def test_input_that_does_not_fit(self, inputs: Any, message: str):
        advice = r".* Pass example_inputs that fit: a tensor, a tuple of arguments or a dict of keyword arguments$"
        with pytest.raises(qconvert.InputError, match=f"(?s)^.*{message}{advice}"):
            qconvert.profile(TwoConvs(), inputs)

    def test_forward_that_raises(self):
        class Broken(TwoConvs):
            def forward(self, x):
                raise KeyError("no such head\nsecond line")

        with pytest.raises(qconvert.InputError, match=r"Broken does not run .*: KeyError: ") as caught:
            qconvert.profile(Broken(), torch.zeros(CLIP))
        assert isinstance(caught.value.__cause__, KeyError)

    def test_compare_says_which_model_does_not_run(self):
        class Broken(TwoConvs):
            def forward(self, x):
                raise KeyError("no such head")

        with pytest.raises(qconvert.InputError, match=r"^Broken does not run"):
            qconvert.compare(TwoConvs(), Broken(), torch.zeros(CLIP))


class Seen(nn.Module):
    """Keeps the types of what it is called with, where a copy of the model keeps them too."""

    types: ClassVar[list[type]] = []

    def forward(self, x):
        self.types.append(type(x))
        return x


class KeepsTensors(nn.Module):
    """Has tensors in a list (as MONAI's DynUNet does)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 1)
        self.heads = [torch.rand(1)]

    def forward(self, x):
        self.heads[0] = self.conv(x)
        return self.heads[0]


class TestRunOnShapes:
    """A model is run for real only if it reads values: a clip of full size is gigabytes, and seconds."""

    @pytest.mark.parametrize(
        "model",
        [
            pytest.param(lambda: nn.Conv3d(2, 2, 1), id="convolution"),
            pytest.param(TwoConvs, id="batchnorm"),
            pytest.param(lambda: _converted("sign", "sign"), id="converted"),
            pytest.param(KeepsTensors, id="tensors in a list"),
            pytest.param(MutatedBuffers, id="writes to buffers"),
        ],
    )
    def test_once(self, model: Callable[[], nn.Module]):
        Seen.types.clear()
        qconvert.profile(nn.Sequential(Seen(), model()), torch.zeros(CLIP))
        assert Seen.types == [FakeTensor]

    def test_model_that_reads_values_is_run_for_real(self):
        Seen.types.clear()
        qconvert.profile(nn.Sequential(Seen(), NeedsValues()), torch.zeros(CLIP))
        assert Seen.types == [FakeTensor, torch.Tensor]


class TestRealRun:
    """Where shapes alone do not run the model, it runs for real, on a copy."""

    def test_counts_are_the_same(self):
        wanted = [(layer.name, layer.calls, layer.macs) for layer in qconvert.profile(TwoConvs(), torch.zeros(CLIP)).layers]
        got = [(layer.name, layer.calls, layer.macs) for layer in qconvert.profile(NeedsValues(), torch.zeros(CLIP)).layers]
        assert got == wanted

    def test_first_attempt_leaves_nothing_behind(self):
        """The run on shapes fails half way, after some layers have run: their calls must not be counted twice."""

        class Late(TwoConvs):
            def forward(self, x):
                y = super().forward(x)
                return y if y.sum().item() > 0 else -y

        layers = _profiled(Late(), torch.zeros(CLIP))
        assert [layers[name]["calls"] for name in ("first", "second", "head")] == [1] * 3
        assert [layers[name]["macs"] for name in ("first", "second", "head")] == [FIRST, SECOND, HEAD]

    def test_layer_that_raises_inside_its_owner_is_left_behind(self):
        """An exception that the forward catches: what runs afterwards belongs to the owner again."""

        class Raises(nn.Conv3d):
            def forward(self, x):
                super().forward(x)
                raise ValueError("caught by the owner")

        class Catches(nn.Module):
            def __init__(self):
                super().__init__()
                self.fragile = Raises(2, 2, 1)
                self.kernel = nn.Parameter(torch.zeros(3, 2, 1, 1, 1))

            def forward(self, x):
                try:
                    return self.fragile(x)
                except ValueError:
                    return F.conv3d(x, self.kernel)

        layers = _profiled(Catches(), torch.zeros(CLIP))
        assert (layers["fragile"]["macs"], layers[""]["macs"]) == ((2 * 4 * 6 * 6) * 2, (3 * 4 * 6 * 6) * 2)


class Draws(TwoConvs):
    """Draws random numbers whenever it runs, and keeps what it has seen on itself."""

    def __init__(self, needs_values: bool):
        super().__init__()
        self.needs_values = needs_values
        self.history = []
        self.seen = 0

    def forward(self, x):
        noise = random.random() * torch.rand_like(x) + torch.randn(())  # noqa: S311 (a model's own draw)
        self.history.append(x)
        self.seen += 1
        if self.needs_values:
            noise = noise * x.sum().item()
        return super().forward(x + noise)


def _add(level: torch.Tensor):
    level += 1


def _multiply_data(level: torch.Tensor):
    level.data.mul_(2)


def _copy(level: torch.Tensor):
    level.copy_(torch.zeros(3))


def _assign_item(level: torch.Tensor):
    level[0] = 5


def _assign_data(level: torch.Tensor):
    level.data = level.data * 0.5


def _write_through_view(level: torch.Tensor):
    level.view(-1).add_(1)


RUNS = pytest.mark.parametrize("needs_values", [False, True], ids=["on shapes", "for real"])


class TestNothingIsChanged:
    @RUNS
    @pytest.mark.parametrize("converted", [False, True], ids=["float", "converted"])
    def test_model(self, needs_values: bool, converted: bool):
        model = Draws(needs_values)
        if converted:
            model = _converted("sign", {"quantizer": "sign", "threshold": "channel"}, model)
        model.train()
        model.norm.eval()  # mixed modes, as in a model whose BatchNorm is frozen
        state = copy.deepcopy(model.state_dict())
        attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
        modes = {name: module.training for name, module in model.named_modules()}
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]

        qconvert.profile(model, torch.ones(CLIP))
        qconvert.compare(model, model, torch.ones(CLIP))

        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
        assert model.history == []
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        for name, module in model.named_modules():
            assert vars(module).keys() == attributes[name].keys()
            assert all(vars(module)[key] is value for key, value in attributes[name].items())
        assert all(parameter.grad is None for parameter in model.parameters())

    @RUNS
    @pytest.mark.parametrize("kind", ["buffer", "parameter", "attribute"])
    @pytest.mark.parametrize(
        "write",
        [
            pytest.param(_add, id="add"),
            pytest.param(_multiply_data, id="multiply data"),
            pytest.param(_copy, id="copy"),
            pytest.param(_assign_item, id="assign item"),
            pytest.param(_assign_data, id="assign data"),
            pytest.param(_write_through_view, id="write through view"),
        ],
    )
    def test_tensor_that_the_forward_writes_to(self, write: Callable[[torch.Tensor], None], kind: str, needs_values: bool):
        class Writes(NeedsValues if needs_values else TwoConvs):
            def forward(self, x):
                write(self.level)
                return super().forward(x)

        model = Writes()
        level = torch.arange(1.0, 4.0)
        if kind == "buffer":
            model.register_buffer("level", level)
        else:
            model.level = level if kind == "attribute" else nn.Parameter(level)

        qconvert.profile(model, torch.ones(CLIP))

        assert model.level.tolist() == [1.0, 2.0, 3.0]

    @RUNS
    def test_torchs_random_generator(self, needs_values: bool):
        model = Draws(needs_values)
        before = torch.get_rng_state()
        qconvert.profile(model, torch.ones(CLIP))
        assert torch.equal(torch.get_rng_state(), before)

    @RUNS
    def test_pythons_random_generator(self, needs_values: bool):
        model = Draws(needs_values)
        before = random.getstate()
        qconvert.profile(model, torch.ones(CLIP))
        assert random.getstate() == before

    @RUNS
    def test_gradient_mode_and_default_dtype(self, needs_values: bool):
        qconvert.profile(Draws(needs_values), torch.ones(CLIP))
        assert torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float32
        assert isinstance(torch.zeros(1).sum().item(), float)  # no fake mode is left on

    @RUNS
    def test_example_input(self, needs_values: bool):
        """A forward may write into the list, and the tensors, that it is given (SlowFast does)."""

        class Overwrites(nn.Conv3d):
            def forward(self, clips):
                clips[0].add_(1)
                if needs_values:
                    clips[0].mul_(clips[0].sum().item())
                clips[1] = super().forward(clips[0])
                return clips

        clips = [torch.zeros(CLIP), torch.ones(2)]
        kept = list(clips)
        qconvert.profile(Overwrites(2, 2, 1), clips)
        assert clips[0] is kept[0]
        assert clips[1] is kept[1]
        assert not clips[0].any()

    def test_failed_run(self):
        class Broken(Draws):
            def forward(self, x):
                super().forward(x)
                raise KeyError("after all of that")

        model = Broken(needs_values=True).train()
        before = torch.get_rng_state()
        with pytest.raises(qconvert.InputError):
            qconvert.profile(model, torch.ones(CLIP))
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training
        assert not model._forward_hooks
        assert model.history == []
