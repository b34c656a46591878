"""`Schedule`: what each layer is at each step, what comes out at the end, and that resumed training is the same training."""

import copy
import io
import itertools

import pytest
import torch
from bitorch.quantizations import Identity as BitorchIdentity
from bitorch.quantizations import Sign as BitorchSign
from bitorch.quantizations import WeightDoReFa as BitorchWeightDoReFa
from bitorch.quantizations.quantization_scheduler import MixLinearScheduling, StepScheduling
from torch import Tensor, nn
from torch.testing import assert_close

import qconvert
from qconvert import InputError, ModelError, QConv3d, RuleError
from qconvert.quantizations import LSQ, ProgressiveSign, Quantization
from qconvert.quantizations.staged import Staged, at_work
from qconvert.train import Schedule

BINARY = {
    "weight": {"quantizer": "sign", "scale": "channel"},
    "input": {"quantizer": "approxsign", "threshold": "channel"},
}
PLAIN = {"weight": "sign", "input": "sign"}
CLIP = (4, 2, 2, 4, 4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()),
        *(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()),
        *(nn.Conv3d(4, 4, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


def converted(rule: dict = BINARY, **tables: object) -> nn.Module:
    return qconvert.binarize(network(), {"rule": [rule], **tables}, report=False)


def layers_of(model: nn.Module) -> list[QConv3d]:
    return [module for module in model.modules() if isinstance(module, QConv3d)]


def shown(quantizer: Quantization) -> str:
    """Name and bits of the quantizer at work; for a mix, both with the share of the second."""
    if isinstance(quantizer, Staged) and quantizer.before != quantizer.now:
        before, now = (shown(quantizer.quantizers[place]) for place in (quantizer.before, quantizer.now))
        return f"{before} > {now} {quantizer.share:g}"
    return f"{at_work(quantizer).name}{quantizer.bit_width}"


def sides(model: nn.Module) -> list[str]:
    """Weight and input of each layer."""
    return [f"{shown(each._weight_quantize)}/{shown(each.activation.activation_function)}" for each in layers_of(model)]


def course(model: nn.Module, schedule: Schedule) -> list[list[str]]:
    """What the layers are at each step, from the first to the one at which the schedule is over."""
    seen = [sides(model)]
    while not schedule.is_done:
        schedule.step()
        seen.append(sides(model))
    return seen


def of_weights(model: nn.Module, schedule: Schedule) -> list[list[str]]:
    return [[each.partition("/")[0] for each in moment] for moment in course(model, schedule)]


# what the layers are


def test_activations_first_then_weights():
    model = converted()
    schedule = Schedule(model, [{"steps": 2, "weight": "identity"}, {"steps": 2, "transition": "linear"}])
    assert (schedule.steps, schedule.stage, schedule.is_done) == (4, 0, False)
    assert course(model, schedule) == [
        ["identity32/approxsign1"] * 3,
        ["identity32/approxsign1"] * 3,
        ["identity32 > sign1 0/approxsign1"] * 3,
        ["identity32 > sign1 0.5/approxsign1"] * 3,
        ["sign1/approxsign1"] * 3,
    ]
    assert (schedule.steps, schedule.stage, schedule.is_done) == (4, None, True)
    schedule.step()  # nothing
    assert schedule.state_dict()["step"] == 4


def test_bits_go_down():
    model = converted(PLAIN)
    bits = [
        {"steps": 1, "weight": {"quantizer": "lsq", "bits": n}, "input": {"quantizer": "lsq", "bits": n}} for n in (8, 4, 2)
    ]
    assert course(model, Schedule(model, bits)) == [
        ["lsq8/lsq8"] * 3,
        ["lsq4/lsq4"] * 3,
        ["lsq2/lsq2"] * 3,
        ["sign1/sign1"] * 3,
    ]


@pytest.mark.parametrize(
    ("order", "turns"),
    [
        (None, [[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("output", [[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("input", [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]),
    ],
)
def test_layer_by_layer(order, turns):
    model = converted(PLAIN)
    stage = {"steps": 6, "transition": "layerwise"} | ({} if order is None else {"order": order})
    schedule = Schedule(model, [{"steps": 1, "weight": "identity", "input": "identity"}, stage])
    kinds = [["sign1/sign1" if is_binary else "identity32/identity32" for is_binary in moment] for moment in turns]
    assert course(model, schedule) == [["identity32/identity32"] * 3, *kinds, ["sign1/sign1"] * 3]


def test_layer_by_layer_in_fewer_steps_than_layers():
    model = converted(PLAIN)
    schedule = Schedule(model, [{"steps": 1, "weight": "identity"}, {"steps": 2, "transition": "layerwise"}])
    assert of_weights(model, schedule)[1:3] == [["identity32", "sign1", "sign1"], ["sign1", "sign1", "sign1"]]


def test_layer_by_layer_by_sensitivity():
    model, batch = converted(PLAIN), torch.randn(CLIP)
    ratios = {layer.name: layer.snr_db for layer in qconvert.diagnose(model, batch).layers}
    expected = sorted(ratios, key=ratios.get, reverse=True)
    assert expected not in (["0", "3", "6"], ["6", "3", "0"])  # else this test could not tell
    stage = {"steps": 3, "weight": "ternary", "transition": "layerwise", "order": "sensitivity"}
    schedule = Schedule(model, [stage], batch=batch)
    seen = []
    for moment in of_weights(model, schedule)[:3]:
        changed = [name for name, kind in zip(ratios, moment, strict=True) if kind == "ternary2" and name not in seen]
        assert len(changed) == 1
        seen += changed
    assert seen == expected == schedule.state_dict()["by_sensitivity"]


def test_layers_that_a_stage_does_not_concern_keep_what_they_have():
    model = converted(PLAIN)
    stages = [
        {"steps": 1, "weight": "ternary"},
        {"steps": 1, "layers": ["0", "3"], "weight": "identity"},
        {"steps": 1, "layers": "0"},
        {"steps": 2, "layers": ["3"], "transition": "linear"},
    ]
    assert of_weights(model, Schedule(model, stages)) == [
        ["ternary2", "ternary2", "ternary2"],
        ["identity32", "identity32", "ternary2"],
        ["sign1", "identity32", "ternary2"],
        ["sign1", "identity32 > sign1 0", "ternary2"],
        ["sign1", "identity32 > sign1 0.5", "ternary2"],
        ["sign1", "sign1", "sign1"],
    ]


def test_a_layer_is_concerned_by_any_of_its_names():
    shared = QConv3d(2, 2, 1)
    model = nn.ModuleDict({"first": shared, "other": QConv3d(2, 2, 1), "alias": shared})
    Schedule(model, [{"steps": 1, "layers": "al*", "weight": "identity"}])
    assert sides(model) == ["identity32/sign1", "sign1/sign1"]


def test_temperature_of_progressive_sign():
    model = converted({"weight": "progressive_sign", "input": "sign"})
    stages = [
        {"steps": 1},
        {"steps": 4, "input": "progressive_sign", "temperature": [0.5, 1]},
        {"steps": 1, "input": "progressive_sign"},
    ]
    schedule = Schedule(model, stages)
    x = torch.arange(-8, 9) / 8
    for width in (1, 0.5, 0.375, 0.25, 0.125, 0):
        quantizer = layers_of(model)[0]._weight_quantize
        ramp = (x / width).clamp(-1, 1) if width else torch.where(x < 0, -1.0, 1.0)
        seen = quantizer(x)
        assert_close(seen[x != 0], ramp[x != 0], msg=str(width))
        if width < 1:  # the same temperature in both
            assert torch.equal(layers_of(model)[0].activation.activation_function(x), seen)
        schedule.step()
    assert schedule.is_done
    assert layers_of(model)[0]._weight_quantize.temperature == 1


def test_a_temperature_set_by_hand_is_left_alone():
    model = converted({"weight": "progressive_sign", "input": "sign"})
    layers_of(model)[0]._weight_quantize.temperature = 0.25
    Schedule(model, [{"steps": 1, "input": "identity"}]).step()
    assert [layer._weight_quantize.temperature for layer in layers_of(model)] == [0.25, 0, 0]


def test_the_gradient_window():
    model = converted(BINARY | {"gradient_cancellation_threshold": 1.5})
    stages = [
        {"steps": 1, "input": "identity"},
        {"steps": 1, "input": {"quantizer": "lsq"}, "gradient_cancellation_threshold": 3},
        {"steps": 1, "input": {"quantizer": "lsq"}},
        {"steps": 2, "input": "identity", "transition": "layerwise", "layers": ["0", "3"]},
    ]
    schedule, windows = Schedule(model, stages), []
    for _ in range(6):
        windows.append([layer.activation.window for layer in layers_of(model)])
        schedule.step()
    assert windows == [[0] * 3, [3] * 3, [1.5] * 3, [1.5, 0, 1.5], [0, 0, 1.5], [1.5] * 3]


def test_border_threshold_and_spread_stay_the_layers_own():
    model = converted()
    before = [(layer.pad_value, layer.activation.threshold, layer.activation.spread) for layer in layers_of(model)]
    Schedule(model, [{"steps": 1, "weight": "lsq", "input": "lsq"}])
    for layer, (border, threshold, spread) in zip(layers_of(model), before, strict=True):
        assert (layer.pad_value, layer.activation.threshold, layer.activation.spread) == (border, threshold, spread)


# what a quantizer of several does


def gradient(quantizer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = quantizer(x)
    (y * torch.linspace(1, 2, len(x))).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_linear_mix_is_that_of_bitorch(steps: int):
    model = converted({"weight": "sign", "input": "identity"})
    stages = [
        {"steps": 1, "weight": "identity"},
        {"steps": steps, "weight": {"quantizer": "weightdorefa", "bits": 2}, "transition": "linear"},
        {"steps": steps, "transition": "linear"},
    ]
    schedule = Schedule(model, stages)
    theirs = MixLinearScheduling([BitorchIdentity(), BitorchWeightDoReFa(bits=2), BitorchSign()], 2 * steps)
    x = torch.randn(50)
    schedule.step()
    for step in range(2 * steps + 1):
        assert (step == 2 * steps) is schedule.is_done
        for ours, expected in zip(gradient(layers_of(model)[0]._weight_quantize, x), gradient(theirs, x), strict=True):
            # its share is one division by the length of all stages, ours by that of one
            assert torch.equal(ours, expected) if steps == 8 else torch.allclose(ours, expected, rtol=1e-6)
        schedule.step()
        theirs.step()


def test_steps_are_those_of_bitorch():
    model = converted({"weight": "sign", "input": "identity"})
    schedule = Schedule(model, [{"steps": 3, "weight": "identity"}, {"steps": 3, "weight": "weightdorefa"}])
    theirs = StepScheduling([BitorchIdentity(), BitorchWeightDoReFa(bits=1), BitorchSign()], 9)
    x = torch.randn(50)
    for _ in range(9):
        for ours, expected in zip(gradient(layers_of(model)[0]._weight_quantize, x), gradient(theirs, x), strict=True):
            assert torch.equal(ours, expected)
        schedule.step()
        theirs.step()


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_identity_is_the_layer_that_is_built_with_it(scale: float | None, bias: bool):
    torch.manual_seed(1)
    settings = {"input_quantization": "approxsign", "threshold": 0.25, "padding": 1, "bias": bias}
    staged = QConv3d(4, 6, 3, **settings, scale=scale)
    built = QConv3d(4, 6, 3, **settings, weight_quantization="identity", scale=scale)
    Schedule(staged, [{"steps": 1, "weight": "identity"}])
    built.load_state_dict(staged.state_dict())
    x = torch.randn(2, 4, 3, 5, 5)
    for layer in (staged, built):
        layer(x).square().sum().backward()
    assert torch.equal(staged(x), built(x))
    for (name, ours), theirs in zip(staged.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def is_one_operator(layer: nn.Module, x: Tensor) -> bool:
    with torch.profiler.profile() as profile:
        layer(x)
    return any(event.key == "qconvert::quantized_conv3d" for event in profile.key_averages())


def test_a_step_of_training_is_one_operator_where_the_quantizers_have_one():
    layer, x = QConv3d(4, 6, 3), torch.randn(2, 4, 3, 5, 5)
    stages = [
        {"steps": 1, "weight": "ternary"},
        {"steps": 2, "transition": "linear"},
        {"steps": 1, "weight": "identity"},
        {"steps": 1, "input": "identity"},
        {"steps": 1, "input": "lsq"},
    ]
    schedule, seen = Schedule(layer, stages), []
    for _ in range(7):
        seen.append(is_one_operator(layer, x))
        schedule.step()
    assert seen == [True, False, False, False, True, False, True]


@pytest.mark.parametrize("place", ["_weight_quantize", "_weight_quantize.quantizers.1", "activation.activation_function"])
def test_a_hook_on_a_quantizer_is_called(place: str):
    layer, seen = QConv3d(4, 6, 3), []
    Schedule(layer, [{"steps": 1, "weight": "ternary", "input": "approxsign"}])
    layer.get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
    layer(torch.randn(2, 4, 3, 5, 5))
    assert seen == [place]


def test_bits_of_the_quantizer_at_work():
    layer = QConv3d(4, 6, 3)
    schedule, bits = Schedule(layer, [{"steps": 1, "weight": "ternary"}, {"steps": 1, "transition": "linear"}]), []
    for _ in range(3):
        bits.append(layer._weight_quantize.bit_width)
        schedule.step()
    assert bits == [2, 32, 1]  # a mix has values without a code


# what is learned


def test_the_scale_goes_with_the_quantizer():
    model = converted()
    fits = [layer._weight_quantize.fitted_scale(layer.weight) for layer in layers_of(model)]
    scales = [layer.scale.detach().clone() for layer in layers_of(model)]
    schedule = Schedule(model, [{"steps": 1, "weight": "identity"}, {"steps": 2, "transition": "linear"}])
    for layer, scale, fit in zip(layers_of(model), scales, fits, strict=True):
        assert_close(layer.scale, scale / fit)  # 1 is the fit of float weights
    x = torch.randn(CLIP)
    with torch.no_grad():
        first = model.eval()(x)
        schedule.step()
        assert_close(model(x), first)  # the share of the sign is 0 yet, in its own unit
        schedule.step()
        halfway = model(x)
    schedule.step()
    for layer, scale, fit in zip(layers_of(model), scales, fits, strict=True):
        assert_close(layer.scale, scale)
        with torch.no_grad():
            mixed = scale.view(-1, 1, 1, 1, 1) * (layer.weight / fit.view(-1, 1, 1, 1, 1) + layer.weight.sign()) / 2
            layer._weight_quantize = qconvert.quantizations.Identity()
            layer.weight.copy_(mixed)
            layer.scale.fill_(1.0)
    assert_close(model(x), halfway)


def test_the_scale_of_weights_that_are_all_0_stays():
    layer = QConv3d(2, 3, 1, scale=2.0)
    with torch.no_grad():
        layer.weight[1] = 0
    Schedule(layer, [{"steps": 1, "weight": "identity"}])
    assert layer.scale[1] == 2
    assert (layer.scale[[0, 2]] != 2).all()


def step_for(weight):
    quantizer = LSQ(bits=4)
    quantizer.start_from(weight)
    return quantizer.step


def test_a_step_size_starts_from_the_weights_of_its_stage_and_then_goes_on():
    layer = QConv3d(2, 3, 3, weight_quantization=LSQ(bits=2))
    start = layer._weight_quantize.step.item()
    four = {"steps": 1, "weight": {"quantizer": "lsq", "bits": 4}}
    schedule = Schedule(layer, [{"steps": 1, "weight": "identity"}, four, {"steps": 1, "weight": "sign"}, four])
    with torch.no_grad():
        layer.weight.mul_(10)
    own, *others = layer._weight_quantize.quantizers
    learned = next(each for each in others if isinstance(each, LSQ))
    schedule.step()
    assert learned.step == step_for(layer.weight)
    with torch.no_grad():
        learned.step.fill_(0.5)
    schedule.step()
    schedule.step()
    assert layer._weight_quantize.current is learned
    assert learned.step == 0.5
    assert own.step.item() == start
    schedule.step()
    assert layer._weight_quantize is own
    assert_close(own.step.item(), 10 * start, rtol=1e-5, atol=0)


def test_a_layer_that_starts_anew_starts_all_its_quantizers():
    layer = QConv3d(2, 3, 3)
    Schedule(layer, [{"steps": 1, "weight": "lsq"}])
    layer._weight_quantize.quantizers[1].step.data.fill_(9.0)
    layer.reset_parameters()
    assert layer._weight_quantize.quantizers[1].step == step_for(layer.weight)


def test_of_a_frozen_layer_nothing_is_trained():
    layer = QConv3d(2, 3, 1).requires_grad_(False)
    Schedule(layer, [{"steps": 1, "weight": "lsq", "input": "lsq"}])
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_quantizers_are_where_the_layer_is():
    model = converted().double().eval()
    Schedule(model, [{"steps": 2, "weight": "lsq"}, {"steps": 1, "transition": "linear"}])
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    assert not any(module.training for module in model.modules())


# before and after


def test_when_it_is_over_the_model_is_as_without_a_schedule():
    model, other = converted(), converted()
    modules = dict(model.named_modules())
    schedule = Schedule(model, [{"steps": 1, "weight": "lsq", "input": "lsq"}, {"steps": 1, "transition": "linear"}])
    added = {name for name, _ in model.named_parameters()} - {name for name, _ in other.named_parameters()}
    assert added == {
        f"{name}.{side}.quantizers.1.step"
        for name in ("0", "3", "6")
        for side in ("_weight_quantize", "activation.activation_function")
    }
    schedule.step()
    schedule.step()
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == other.state_dict().keys()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(ours, theirs, msg=name)
    assert str(qconvert.profile(model, torch.zeros(CLIP))) == str(qconvert.profile(other, torch.zeros(CLIP)))
    Schedule(model, [{"steps": 1, "weight": "identity"}])  # so another one may start


def test_what_has_left_the_model_is_not_trained():
    model = converted()
    schedule = Schedule(model, [{"steps": 1, "weight": "lsq"}])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = layers_of(model)[0]._weight_quantize.quantizers[1].step
    model(torch.randn(CLIP)).square().sum().backward()
    assert step.grad is not None
    schedule.step()
    before = step.item()
    optimizer.step()
    assert step.item() == before


def test_a_schedule_out_of_the_rules(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'extends = "two-step"\n[schedule]\n[[schedule.stage]]\nsteps = 2\nweight = "ternary"\n'
    )
    model = nn.Sequential(nn.Conv3d(2, 16, 3), nn.ReLU(), nn.Conv3d(16, 16, 3))
    bundled = Schedule(qconvert.binarize(model, "two-step", report=False))
    assert bundled.steps > 1
    own = qconvert.binarize(model, tmp_path / "mine.toml", report=False)
    schedule = Schedule(own)
    assert course(own, schedule) == [["ternary2/approxsign1"], ["ternary2/approxsign1"], ["sign1/approxsign1"]]


def test_stages_of_the_rules_are_stages():
    rules = qconvert.load_rules({"schedule": {"stage": [{"steps": 3, "weight": "identity"}]}})
    model = converted()
    assert Schedule(model, [stage for _, stage in rules.schedule]).steps == 3
    assert sides(model) == ["identity32/approxsign1"] * 3


# resuming

STAGES = [
    {"steps": 2, "weight": {"quantizer": "lsq", "bits": 8}, "input": {"quantizer": "lsq", "bits": 8}},
    {"steps": 2, "weight": {"quantizer": "lsq", "bits": 4}, "input": "progressive_sign", "temperature": [0, 0.9]},
    {"steps": 3, "weight": "identity", "transition": "layerwise", "order": "sensitivity"},
    {"steps": 2, "transition": "linear"},
    {"steps": 2, "layers": ["3"], "weight": {"quantizer": "lsq", "bits": 4}},
]
STEPS = 13
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
}


class Run:
    """A training that can be resumed."""

    def __init__(self, optimizer: str, rule: dict) -> None:
        generator = torch.Generator().manual_seed(5)
        self.clips = torch.randn(STEPS, *CLIP, generator=generator)
        self.labels = torch.randint(3, (STEPS, CLIP[0]), generator=generator)
        self.model = converted(rule)
        self.schedule = Schedule(self.model, STAGES, batch=self.clips[0], total_steps=STEPS)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())

    def train(self, start: int = 0) -> list[bytes]:
        """Train to the end; return a checkpoint before each step and one behind the last."""
        checkpoints = [self.saved()]
        for clip, label in zip(self.clips[start:], self.labels[start:], strict=True):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(clip), label).backward()
            self.optimizer.step()
            self.schedule.step()
            checkpoints.append(self.saved())
        return checkpoints

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.schedule, self.model, self.optimizer)], file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for part, state in zip((self.schedule, self.model, self.optimizer), states, strict=True):
            part.load_state_dict(state)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("rule", [BINARY, BINARY | {"weight": "lsq"}], ids=["sign", "lsq"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_training_is_the_same_training(optimizer: str, rule: dict):
    whole = Run(optimizer, rule)
    checkpoints = whole.train()
    assert whole.schedule.is_done
    for start, checkpoint in enumerate(checkpoints):
        resumed = Run(optimizer, rule)
        with torch.no_grad():  # a fresh process may have other weights before it loads, so measure another order
            resumed.model[0].weight.normal_()
        resumed.schedule._by_sensitivity = resumed.schedule._by_sensitivity[::-1]
        resumed.schedule._set_turns()
        resumed.load(checkpoint)
        assert resumed.schedule.stage == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, None, None, None][start]
        resumed.train(start)
        assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_a_schedule_goes_back():
    run = Run("adam", BINARY)
    checkpoints = run.train()
    end = copy.deepcopy(run.model.state_dict())
    for start in (9, 3):
        run.load(checkpoints[start])
        run.train(start)
        assert_same(run.model.state_dict(), end)


@pytest.mark.parametrize("start", [3, 8])
def test_before_the_end_the_model_may_be_loaded_first(start: int):
    run = Run("adam", BINARY)
    checkpoints = run.train()
    resumed = Run("adam", BINARY)
    states = torch.load(io.BytesIO(checkpoints[start]))
    for part, state in reversed([*zip((resumed.schedule, resumed.model, resumed.optimizer), states, strict=True)]):
        part.load_state_dict(state)
    resumed.train(start)
    assert_same(resumed.model.state_dict(), run.model.state_dict())


def test_a_schedule_does_not_depend_on_when_the_optimizer_is_built():
    checkpoints = Run("adam", BINARY).train()
    run = Run("adam", BINARY)
    run.schedule.load_state_dict(torch.load(io.BytesIO(checkpoints[5]))[0])
    late = [id(parameter) for parameter in run.model.parameters()]
    assert late == [id(parameter) for parameter in run.optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize(
    ("stages", "rule", "message"),
    [
        (
            [{"steps": 4, "weight": "ternary"}],
            BINARY,
            r"stage 1 is \{'steps': 3, .*'ternary'.* in the checkpoint and \{'steps': 4",
        ),
        (
            [{"steps": 3, "weight": "ternary"}, {"steps": 1}],
            BINARY,
            "stage 2 is not there in the checkpoint and {'steps': 1} in",
        ),
        (
            [{"steps": 3, "weight": "ternary"}],
            BINARY | {"pad_value": 0.0},
            r"layer '0' is .*'pad_value': None.* in the checkpoint and .*'pad_value': 0.0.* in this training",
        ),
        (
            [{"steps": 3, "weight": "ternary"}],
            BINARY | {"kernel_size": 3},
            r"layer '6' is \{'weight': \{'quantizer': 'sign'.* in the checkpoint and not there in",
        ),
    ],
    ids=["other length", "more stages", "other rule", "fewer layers"],
)
def test_a_checkpoint_of_other_rules_is_refused(stages, rule, message):
    checkpoint = Schedule(converted(), [{"steps": 3, "weight": "ternary"}]).state_dict()
    model = converted(rule)
    schedule = Schedule(model, stages)
    with pytest.raises(ModelError, match=message):
        schedule.load_state_dict(checkpoint | {"step": 2})
    assert schedule.state_dict()["step"] == 0
    assert sides(model)[0] == "ternary2/approxsign1"


def test_what_is_no_state_of_a_schedule_is_refused():
    schedule = Schedule(converted(), [{"steps": 1}])
    with pytest.raises(ModelError, match=r"no state of a Schedule: its keys are \['last_epoch'\], those of one \['step'"):
        schedule.load_state_dict({"last_epoch": 1})
    with pytest.raises(ModelError, match="no step 2 in a schedule of 1"):
        schedule.load_state_dict(schedule.state_dict() | {"step": 2})


# bad input


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "a schedule needs a stage, got none"),
        (5, r"rules, \[schedule\]: stage: Input should be a valid list, got 5"),
        ([{"weight": "sign"}], r"rules, \[schedule\], stage 1: steps: Field required"),
        (
            [{"steps": 1}, {"steps": 1, "weight": "sing"}],
            r"stage 2: weight: unknown quantizer 'sing'.*Did you mean 'sign'\?",
        ),
        ([{"steps": 1, "input": {"quantizer": "lsq", "bits": 99}}], "stage 1: input: lsq: bits must be .* got 99"),
        ([{"steps": 1, "layers": "4"}], r"stage 1: layers: '4' selects no converted layer\. Nearest: 0, 3, 6"),
        ([{"steps": 1, "temperature": [0, 1]}], "stage 1: temperature: no layer that it concerns has .* 'progressive_sign'"),
        (
            [{"steps": 1, "layers": "0", "input": "progressive_sign"}, {"steps": 1, "layers": "3", "temperature": [0, 1]}],
            "stage 2: temperature: no layer",
        ),
        (
            [{"steps": 1, "transition": "layerwise", "order": "sensitivity"}],
            r'stage 1: order = "sensitivity" is measured with a batch: Schedule\(model, ..., batch=batch\)',
        ),
    ],
    ids=str,
)
def test_errors(stages, message):
    model = converted()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(RuleError, match=message):
        Schedule(model, stages)
    assert {name: id(module) for name, module in model.named_modules()} == before
    Schedule(model, [{"steps": 1}])


def test_errors_of_the_model():
    with pytest.raises(ModelError, match="Sequential has no QConv3d to schedule"):
        Schedule(network(), [{"steps": 1}])
    with pytest.raises(RuleError, match="this QConv3d was not converted by rules: pass the stages"):
        Schedule(QConv3d(1, 1, 1))
    with pytest.raises(RuleError, match=r"rules has no \[\[schedule.stage\]\]: write one, or pass the stages"):
        Schedule(converted())
    model = converted()
    Schedule(model, [{"steps": 1, "layers": ["3"], "weight": "identity"}])
    with pytest.raises(ModelError, match="another schedule of this model is not over: it has the quantizers of 3"):
        Schedule(model, [{"steps": 1}])
    with pytest.raises(InputError, match="does not run on the batch"):
        Schedule(converted(), [{"steps": 1, "transition": "layerwise", "order": "sensitivity"}], batch=torch.zeros(1))


def test_a_schedule_longer_than_the_training():
    stages = [{"steps": 3, "weight": "identity"}, {"steps": 2, "transition": "linear"}]
    with pytest.raises(RuleError, match="the schedule takes 5 steps and the training 4: the layers would not get to"):
        Schedule(converted(), stages, total_steps=4)
    assert Schedule(converted(), stages, total_steps=5).steps == 5


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_comes_behind_the_schedule(process_group):
    model = converted()
    with pytest.raises(ModelError, match="build the schedule first, then wrap the model in DDP"):
        Schedule(nn.parallel.DistributedDataParallel(model), [{"steps": 1}])
    schedule = Schedule(model, [{"steps": 2, "weight": "lsq"}, {"steps": 2, "weight": {"quantizer": "lsq", "bits": 2}}])
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(6):
        parallel(torch.randn(CLIP)).square().sum().backward()
        schedule.step()
    assert schedule.is_done


# torch.compile


@pytest.mark.parametrize("is_compiled_first", [False, True])
def test_a_compiled_model_sees_the_change(is_compiled_first: bool):
    torch._dynamo.reset()
    model, x = converted(), torch.randn(CLIP)
    compiled = torch.compile(model, backend="aot_eager")
    if is_compiled_first:
        compiled(x)
    stages = [{"steps": 1, "weight": "identity"}, {"steps": 3, "transition": "linear"}, {"steps": 1, "input": "lsq"}]
    schedule = Schedule(compiled, stages)
    outputs = []
    for _ in range(6):
        outputs.append(compiled(x).detach())
        assert_close(outputs[-1], copy.deepcopy(model)(x))
        schedule.step()
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(outputs))


def compilations(stages: list[dict]) -> int:
    """Return how many graphs a training by these stages is compiled to."""
    torch._dynamo.reset()
    model, graphs = converted(), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    schedule = Schedule(model, stages)
    while not schedule.is_done:
        compiled(torch.zeros(CLIP))
        schedule.step()
    return len(graphs)


def test_shares_of_a_mix_do_not_compile_anew_but_temperatures_do():
    float_weights, first_share, any_share = 1, 1, 1
    mixed = [{"steps": 1, "weight": "identity"}, {"steps": 10, "transition": "linear"}]
    assert compilations(mixed) <= float_weights + first_share + any_share
    assert compilations([{"steps": 4, "input": "progressive_sign", "temperature": [0, 1]}]) == 4


def test_progressive_sign_goes_back_to_its_scale():
    quantizer = ProgressiveSign()
    quantizer.scale, at_scale = 0.1, 0.75  # 1 - 4 ** -1
    assert quantizer.temperature == at_scale
    quantizer.temperature = 0.5
    assert quantizer.temperature == 0.5
    quantizer.temperature = None
    assert quantizer.temperature == at_scale
