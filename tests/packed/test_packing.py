"""A packed model beside the converted one: the same values, the same class, and what is said of each layer."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn
from torch.testing import assert_close

import qconvert
from qconvert import InputError, ModelError, binarize, pack
from qconvert.example import tensors_in
from qconvert.kernels import operators
from qconvert.packed import layer as packed_layer
from qconvert.packed import obstacles
from qconvert.packed.bit_conv import BitConv3d
from qconvert.quantizations import LSQ, InputDoReFa

BINARY = {
    "rule": [{"weight": {"quantizer": "sign", "scale": "channel"}, "input": {"quantizer": "sign", "threshold": "auto"}}]
}


@pytest.fixture
def packs_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack layers of a few channels too, which would be faster in float."""
    monkeypatch.setattr(obstacles, "LEAST_PRODUCTS", 0)


class Block(nn.Module):
    """What is around a convolution in a residual network."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv3d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm3d(channels), nn.ReLU()
        )
        self.conv2 = nn.Sequential(nn.Conv3d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm3d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.conv1(x)) + x)


def trained(model: nn.Module) -> nn.Module:
    """Give BatchNorms statistics and factors, of both signs, as a training does."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm3d):
                if norm.track_running_stats:
                    norm.running_mean.normal_(0, 0.3)
                    norm.running_var.uniform_(0.5, 2)
                if norm.affine:
                    norm.weight.normal_()
                    norm.bias.normal_(0, 0.3)
    return model.eval()


def converted(model: nn.Module, rules: Any = BINARY) -> nn.Module:
    return binarize(trained(model), rules, report=False)


def clip(channels: int = 64) -> Tensor:
    return torch.randn(2, channels, 3, 6, 5)


def given(packed: nn.Module) -> list[tuple[tuple[str, ...], str]]:
    return [(each.takes_in, each.gives) for each in packed.summary().layers]


@torch.no_grad()
def assert_same(packed: nn.Module, model: nn.Module, x: Tensor) -> None:
    assert torch.equal(packed(x), model(x))


def test_a_block_is_two_passes_and_hands_bits_on() -> None:
    model, x = converted(nn.Sequential(Block(), Block())), clip()
    packed = pack(model, x)
    norm_relu, added = ("BatchNorm3d", "ReLU"), ("BatchNorm3d", "add", "ReLU")
    assert given(packed) == [(norm_relu, "bits"), (added, "floats, bits"), (norm_relu, "bits"), (added, "floats")]
    assert_same(packed, model, x)
    assert type(packed).__name__ == "Sequential"
    assert packed.summary().difference < 1e-5


def test_floats_that_are_only_added_come_in_the_format_that_is_quickest() -> None:
    """Between packed layers channels lie side by side; what others read is in the format that the model itself has."""
    model, x = converted(nn.Sequential(Block(), Block(), Block())), clip()
    packed = pack(model)
    formats: dict[str, bool] = {}
    for name, module in packed.named_modules():
        if name.endswith("conv2.0.fused"):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: formats.update(
                    {name: (output[0] if isinstance(output, list) else output).is_contiguous()}
                )
            )
    assert_same(packed, model, x)
    assert formats == {"0.conv2.0.fused": False, "1.conv2.0.fused": False, "2.conv2.0.fused": True}


def test_the_converted_model_is_as_it_was() -> None:
    model = converted(Block()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pack(model, clip())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.training
    model(clip()).sum().backward()
    assert model.conv1[0].weight.grad.abs().sum() > 0


def test_latent_weights_are_gone() -> None:
    packed = pack(converted(Block()))
    held = sum(tensor.numel() * tensor.itemsize for tensor in (*packed.parameters(), *packed.buffers()))
    latent = 2 * 64 * 64 * 27 * 4
    assert held < latent / 16


class Between(nn.Module):
    """Two binary convolutions with an operation between them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv3d(64, 64, 3, padding=1) for _ in range(2))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    ("between", "taken"),
    [
        (nn.Identity(), ("Identity",)),
        (nn.BatchNorm3d(64), ("BatchNorm3d",)),
        (nn.ReLU(inplace=True), ("ReLU",)),
        (nn.LeakyReLU(0.2), ("LeakyReLU",)),
        (nn.LeakyReLU(-0.2), ("LeakyReLU",)),
        (nn.PReLU(), ("PReLU",)),
        (nn.PReLU(64), ("PReLU",)),
        (nn.Dropout3d(0.5), ("Dropout3d",)),
        (nn.Sequential(nn.BatchNorm3d(64), nn.PReLU(64)), ("BatchNorm3d", "PReLU")),
        (nn.Sequential(nn.BatchNorm3d(64, affine=False), nn.ReLU()), ("BatchNorm3d", "ReLU")),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm3d(64)), ("ReLU",)),
        (nn.BatchNorm3d(64, track_running_stats=False), ()),
        (nn.Sigmoid(), ()),
        (nn.MaxPool3d(3, 1, 1), ()),
    ],
    ids=str,
)
def test_what_follows_is_taken_in_where_it_has_the_form(between: nn.Module, taken: tuple[str, ...]) -> None:
    for parameter in between.parameters():
        nn.init.normal_(parameter)
    model, x = converted(Between(between)), clip()
    packed = pack(model)
    hands_on = len(taken) == (len(between) if isinstance(between, nn.Sequential) else 1)
    assert given(packed)[0] == (taken, "bits" if hands_on else "floats")
    assert_same(packed, model, x)


def test_bits_that_nobody_else_reads_are_those_of_the_model_without_any_rounding() -> None:
    """BatchNorm and thresholds put many sums right at the turn: one comparison that rounded otherwise would show."""
    model = converted(Between(nn.Sequential(nn.BatchNorm3d(64), nn.ReLU())))
    with torch.no_grad():
        norm, reader = model.between[0], model.second.activation
        model.first.scale.fill_(0.1)
        model.first.offset.zero_()
        model.first.bias.zero_()
        model.second.bias.zero_()
        norm.running_mean.fill_(0.7)
        norm.running_var.fill_(0.9)
        norm.weight.copy_(torch.where(torch.arange(64) % 2 == 0, 1.1, -1.1))
        norm.bias.fill_(0.3)
        sums = torch.arange(64.0) * 4 - 128
        at_turn = norm((sums * 0.1).view(1, 64, 1, 1, 1)).flatten()
        reader.threshold.copy_(at_turn.clamp(min=0))
    packed = pack(model)
    assert given(packed)[0] == (("BatchNorm3d", "ReLU"), "bits")
    x = torch.randn(4, 64, 6, 12, 12)
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


class Branches(nn.Module):
    """Binary convolutions of 32 and 40 channels side by side, with an operation behind them."""

    def __init__(self, after: Any, dim: int = 1) -> None:
        super().__init__()
        self.left, self.right = nn.Conv3d(64, 32, 3, padding=1), nn.Conv3d(64, 40, 1)
        self.after, self.dim = after, dim

    def parts(self, x: Tensor) -> list[Tensor]:
        return [self.left(x), self.right(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat(self.parts(x), dim=self.dim))


class ReadTwice(Branches):
    def forward(self, x: Tensor) -> Tensor:
        left, right = self.parts(x)
        return self.after(torch.cat([left, right], self.dim)).sum(1) + left.sum(1)


class SideBySideTwice(Branches):
    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return self.after(torch.cat([left, left], self.dim))


class OneIsBehindAnother(Branches):
    def parts(self, x: Tensor) -> list[Tensor]:
        return [self.left(x), torch.sigmoid(self.right(x))]


class OneIsBent(Branches):
    def parts(self, x: Tensor) -> list[Tensor]:
        return [self.left(x), F.relu(self.right(x))]


class AlongDepth(Branches):
    def __init__(self, after: Any) -> None:
        super().__init__(after, dim=2)
        self.right = nn.Conv3d(64, 32, 3, padding=1)


def normed(channels: int = 72) -> nn.Module:
    return nn.Sequential(nn.BatchNorm3d(channels), nn.PReLU(channels))


@pytest.mark.parametrize(
    ("model", "taken"),
    [
        (Branches(normed()), [("BatchNorm3d", "PReLU")] * 2),
        (Branches(nn.PReLU(), dim=-4), [("PReLU",)] * 2),
        (Branches(F.relu), [("relu",)] * 2),
        (Branches(nn.Sequential(nn.ReLU(), nn.BatchNorm3d(72))), [("ReLU",)] * 2),
        (Branches(nn.Sequential(nn.BatchNorm3d(72), nn.Sigmoid())), [("BatchNorm3d",)] * 2),
        (Branches(nn.BatchNorm3d(72, track_running_stats=False)), [(), ()]),
        (ReadTwice(normed()), [(), ()]),
        (SideBySideTwice(normed(64)), [(), ()]),
        (OneIsBehindAnother(normed()), [(), ()]),
        (OneIsBent(nn.BatchNorm3d(72)), [(), ("relu",)]),
        (AlongDepth(normed(32)), [(), ()]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_branches_take_in_what_follows_their_concatenation(model: nn.Module, taken: list[tuple[str, ...]]) -> None:
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.normal_(module.weight)
    model, x = converted(model), clip()
    packed = pack(model)
    assert [each.takes_in for each in packed.summary().layers] == taken
    assert_same(packed, model, x)


def test_a_hook_behind_a_concatenation_still_runs() -> None:
    model = converted(Branches(normed()))
    seen: list[Tensor] = []
    model.after[0].register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    packed = pack(model)
    assert_same(packed, model, clip())
    assert_close(*seen, rtol=0, atol=0)


class Written(nn.Module):
    """A forward in functions."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(64, 64, 3, padding=1), nn.BatchNorm3d(64)
        self.other, self.third = nn.Conv3d(64, 64, 1), nn.Conv3d(64, 64, 1)
        self.relu = nn.ReLU(inplace=True)
        self.code = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def add_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += x
    return F.relu(y)


def add_to_the_argument(m: Any, x: Tensor) -> Tensor:
    x = x * 2
    x += m.conv(x)
    return x.relu()


def add_number(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + 1


def add_to_itself(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y + y


def add_with_factor(m: Any, x: Tensor) -> Tensor:
    return torch.add(m.conv(x), x, alpha=2)


def add_two(m: Any, x: Tensor) -> Tensor:
    return torch.relu(m.conv(x) + m.other(x))


def add_three(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + x + x


def add_wider(m: Any, x: Tensor) -> Tensor:
    return m.conv(x[:, :, :1]) + x


def add_narrower(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.conv(x) + x.mean((2, 3, 4), keepdim=True))


def twice(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.conv(F.relu(m.conv(x))))


def read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return F.relu(y) * y


def norm_twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.norm(m.conv(x)))


def two_readers(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.conv(x))
    return m.other(y) + y


def same_as_residual(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.other(y) + y


def add_to_what_a_view_shows(m: Any, x: Tensor) -> Tensor:
    z = x * 2
    view = z[:, :32]
    z += m.conv(z)
    return z[:, :32] + view


def two_packed_readers(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.conv(x))
    return m.other(y) + m.third(y)


def residual_mutated(m: Any, x: Tensor) -> Tensor:
    r = x * 2
    y = m.conv(x) + r
    r.mul_(2)
    return F.relu(y) + r


def mutated_before_it_is_read(m: Any, x: Tensor) -> Tensor:
    h = m.norm(m.conv(x))
    h.mul_(-1)
    return m.other(h)


def mutated_by_a_module(m: Any, x: Tensor) -> Tensor:
    h = m.norm(m.conv(x))
    m.relu(h)
    return m.other(h)


def add_a_size(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x)) + x.shape[0]


FORWARDS = [
    add_in_place, add_to_the_argument, add_number, add_to_itself, add_with_factor, add_two, add_three, add_wider,
    add_narrower, add_to_what_a_view_shows, two_packed_readers, twice, read_twice, norm_twice, two_readers, same_as_residual,
    residual_mutated, mutated_before_it_is_read, mutated_by_a_module, add_a_size,
]  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda each: each.__name__)
def test_any_way_of_writing_it_gives_the_same(forward: Any) -> None:
    model, x = converted(Written(forward)), clip()
    before = x.clone()
    assert_same(pack(model), model, x)
    assert torch.equal(x, before)


def test_hooks_run_and_keep_what_they_see_apart() -> None:
    model, seen = converted(Block()), []
    hook = lambda module, inputs, output: seen.append(output)  # noqa: E731
    model.conv1[1].register_forward_hook(hook)
    model.conv2[0].register_forward_hook(hook)
    packed = pack(model)
    assert given(packed) == [((), "floats"), ((), "floats")]
    assert_same(packed, model, clip())
    assert_close(seen[:2], seen[2:])


def test_a_part_that_cannot_be_followed_is_packed_layer_by_layer() -> None:
    class Opaque(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > -1e9 else x  # which a graph would not tell

    model, x = converted(nn.Sequential(Opaque(), Block())), clip()
    packed = pack(model)
    assert packed.summary().opaque.keys() == {"0"}
    assert "Layer by layer: 0: " in str(packed.summary())
    assert given(packed)[2] == (("BatchNorm3d", "ReLU"), "bits")
    assert_same(packed, model, x)


class Stepwise(Block):
    """It cannot be followed, and calls the children of its children."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        for layer in self.conv1:
            x = layer(x)
        return self.conv2(self.conv1(x)) + x


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_children_do_by_themselves_what_they_did(dtype: torch.dtype | None) -> None:
    stem = nn.Sequential(nn.Conv3d(3, 64, 3, padding=1), nn.BatchNorm3d(64), nn.ReLU())
    binary = {"rule": [{"min_in_channels": 4, **BINARY["rule"][0]}]}
    model, x = converted(nn.Sequential(stem, Stepwise(), Block(), Block()), binary), torch.randn(2, 3, 3, 6, 5)
    packed = pack(model, dtype=dtype)
    assert given(packed)[2] == (("BatchNorm3d", "ReLU"), "bits")
    for part in ("0", "1", "2", "2.conv1", "2.conv2", "2.conv1.0"):
        given_to = x if part == "0" else clip()
        ours, theirs = (each.get_submodule(part)(given_to) for each in (packed, model))
        assert_close(ours, theirs, rtol=0, atol=0 if dtype is None else 1e-4)
    if dtype is None:
        assert_same(packed, model, x)


def test_the_original_can_be_trained_on() -> None:
    model, x = converted(Block(), {"rule": [{"weight": "sign", "input": "identity"}]}), clip()
    packed = pack(model)
    assert "W1A32" in str(packed.summary())
    expected = packed(x)
    with torch.no_grad():
        model.conv1[0].weight.neg_()
    assert torch.equal(packed(x), expected)


def test_a_state_dict_that_is_loaded_is_what_it_computes_with() -> None:
    layers = [qconvert.QConv3d(64, 64, 3, padding=1, pad_value=0.0) for _ in range(2)]
    one, other = (pack(nn.Sequential(layer)) for layer in layers)
    x = clip()
    assert not torch.equal(one(x), other(x))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))
    doubles = {key: value.double() if value.is_floating_point() else value for key, value in other.state_dict().items()}
    one.load_state_dict(doubles, assign=True)
    assert torch.equal(one(x), other(x))


def test_infinity_and_nan_stay_in_their_sample() -> None:
    """Bits of channels that a block does not have are 0 whatever the block before them had."""
    made = nn.Sequential(*(qconvert.QConv3d(40, 40, 3, padding=1) for _ in range(2)))

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = made

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + x)

    model, x = Added().eval(), torch.randn(3, 40, 3, 6, 5)
    x[2, :20], x[2, 20:] = torch.inf, torch.nan
    packed = pack(model)
    assert given(packed)[0] == (("add",), "bits")
    assert torch.equal(packed(x)[:2], model(x)[:2])


def test_a_layer_that_two_parts_share_takes_in_what_follows_in_neither() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Block(), Block()
            self.two.conv1[0] = self.one.conv1[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) if float(x.sum()) > -1e9 else x

    model = converted(Opaque())
    packed = pack(model)
    added = ("BatchNorm3d", "add", "ReLU")
    assert [each.takes_in for each in packed.summary().layers] == [(), added, added]
    assert_same(packed, model, clip())


def test_layers_that_stay_are_named_with_their_reason() -> None:
    rules = {"rule": [*BINARY["rule"], {"layers": "0.*", "input": "identity"}]}
    model = converted(nn.Sequential(Block(), Block()), rules)
    packed = pack(model)
    text = packed.summary().to_text()
    assert "Packed: 2 of 4 converted layers run on bits." in text
    assert [each.reason for each in packed.summary().layers][::2] == [
        "its input is in float, or its quantizer 'identity' has no codes that can be compared",
        None,
    ]
    assert_same(packed, model, clip())


def test_without_numba_it_says_so_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted(nn.Sequential(Block(), Block())), clip()
    compiled = pack(model)(x)
    monkeypatch.setattr(operators, "kernel", None)
    packed = pack(model)
    assert "pip install qconvert[cpu]" in str(packed.summary())
    assert torch.equal(packed(x), compiled)


def test_a_pickle_runs_in_a_process_without_numba(tmp_path: Path) -> None:
    model = converted(nn.Sequential(nn.Conv3d(64, 64, 3, padding=1), nn.BatchNorm3d(64), nn.ReLU(), nn.Conv3d(64, 64, 3)))
    packed, x = pack(model), clip()
    torch.save((packed, x, packed(x)), tmp_path / "packed.pt")
    program = """
import sys
sys.modules["numba"] = None
import torch
import qconvert
from qconvert.kernels import operators

packed, x, expected = torch.load(sys.argv[1], weights_only=False)
assert operators.kernel is None
assert torch.equal(packed(x), expected)
assert "pip install qconvert[cpu]" in str(qconvert.pack(torch.nn.Sequential(qconvert.QConv3d(64, 64, 3))).summary())
"""
    command = [sys.executable, "-c", program, str(tmp_path / "packed.pt")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "first",
    [
        {"input_quantization": InputDoReFa(1)},
        {"input_quantization": LSQ(1, signed=False), "pad_value": 0.0},
        {"input_quantization": "sign", "pad_value": 4.0},
        {"input_quantization": "sign", "pad_value": 1.0},
        {"input_quantization": "sign", "pad_value": 0.0},
        {"input_quantization": "sign", "weight_quantization": "weightdorefa"},
    ],
    ids=str,
)
def test_bits_are_handed_on_whatever_the_codes_before(first: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        qconvert.QConv3d(64, 64, 3, padding=1, **first), nn.BatchNorm3d(64), qconvert.QConv3d(64, 64, 3, padding=1)
    )
    trained(model)
    with torch.no_grad():
        model[0].weight.abs_()  # sums go as far as they can
        model[1].running_mean.copy_(model[0](clip()).mean((0, 2, 3, 4)))  # or no comparison turns
    packed = pack(model)
    assert given(packed)[0][1] == "bits"
    assert_same(packed, model, clip())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(default: torch.dtype) -> None:
    model, x = converted(nn.Sequential(Block(), Block())), clip()
    expected, of_training = pack(model)(x), copy.deepcopy(model).train()(x)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(pack(model)(x), expected)
        assert torch.equal(model.train()(x), of_training)
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_stays_in_float32() -> None:
    model, x = converted(Block()), clip()
    packed = pack(model)
    for cast in (torch.float64, torch.bfloat16, torch.float16):
        with pytest.raises(ModelError, match=rf"computes in float32, not in {cast}: .*qconvert.pack\(model, dtype=...\)"):
            packed.conv1[0].to(cast)
    assert_same(packed.to("cpu").float(), model, x)


def test_an_input_that_is_too_small() -> None:
    packed = pack(converted(nn.Sequential(nn.Conv3d(64, 64, 3))))
    for size in (2, 1):
        with pytest.raises(InputError, match=rf"an input of 3 x {size} x 5 positions, .* is too small: PackedConv3d\(64, "):
            packed(torch.randn(1, 64, 3, size, 5))


def test_few_sizes_of_input_are_remembered() -> None:
    layer = qconvert.QConv3d(64, 64, 3, padding=1, pad_value=0.0)
    packed = pack(nn.Sequential(layer))
    for size in range(3, 40):
        packed(torch.randn(1, 64, 1, 1, size))
    remembered = operators._bases[packed[0].packed.tap_sums]
    assert len(remembered) <= operators._SIZES
    assert_same(packed, nn.Sequential(layer).eval(), torch.randn(2, 64, 3, 1, 4))


@pytest.mark.usefixtures("packs_any_size")
@pytest.mark.parametrize("entry", models.TRAPS, ids=lambda entry: entry.name)
def test_every_trap_gives_the_same(entry: models.Entry) -> None:
    models.seeded()
    model = binarize(entry.build().eval(), BINARY, report=False)
    packed = pack(model)
    for _ in range(entry.calls):
        outputs = []
        for each in (model, packed):
            models.seeded()
            with torch.no_grad():
                outputs.append(tensors_in(models.run(each, entry.inputs())))
        assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_it_is_copied_pickled_and_saved() -> None:
    packed, x = pack(converted(nn.Sequential(Block(), Block()))), clip()
    expected = packed(x)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for same in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.load(file, weights_only=False)):  # noqa: S301
        assert torch.equal(same(x), expected)
        assert str(same.summary()) == str(packed.summary())
        assert type(same[0].conv1[0]) is BitConv3d


def test_a_pickle_of_a_machine_with_other_vectors_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = converted(nn.Sequential(Block(), Block())), clip()
    expected = pack(model)(x)
    monkeypatch.setattr(operators, "BLOCK", 8)
    monkeypatch.setattr(packed_layer, "BLOCK", 8)
    pickled = pickle.dumps(pack(model))
    monkeypatch.undo()
    assert torch.equal(pickle.loads(pickled)(x), expected)  # noqa: S301


def test_it_runs_compiled() -> None:
    packed, x = pack(converted(Block())), clip()
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x))


def test_threads_do_not_disturb_each_other() -> None:
    packed = pack(converted(nn.Sequential(Block(), Block())))
    clips = [torch.randn(1, 64, 3, 5 + n, 5) for n in range(4)]
    expected, found = [packed(x) for x in clips], {}

    def work(n: int) -> None:
        found[n] = [packed(clips[n]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected[n]) for n in range(4) for each in found[n])


def test_float_convolutions_run_in_another_dtype() -> None:
    seen = []
    model = nn.Sequential(nn.Conv3d(3, 64, 3, padding=1), nn.BatchNorm3d(64), nn.ReLU(), Block())
    model = converted(model, {"rule": [{"min_in_channels": 4, **BINARY["rule"][0]}]})
    packed, x = pack(model, dtype=torch.bfloat16), torch.randn(1, 3, 4, 8, 8)
    packed[0].register_forward_hook(lambda module, inputs, output: seen.append(module.weight.dtype))
    assert packed(x).dtype == torch.float32
    assert seen == [torch.bfloat16]
    in_float = pack(model, dtype=torch.float32)
    assert (in_float(x) - model(x)).abs().mean() < 1e-2 * model(x).abs().mean()


def test_without_a_batch_or_with_an_empty_one_it_runs_as_before() -> None:
    model = converted(nn.Sequential(Between(nn.BatchNorm3d(64, affine=False)).first, nn.ReLU(), nn.Conv3d(64, 64, 3)))
    packed = pack(model)
    assert given(packed)[0] == (("ReLU",), "bits")
    x = clip()
    assert_same(packed, model, x[0])
    assert_same(packed, model, x[:0])


def test_half_precision_comes_in_and_goes_around() -> None:
    model, x = converted(Block()), clip()
    packed = pack(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = packed(x.bfloat16()), packed(x.bfloat16().float())
    assert torch.equal(found, expected)


def test_another_number_of_channels_is_an_error() -> None:
    packed = pack(converted(Block()))
    with pytest.raises(InputError, match=r"expects an input of shape \(N, 64, D, H, W\) .*, got \(2, 63, 3, 6, 5\)"):
        packed(clip(63))


@pytest.mark.parametrize(
    "use",
    [
        pack,
        lambda model: binarize(model, BINARY, report=False),
        lambda model: qconvert.plan(model, BINARY),
        lambda model: qconvert.profile(model, clip()),
        lambda model: qconvert.diagnose(model, clip()),
        lambda model: qconvert.save(model, "never.safetensors"),
    ],
    ids=["pack", "binarize", "plan", "profile", "diagnose", "save"],
)
def test_what_needs_latent_weights_says_so(use: Any) -> None:
    with pytest.raises(ModelError, match="a packed model is only run: pass the model that it was packed from"):
        use(pack(converted(Block())))


def test_what_cannot_be_packed_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"no layer of this model is a QConv3d: pack a model that qconvert\.binarize"):
        pack(Block())
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        pack("r3d_18")
    with pytest.raises(InputError, match=r"does not run on the example input \(1, 2\)"):
        pack(converted(Block()), torch.zeros(1, 2))


def test_it_is_public() -> None:
    assert qconvert.pack is pack
