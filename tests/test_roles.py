"""The roles of convolutions, and layers that are no Conv3d: what the decision table says they are."""

import functools
import re
import typing

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from zoo import entry

import qconvert
from qconvert import RuleError, trace
from qconvert.sites import Role, Site
from qconvert.starter import starting_rules

ENDS = {"first", "last", "shortcut"}
HALVES = set(typing.get_args(Role)) - ENDS


def roles(model: nn.Module, among: set[str] = ENDS | HALVES) -> dict[str, set[str]]:
    found = {site.name: site.roles & among for site in trace(model).sites}
    return {name: set(names) for name, names in found.items() if names}


def paired(model: nn.Module) -> dict[str, set[str]]:
    return roles(model, HALVES)


@functools.cache
def sites_of(name: str) -> tuple[Site, ...]:
    return trace(entry(name).build()).sites


def spatial(inputs: int = 2, outputs: int = 2) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, (1, 3, 3), padding=(0, 1, 1))


def temporal(inputs: int = 2, outputs: int = 2) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, (3, 1, 1), padding=(1, 0, 0))


def depthwise(channels: int = 2) -> nn.Conv3d:
    return nn.Conv3d(channels, channels, 3, padding=1, groups=channels)


class Residual(nn.Module):
    def __init__(self, channels, add="+"):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.skip = nn.Conv3d(channels, channels, 1)
        self.add = add

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        match self.add:
            case "+":
                return y + self.skip(x)
            case "+=":
                y += self.skip(x)
                return y
            case "torch.add":
                return torch.add(self.skip(x), y)
            case "add_":
                return y.add_(self.skip(x))


class Between(nn.Module):
    """A spatial and a temporal convolution with something between them."""

    def __init__(self, between):
        super().__init__()
        self.one = spatial()
        self.between = between
        self.other = temporal()
        self.gate = nn.Conv3d(2, 2, 1)
        self.scale = nn.Parameter(torch.ones(2, 1, 1, 1))

    def forward(self, x):
        return self.other(self.between(self, self.one(x)))


class Switch(nn.Module):
    """Which of its parts runs depends on a value: fx cannot follow it."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x) if x.mean() > 0 else x
        return x


@pytest.mark.parametrize("add", ["+", "+=", "torch.add", "add_"])
def test_shortcut_of_every_kind_of_addition(add):
    found = roles(nn.Sequential(nn.Conv3d(1, 4, 1), Residual(4, add), nn.Conv3d(4, 1, 1)))
    assert found == {"0": {"first"}, "1.skip": {"shortcut"}, "2": {"last"}}


def test_a_subtraction_has_no_shortcut():
    class Subtract(Residual):
        def forward(self, x):
            return self.conv2(self.conv1(x)) - self.skip(x)

    assert all("shortcut" not in found for found in roles(Subtract(4)).values())


def test_two_streams_that_meet_are_no_shortcut():
    class TwoStreams(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb = nn.Sequential(nn.Conv3d(3, 4, 1), nn.Conv3d(4, 4, 1))
            self.flow = nn.Conv3d(2, 4, 1)

        def forward(self, rgb, flow):
            return self.rgb(rgb) + self.flow(flow)

    assert roles(TwoStreams()) == {"rgb.0": {"first"}, "rgb.1": {"last"}, "flow": {"first", "last"}}


# The expected names are those that the authors of the models gave; the counts are those of their papers' tables.
@pytest.mark.parametrize(
    ("model", "role", "names", "count"),
    [
        ("torchvision r2plus1d_18", "spatial", r"stem\.0|layer\d\.\d\.conv\d\.0\.0", 1 + 8 * 2),
        ("torchvision r2plus1d_18", "temporal", r"stem\.3|layer\d\.\d\.conv\d\.0\.3", 1 + 8 * 2),
        ("torchvision r2plus1d_18", "pointwise", r"none", 0),
        # TemporalSeparableConv: the stem's two, and two in each of nine inception blocks
        ("torchvision s3d", "spatial", r"features\.[03]\.0\.0|features\.\d+\.branch[12]\.1\.0\.0", 2 + 9 * 2),
        ("torchvision s3d", "temporal", r"features\.[03]\.1\.0|features\.\d+\.branch[12]\.1\.1\.0", 2 + 9 * 2),
        # three stacks of two blocks with four dilations
        ("transnetv2 pretrained", "spatial", r".*\.Conv3D_\d\.layers\.0", 3 * 2 * 4),
        ("transnetv2 pretrained", "temporal", r".*\.Conv3D_\d\.layers\.1", 3 * 2 * 4),
        # time first
        ("pytorchvideo r2plus1d", "temporal", r".*\.conv_b\.conv_t", 3 + 4 + 6 + 3),
        ("pytorchvideo r2plus1d", "spatial", r".*\.conv_b\.conv_xy", 3 + 4 + 6 + 3),
        # with squeeze-and-excitation and Swish behind every other depthwise one; the stem is both kinds of pair
        ("pytorchvideo x3d_s", "depthwise", r".*\.branch2\.conv_b|blocks\.0\.conv\.conv_xy", 3 + 5 + 11 + 7 + 1),
        (
            "pytorchvideo x3d_s",
            "pointwise",
            r".*\.branch2\.conv_c|blocks\.1\.res_blocks\.0\.(branch1_conv|branch2\.conv_a)",
            3 + 5 + 11 + 7 + 2,
        ),
        ("pytorchvideo x3d_s", "spatial", r"blocks\.0\.conv\.conv_t", 1),
        ("pytorchvideo x3d_s", "temporal", r"blocks\.0\.conv\.conv_xy", 1),
        ("pytorchvideo csn", "depthwise", r".*\.conv_b", 3 + 4 + 6 + 3),
        ("pytorchvideo csn", "pointwise", r".*\.conv_c", 3 + 4 + 6 + 3),
        # its BatchNorm is a class of its own, which fx takes apart; the first block has no expansion
        ("timm_3d mobilenetv2", "depthwise", r".*\.conv_dw", 1 + 16),
        ("timm_3d mobilenetv2", "pointwise", r"blocks\.0\.0\.conv_pw|.*\.conv_pwl", 1 + 16),
        ("torchvision r3d_18", "spatial", r"none", 0),
    ],
)
def test_halves_of_the_pairs_of_real_models(model, role, names, count):
    expected = {site.name for site in sites_of(model) if re.fullmatch(names, site.name)}
    assert len(expected) == count
    assert {site.name for site in sites_of(model) if role in site.roles} == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((spatial(), temporal()), {"0": {"spatial"}, "1": {"temporal"}}),
        ((temporal(), spatial()), {"0": {"temporal"}, "1": {"spatial"}}),
        ((depthwise(), nn.Conv3d(2, 4, 1)), {"0": {"depthwise"}, "1": {"pointwise"}}),
        ((nn.Conv3d(2, 2, 1), depthwise()), {}),  # an expansion in front of a depthwise one
        ((nn.Conv3d(2, 2, (1, 3, 3), groups=2), nn.Conv3d(2, 2, 1)), {"0": {"depthwise"}, "1": {"pointwise"}}),
        ((depthwise(), depthwise()), {}),
        ((nn.Conv3d(4, 4, 3, groups=2), nn.Conv3d(4, 4, 1)), {}),  # grouped, but not each channel by itself
        ((nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 1)), {}),  # a single channel is no group
        ((depthwise(), nn.Conv3d(2, 2, 1, groups=2)), {}),  # channels that never meet
        ((nn.Conv3d(2, 2, 1, groups=2), nn.Conv3d(2, 4, 1)), {}),  # a factor per channel
        ((spatial(), spatial()), {}),
        ((spatial(), nn.Conv3d(2, 2, 3)), {}),
        ((nn.Conv3d(2, 2, 3), temporal()), {}),
        ((spatial(), nn.Conv3d(2, 2, 1), temporal()), {}),
        ((spatial(), nn.Conv3d(2, 2, (3, 1, 3))), {}),
        (
            (nn.Conv3d(2, 2, (1, 3, 3), groups=2), nn.Conv3d(2, 2, (3, 1, 1), groups=2), nn.Conv3d(2, 4, 1)),
            {"0": {"spatial"}, "1": {"temporal", "depthwise"}, "2": {"pointwise"}},
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_pairs_by_shape_and_order(layers, expected):
    assert paired(nn.Sequential(*layers)) == expected


@pytest.mark.parametrize(
    "between",
    [
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm3d(2),
        nn.GroupNorm(1, 2),
        nn.ReLU(),
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.ELU(),
        nn.GELU(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Mish(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Hardtanh(),
        nn.Softplus(),
        nn.Dropout3d(),
        nn.AlphaDropout(),
        nn.Identity(),
        nn.ConstantPad3d(1, 0.0),
        nn.ReplicationPad3d(1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_may_stand_between(between):
    assert paired(nn.Sequential(spatial(), between, temporal())) == {"0": {"spatial"}, "2": {"temporal"}}


@pytest.mark.parametrize(
    "between",
    [nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(1), nn.Upsample(scale_factor=2), nn.GLU(1), nn.Softmax(1)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_take_a_pair_apart(between):
    assert paired(nn.Sequential(spatial(), between, temporal())) == {}


@pytest.mark.parametrize(
    ("between", "pairs"),
    [
        (lambda model, y: F.relu(y), True),
        (lambda model, y: torch.relu_(y), True),
        (lambda model, y: y.relu_(), True),
        (lambda model, y: y.clamp(min=0), True),
        (lambda model, y: F.dropout3d(y, training=model.training), True),
        (lambda model, y: F.pad(y, (0, 0, 0, 0, 1, 1)), True),
        (lambda model, y: y * 0.5, True),
        (lambda model, y: model.scale * y, True),
        (lambda model, y: y.mul_(model.scale.exp()), True),
        (lambda model, y: y * torch.sigmoid(y), True),
        (lambda model, y: y * model.gate(y.mean((2, 3, 4), keepdim=True)).sigmoid(), True),
        (lambda model, y: model.gate(y.mean((2, 3, 4), keepdim=True)).sigmoid() * y, True),
        (lambda model, y: y.mean((2, 3, 4), keepdim=True), False),
        (lambda model, y: y + y, False),
        (lambda model, y: y.flip(2), False),
        (lambda model, y: torch.cat((y, y), 1)[:, :2], False),
        (lambda model, y: y.mean((2, 3, 4), keepdim=True) * model.one(y), False),  # of a pool and its gate: the pool
    ],
)
def test_operations_between_the_halves(between, pairs):
    expected = {"one": {"spatial"}, "other": {"temporal"}} if pairs else {}
    assert paired(Between(between)) == expected


def test_halves_are_found_inside_a_region_of_a_model_that_cannot_be_traced():
    model = Switch(nn.Sequential(spatial(), nn.ReLU(), temporal()), nn.Sequential(temporal(), nn.ReLU(), spatial()))
    expected = {"0.0": "spatial", "0.2": "temporal", "1.0": "temporal", "1.2": "spatial"}
    assert paired(model) == {f"parts.{name}": {role} for name, role in expected.items()}


def test_halves_in_different_regions_are_not_put_together():
    assert paired(Switch(spatial(), temporal())) == {}


def test_roles_of_a_converted_model_are_those_of_the_model():
    model = entry("torchvision r2plus1d_18").build()
    identity = {"rule": [{"weight": "identity", "input": "identity"}]}
    assert roles(qconvert.binarize(model, identity, report=False)) == roles(model)


def test_a_rule_selects_one_half():
    model = nn.Sequential(spatial(), nn.ReLU(), temporal())
    plan = qconvert.plan(model, {"rule": [{"role": "temporal", "weight": "sign"}]})
    assert [decision.site.name for decision in plan.converted] == ["2"]


def test_both_pathways_of_slowfast_read_the_clip():
    first = {site.name for site in sites_of("pytorchvideo slowfast_r50") if "first" in site.roles}
    assert first == {f"blocks.0.multipathway_blocks.{pathway}.conv" for pathway in (0, 1)}


@pytest.mark.parametrize(
    ("channels", "first", "last"),
    [
        (((3, 8), (8, 8), (8, 2)), "0", "2"),
        (((3, 8), (3, 8)), "01", "01"),  # two that read the same
        (((3, 8), (8, 8), (3, 4), (4, 4)), "02", "13"),
        (((3, 3), (3, 8)), "0", "1"),  # reads as many as the first one, but those are what the one before returns
        (((8, 4), (4, 16), (24, 8)), "0", "2"),  # a decoder that reads a skip connection too
    ],
    ids=str,
)
def test_ends_of_the_paths_of_a_model_that_cannot_be_traced(channels, first, last):
    found = roles(Switch(*(nn.Conv3d(inputs, outputs, 1) for inputs, outputs in channels)))
    assert {name[-1] for name, names in found.items() if "first" in names} == set(first)
    assert {name[-1] for name, names in found.items() if "last" in names} == set(last)


def test_lazy_convolutions_are_taken_one_after_the_other():
    found = roles(Switch(nn.LazyConv3d(4, 1), nn.LazyConv3d(4, 1), nn.LazyConv3d(4, 1)))
    assert found == {"parts.0": {"first"}, "parts.2": {"last"}}


class OwnLinear(nn.Linear):
    """A subclass."""


class EveryKind(nn.Module):
    """One of each kind of layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 2, 1)
        self.conv1d, self.conv2d = nn.Conv1d(2, 4, 3, groups=2), nn.Conv2d(2, 4, (1, 3))
        self.up1d, self.up2d, self.up3d = (
            nn.ConvTranspose1d(2, 3, 2),
            nn.ConvTranspose2d(2, 3, 2),
            nn.ConvTranspose3d(2, 3, 2),
        )
        self.linear, self.own, self.lazy = nn.Linear(2, 3), OwnLinear(2, 3, bias=False), nn.LazyLinear(3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm, self.embedding = nn.LayerNorm(2), nn.Embedding(3, 2)

    def forward(self, x):
        return self.conv(x)


def test_layers_that_are_no_conv3d_are_listed_as_what_they_are():
    decisions = {decision.site.name: decision for decision in qconvert.plan(EveryKind(), "bitorch").decisions}
    others = {name: decision.site for name, decision in decisions.items() if name != "conv"}
    assert {name: (site.kind, site.type, site.kernel_size, site.parameters) for name, site in others.items()} == {
        "conv1d": ("Conv1d", "Conv1d", (3,), 4 * 3 + 4),
        "conv2d": ("Conv2d", "Conv2d", (1, 3), 4 * 2 * 3 + 4),
        "up1d": ("ConvTranspose1d", "ConvTranspose1d", (2,), 2 * 3 * 2 + 3),
        "up2d": ("ConvTranspose2d", "ConvTranspose2d", (2, 2), 2 * 3 * 4 + 3),
        "up3d": ("ConvTranspose3d", "ConvTranspose3d", (2, 2, 2), 2 * 3 * 8 + 3),
        "linear": ("Linear", "Linear", (), 9),
        "own": ("Linear", "OwnLinear", (), 6),
        "lazy": ("Linear", "LazyLinear", (), 0),
        "attention.out_proj": ("Linear", "NonDynamicallyQuantizableLinear", (), 20),
    }
    for name, site in others.items():
        decision = decisions[name]
        assert (decision.convert, decision.rule, decision.reason) == (False, "", f"not a Conv3d ({site.kind})")
        assert site.roles == frozenset()
    assert (others["conv1d"].in_channels, others["conv1d"].out_channels, others["conv1d"].groups) == (2, 4, 2)
    assert (others["linear"].in_channels, others["linear"].out_channels, others["linear"].groups) == (2, 3, 1)


def test_the_table_counts_them_by_kind():
    lines = qconvert.plan(EveryKind(), "bitorch").to_text().splitlines()
    assert [line.split()[0] for line in lines[2 : lines.index("")]] == ["conv"]
    assert lines[lines.index("") + 1 :] == [
        "1 Conv3d found, 1 to convert.",
        "1 Conv1d, 16 parameters: not a Conv3d, float.",
        "1 Conv2d, 28 parameters: not a Conv3d, float.",
        "1 ConvTranspose1d, 15 parameters: not a Conv3d, float.",
        "1 ConvTranspose2d, 27 parameters: not a Conv3d, float.",
        "1 ConvTranspose3d, 51 parameters: not a Conv3d, float.",
        "4 Linear, 35 parameters: not a Conv3d, float.",
    ]


def test_the_table_of_a_transformer_is_as_long_as_its_convolutions_are_many():
    model = entry("transformers ViViT").build()
    plan = qconvert.plan(model, "bitorch")
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    parameters = sum(p.numel() for module in linears for p in module.parameters())
    assert len(plan.decisions) == 1 + len(linears)
    assert f"\n{len(linears)} Linear, {parameters:,} parameters: not a Conv3d, float.\n" in f"{plan}\n"
    assert sum(line.startswith("vivit.") for line in str(plan).splitlines()) == 1


def test_a_functional_convolution_has_a_row_of_its_own():
    text = str(qconvert.plan(entry("functional conv").build(), "bitorch"))
    assert re.search(r"^conv3d +function ", text, re.MULTILINE)
    assert "not a Conv3d" not in text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": "up3d"}, r"layers: 'up3d' selects no Conv3d, only 1 ConvTranspose3d\. Nearest: conv\."),
        (
            {"layers": ["up[12]d", "own"]},
            r"'up\[12\]d' selects no Conv3d, only 1 ConvTranspose1d, 1 ConvTranspose2d\. Nearest",
        ),
        ({"type": "*Linear"}, r"no Conv3d has all of \{'type': '\*Linear'\}, only 4 Linear\. Add `optional = true`"),
        ({"type": "*Linear", "min_parameters": 10**6}, r"no Conv3d has all of \{[^}]*\}\. Add `optional = true`"),
    ],
    ids=str,
)
def test_a_rule_that_selects_other_layers_only_is_an_error_that_says_so(rule, message):
    with pytest.raises(RuleError, match=message):
        qconvert.plan(EveryKind(), {"rule": [{**rule, "weight": "sign"}]})
    assert qconvert.plan(EveryKind(), {"rule": [{**rule, "weight": "sign", "optional": True}]}).converted == ()


def test_a_rule_for_everything_converts_no_other_layer():
    model = qconvert.binarize(EveryKind(), "bitorch", report=False)
    assert [name for name, module in model.named_modules() if isinstance(module, qconvert.QConv3d)] == ["conv"]
    types = {name: type(module) for name, module in EveryKind().named_modules() if name not in ("", "conv")}
    assert {name: type(model.get_submodule(name)) for name in types} == types


def test_starting_rules_make_no_exception_of_halves():
    rules = starting_rules(entry("torchvision r2plus1d_18").build())
    assert set(re.findall(r'^role = "(\w+)"', rules, re.MULTILINE)) == {"first", "last", "shortcut"}
