"""`diagnose`: every number against naive numpy or plain torch, and the model as it was."""

import csv
import io
import json
import math
import random
import re

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from models import TRAPS, Cache, Checkpointed, CheckpointedByHooks, MutatedInputs, Stochastic, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.models.video import r3d_18

import qconvert
from qconvert import Diagnosis, InputError, ModelError, QConv3d, binarize, diagnose

SIGNS = {"rule": [{"weight": "sign", "input": "sign"}]}
IDENTITY = {"rule": [{"weight": "identity", "input": "identity"}]}


class TwoLayers(nn.Module):
    """A converted layer between two operations that plain torch can repeat."""

    def __init__(self, **settings):
        super().__init__()
        self.first = QConv3d(3, 4, 3, padding=1, bias=True, **settings)
        self.second = QConv3d(4, 2, 1, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def clip(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 4, 5, 6)))


def only(diagnosis: Diagnosis) -> qconvert.diagnosis.LayerHealth:
    (layer,) = diagnosis.layers
    return layer


def decibels(signal: np.ndarray, noise: np.ndarray) -> float:
    return 10 * math.log10((signal.astype(np.float64) ** 2).sum() / (noise.astype(np.float64) ** 2).sum())


class TestInputs:
    """Shares and constant channels, counted with numpy."""

    threshold = torch.tensor([0.3, -0.2, 9.0])
    spread = torch.tensor([0.5, 1.0, 2.0])

    def diagnosed(self, x: torch.Tensor, window: float | None = 0.8):
        torch.manual_seed(0)
        layer = QConv3d(
            3, 4, 1, threshold=self.threshold, spread=self.spread, gradient_cancellation_threshold=window, scale="channel"
        )
        return only(diagnose(layer, x))

    def shifted(self, x: torch.Tensor) -> np.ndarray:
        threshold, spread = (values.numpy().reshape(-1, 1, 1, 1) for values in (self.threshold, self.spread))
        return (x.numpy() - threshold) / spread

    def test_shares_of_plus_one(self):
        x = clip()
        by_channel = (oracle.sign(self.shifted(x)) == 1).mean((0, 2, 3, 4))
        layer = self.diagnosed(x)
        assert layer.positive == (oracle.sign(self.shifted(x)) == 1).mean()
        assert layer.lowest_positive == by_channel.min() == 0
        assert layer.median_positive == np.median(by_channel)
        assert layer.highest_positive == by_channel.max()

    def test_median_of_an_even_number_of_channels_is_between_the_middle_two(self):
        x = torch.ones(1, 4, 1, 1, 4) * torch.tensor([[-1, -1, -1, 1], [-1, -1, -1, 1], [-1, 1, 1, 1], [1, 1, 1, 1]]).view(
            1, 4, 1, 1, 4
        )
        layer = only(diagnose(QConv3d(4, 1, 1), x))
        assert (layer.lowest_positive, layer.median_positive, layer.highest_positive) == (0.25, 0.5, 1.0)

    @pytest.mark.parametrize("window", [0.8, 2.5])
    def test_share_inside_the_window(self, window: float):
        x = clip()
        assert self.diagnosed(x, window).window == (np.abs(self.shifted(x)) <= np.float32(window)).mean()

    @pytest.mark.parametrize("window", [None, 0])
    def test_a_window_that_is_off_lets_everything_in(self, window: float | None):
        assert self.diagnosed(100 * clip(), window).window == 1

    def test_share_off_zero_is_of_what_comes_in(self):
        x = F.relu(clip())
        assert self.diagnosed(x).nonzero == np.count_nonzero(x.numpy()) / x.numel()

    def test_constant_channels(self):
        x = clip()
        x[:, 1] = 5.0  # constant in the float model too; the last channel is never above its threshold
        layer = self.diagnosed(x)
        assert (layer.channels, layer.constant_channels, layer.lost_channels, layer.float_constant_channels) == (3, 2, 1, 1)
        assert not layer.is_dead

    def test_constant_in_each_sample_is_not_constant_over_the_batch(self):
        x = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1).expand(2, 3, 2, 2, 2)
        assert only(diagnose(QConv3d(3, 1, 1), x)).constant_channels == 0

    def test_a_clip_without_a_batch_dimension(self):
        x = clip(3, 2, 4, 4)
        layer = self.diagnosed(x)
        assert layer == self.diagnosed(x[None])
        assert layer.calls == 1

    def test_wider_inputs_have_no_sign_but_all_the_rest(self):
        x = torch.rand(2, 3, 2, 4, 4) * 0.9
        x[:, 0] /= 10  # rounds to the lowest of four levels
        layer = only(diagnose(QConv3d(3, 2, 1, input_quantization=qconvert.quantizations.InputDoReFa(2)), x))
        assert layer.input_bits == 2
        assert (layer.positive, layer.lowest_positive, layer.median_positive, layer.highest_positive) == (None,) * 4
        assert (layer.constant_channels, layer.lost_channels, layer.window) == (1, 1, 1)
        assert layer.gradient_ratio > 0
        assert math.isfinite(layer.snr_db)

    def test_nan_and_infinity_are_counted_and_named(self):
        x = clip()
        x[0, 0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        diagnosis = diagnose(QConv3d(3, 2, 1), x)
        layer = only(diagnosis)
        signs = oracle.sign(x.numpy())  # of NaN: +1
        assert layer.nonfinite == 3
        assert layer.positive == (signs == 1).mean()
        assert layer.window == (np.abs(x.numpy()) <= 1).mean()  # neither NaN nor infinity is inside
        assert math.isnan(layer.snr_db)
        assert "NaN or infinite inputs:  (3)." in diagnosis.notes()

    def test_an_empty_batch_says_nothing(self):
        layer = only(diagnose(QConv3d(3, 2, 1), torch.empty(0, 3, 2, 2, 2)))
        assert layer.calls == 1
        assert layer.positive is layer.constant_channels is layer.window is layer.gradient_norm is layer.snr_db is None


class TestOutputs:
    """Signal-to-noise ratio and gradients, with the two models written out in plain torch."""

    @staticmethod
    def both(model: TwoLayers, x: torch.Tensor) -> tuple[list, list]:
        """(float outputs, converted outputs) of the two layers, the weights as leaves of a graph of the test's own."""
        one, two = (layer.weight.detach().clone().requires_grad_() for layer in (model.first, model.second))
        bias = model.first.bias.detach()
        first = F.conv3d(x, one, bias, padding=1)
        plain = [first, F.conv3d(torch.tanh(first), two)]
        weights = [one, two]
        border = F.pad(binary(x), [1] * 6, value=-1.0)
        first = F.conv3d(border, binary(one)) + bias.view(-1, 1, 1, 1)
        return plain, [first, F.conv3d(binary(torch.tanh(first), window=1.0), binary(two))], weights

    def test_signal_to_noise_ratio(self):
        model, x = TwoLayers(), clip()
        plain, binary_outputs, _ = self.both(model, x)
        layers = diagnose(model, x).layers
        for layer, wanted, output in zip(layers, plain, binary_outputs, strict=True):
            noise = (wanted - output).detach().numpy()
            assert layer.snr_db == pytest.approx(decibels(wanted.detach().numpy(), noise), abs=1e-4)

    def test_gradient_norms(self):
        model, x = TwoLayers(), clip()
        plain, binary_outputs, weights = self.both(model, x)
        weighting = torch.randn(plain[-1].shape, generator=torch.Generator().manual_seed(0))
        layers = diagnose(model, x).layers
        expected = torch.autograd.grad(plain[-1], weights, weighting)
        seen = torch.autograd.grad(binary_outputs[-1], weights, weighting)
        for layer, float_gradient, gradient in zip(layers, expected, seen, strict=True):
            assert layer.float_gradient_norm == pytest.approx(float_gradient.norm().item(), rel=1e-5)
            assert layer.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-5)
            assert layer.gradient_ratio == layer.gradient_norm / layer.float_gradient_norm

    def test_scale_offset_and_threshold_are_not_of_the_float_model(self):
        x = clip()
        layer = QConv3d(3, 2, 3, padding=1, threshold=0.5, spread=2.0, scale=3.0, offset=0.25)
        wanted = F.conv3d(x, layer.weight, padding=1).detach().numpy()
        border = np.pad(oracle.sign(x.numpy() - 0.5), [(0, 0)] * 2 + [(1, 1)] * 3, constant_values=-1)
        output = 3 * oracle.conv3d(border, oracle.sign(layer.weight.detach().numpy())) + 0.25
        assert only(diagnose(layer, x)).snr_db == pytest.approx(decibels(wanted, wanted - output), abs=1e-4)

    def test_statistics_add_up_over_calls(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = QConv3d(3, 3, 1)

            def forward(self, x):
                return self.conv(x), self.conv(x[:1] + 2)

        model, x = Twice(), clip()
        layer = only(diagnose(model, x))
        calls = [x.numpy(), x[:1].numpy() + 2]
        assert layer.calls == 2
        assert layer.positive == np.mean(np.concatenate([call.ravel() >= 0 for call in calls]))
        weight = model.conv.weight.detach().numpy()
        wanted = [oracle.conv3d(call, weight) for call in calls]
        noise = [w - oracle.conv3d(oracle.sign(call), oracle.sign(weight)) for w, call in zip(wanted, calls, strict=True)]
        joined = (np.concatenate([part.ravel() for part in parts]) for parts in (wanted, noise))
        assert layer.snr_db == pytest.approx(decibels(*joined), abs=1e-4)
        leaf = model.conv.weight.detach().clone().requires_grad_()
        outputs = [F.conv3d(x, leaf), F.conv3d(x[:1] + 2, leaf)]
        generator = torch.Generator().manual_seed(0)
        torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator) for y in outputs])
        assert layer.float_gradient_norm == pytest.approx(leaf.grad.norm().item(), rel=1e-5)

    def test_a_shared_parameter_has_the_gradient_of_each_layer(self):
        tied = nn.Sequential(QConv3d(3, 4, 3), QConv3d(4, 3, 3), QConv3d(3, 4, 3))
        tied[2].weight = tied[0].weight
        untied = nn.Sequential(*(QConv3d.from_float(layer) for layer in tied))
        untied[2].weight = nn.Parameter(tied[2].weight.detach().clone())
        x = clip(1, 3, 7, 7, 7)
        assert diagnose(tied, x) == diagnose(untied, x)

    def test_an_in_place_activation_behind_a_layer_changes_nothing(self):
        first, second, x = QConv3d(3, 4, 3), QConv3d(4, 2, 1, threshold=1.0), clip()
        assert diagnose(nn.Sequential(first, nn.ReLU(inplace=True), second), x) == diagnose(
            nn.Sequential(first, nn.ReLU(), second), x
        )

    def test_layers_that_share_a_quantizer_are_told_apart(self):
        shared = qconvert.quantizations.Sign()
        first, second = (QConv3d(3, 3, 1, input_quantization=shared, weight_quantization=shared) for _ in range(2))
        separate = nn.Sequential(*(QConv3d.from_float(layer) for layer in (first, second)))
        x = clip()
        assert diagnose(nn.Sequential(first, second), x) == diagnose(separate, x)


def binary(x: torch.Tensor, window: float = math.inf) -> torch.Tensor:
    """Sign with the straight-through gradient where |x| is in the window."""
    passed = torch.where(x.detach().abs() <= window, x, x.detach())
    return passed + (torch.where(x < 0, -1.0, 1.0) - passed).detach()


class TestIdentity:
    """A conversion that changes nothing is healthy without a rounding error."""

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_r3d_18(self, training: bool):
        diagnosis = diagnose(binarize(r3d_18(), IDENTITY, report=False).train(training), clip(1, 3, 4, 32, 32))
        assert len(diagnosis.layers) == 20
        assert {layer.snr_db for layer in diagnosis.layers} == {math.inf}
        assert {layer.gradient_ratio for layer in diagnosis.layers} == {1.0}
        assert {layer.lost_channels for layer in diagnosis.layers} == {0}
        assert {layer.window for layer in diagnosis.layers} == {1.0}

    def test_random_draws_are_the_same_in_both_runs(self):
        seeded()
        diagnosis = diagnose(binarize(Stochastic(), IDENTITY, report=False).train(), clip(2, 2, 4, 6, 6))
        assert {layer.snr_db for layer in diagnosis.layers if layer.calls} == {math.inf}


def test_plain_signs_behind_a_relu_are_dead():
    with pytest.warns(UserWarning, match="see a constant"):
        model = binarize(r3d_18(), "bitorch", report=False)
    diagnosis = diagnose(model.eval(), clip(1, 3, 4, 32, 32))
    assert len(diagnosis.layers) == 20
    assert diagnosis.dead == tuple(layer.name for layer in diagnosis.layers[1:])
    assert {layer.positive for layer in diagnosis.layers[1:]} == {1.0}
    assert diagnosis.title == "VideoResNet: 20 converted Conv3d, 19 dead (a constant input)"
    assert any(note.startswith("Dead: layer1.0.conv1.0, ") and 'threshold = "auto"' in note for note in diagnosis.notes())


class TestNoGradient:
    """What cannot be measured is "-" with a reason, never a 0."""

    def test_frozen_weight(self):
        model = TwoLayers()
        model.first.weight.requires_grad_(requires_grad=False)
        first, second = diagnose(model, clip()).layers
        assert first.gradient_norm is first.float_gradient_norm is first.gradient_ratio is None
        assert second.gradient_norm > 0

    def test_a_weight_that_no_gradient_reaches_has_a_gradient_of_0(self):
        class Detached(TwoLayers):
            def forward(self, x):
                return self.second(torch.tanh(self.first(x)).detach())

        first, second = diagnose(Detached(), clip()).layers
        assert (first.gradient_norm, first.float_gradient_norm, first.gradient_ratio) == (0.0, 0.0, None)
        assert second.gradient_norm > 0

    def test_an_in_place_operation_that_only_the_float_model_minds(self):
        class InPlace(TwoLayers):
            def forward(self, x):
                y = self.first(x) + 0
                z = self.second(y)
                y.add_(1)  # a float convolution keeps its input for the gradient; a sign keeps nothing
                return z

        model = InPlace()
        model.second.activation.gradient_cancellation_threshold = None
        diagnosis = diagnose(model, clip())
        assert all(layer.gradient_norm > 0 for layer in diagnosis.layers)
        assert [layer.float_gradient_norm for layer in diagnosis.layers] == [None, None]
        (remark,) = diagnosis.remarks
        assert remark.startswith("No gradients of the float model: RuntimeError: one of the variables needed for gradient")
        assert all(math.isfinite(layer.snr_db) for layer in diagnosis.layers)

    def test_a_forward_that_runs_only_without_gradients(self):
        class Written(TwoLayers):
            def forward(self, x):
                self.second.weight.mul_(2)  # autograd refuses: a leaf
                return super().forward(x)

        model = Written()
        latent = model.second.weight.detach().clone()
        diagnosis = diagnose(model, clip())
        assert [layer.gradient_norm for layer in diagnosis.layers] == [None, None]
        assert [remark.partition(": ")[0] for remark in diagnosis.remarks] == [
            "No gradients of the model",
            "No gradients of the float model",
        ]
        assert torch.equal(model.second.weight, latent)

    def test_outputs_without_a_gradient(self):
        class Classes(TwoLayers):
            def forward(self, x):
                return super().forward(x).argmax(1)

        diagnosis = diagnose(Classes(), clip())
        assert diagnosis.remarks[0] == "No gradients of the model: no output requires a gradient."
        assert [layer.gradient_norm for layer in diagnosis.layers] == [None, None]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_the_callers_mode_does_not_matter(self, mode):
        torch.manual_seed(0)
        expected = diagnose(TwoLayers(), clip())
        with mode():
            torch.manual_seed(0)
            assert diagnose(TwoLayers(), clip()) == expected  # model and batch made in that mode
        assert expected.layers[0].gradient_norm > 0

    @pytest.mark.filterwarnings("ignore:None of the inputs")
    @pytest.mark.parametrize("kind", [Checkpointed, CheckpointedByHooks])
    def test_checkpointing_does_not_call_twice(self, kind: type[nn.Module]):
        model = binarize(kind(), SIGNS, report=False).eval()
        plain = nn.Sequential(model.stem, model.block)
        x = clip(2, 2, 4, 6, 6)
        values = [[*vars(layer).values()][1:] for layer in diagnose(model, x).layers]  # all but the name
        assert values == [[*vars(layer).values()][1:] for layer in diagnose(plain, x).layers]
        assert [row[1] for row in values] == [1, 1]


class TestReach:
    def test_a_layer_that_is_never_called(self):
        class Idle(TwoLayers):
            def __init__(self):
                super().__init__()
                self.idle = QConv3d(3, 5, 1)

        diagnosis = diagnose(Idle(), clip())
        idle = diagnosis.layers[2]
        assert {name: value for name, value in vars(idle).items() if value is not None} == {
            "name": "idle",
            "input_bits": 1,
            "calls": 0,
            "channels": 3,
        }
        assert "Not reached: idle." in diagnosis.notes()
        assert "idle" not in diagnosis.dead

    def test_a_layer_that_runs_another_way_in_the_float_model_is_not_compared(self):
        class ByValue(TwoLayers):
            def forward(self, x):
                y = self.first(x)
                return self.second(y[:1] if y.abs().max() > 20 else y)

        first, second = diagnose(ByValue(), clip()).layers  # sums of 81 signs are above 20
        assert math.isfinite(first.snr_db)
        assert second.snr_db is None
        assert second.positive is not None

    def test_no_converted_layer(self):
        with pytest.raises(ModelError, match=r"Sequential has no QConv3d to diagnose: convert it with qconvert\.binarize"):
            diagnose(nn.Sequential(nn.Conv3d(3, 4, 1)), clip())

    def test_a_batch_that_does_not_fit(self):
        message = (
            r"TwoLayers does not run on the batch \(1, 5, 2, 2, 2\) torch.float32: RuntimeE.*Pass one that fits: a tensor"
        )
        with pytest.raises(InputError, match=f"(?s){message}"):
            diagnose(TwoLayers(), clip(1, 5, 2, 2, 2))

    def test_float_and_transposed_convolutions_have_no_row(self):
        model = nn.Sequential(nn.Conv3d(3, 3, 1), QConv3d(3, 3, 1), nn.ConvTranspose3d(3, 3, 1))
        assert [layer.name for layer in diagnose(model, clip()).layers] == ["1"]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_other_dtypes(self, dtype: torch.dtype):
        layer = only(diagnose(QConv3d(3, 4, 3, dtype=dtype, threshold=0.25), clip().to(dtype)))
        assert math.isfinite(layer.snr_db)
        assert layer.gradient_ratio > 0

    def test_compiled_and_parallel_models_are_unwrapped(self):
        model, x = TwoLayers(), clip()
        assert diagnose(torch.compile(model), x) == diagnose(nn.DataParallel(model), x) == diagnose(model, x)

    @pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:None of the inputs", "ignore:1 of 8 converted layers")
    @pytest.mark.parametrize("entry", TRAPS, ids=lambda entry: entry.name)
    def test_traps(self, entry):
        seeded()
        model = binarize(entry.build(), {"rule": [{**SIGNS["rule"][0], "optional": True}]}, report=False)
        if not any(isinstance(module, QConv3d) for module in model.modules()):
            pytest.skip("nothing to convert")
        inputs = entry.inputs()
        before = _everything(model)
        diagnosis = diagnose(model, inputs)
        assert any(layer.calls and layer.snr_db is not None for layer in diagnosis.layers)
        assert diagnosis == diagnose(model, inputs)
        assert _everything(model) == before


def _everything(model: nn.Module) -> dict:
    """What a run could change; tensors by their bytes."""
    return {
        "state": {
            name: (id(t), t._version, t.detach().numpy().tobytes()) for name, t in model.state_dict(keep_vars=True).items()
        },
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "attributes": {name: {key: id(value) for key, value in vars(m).items()} for name, m in model.named_modules()},
        "hooks": {
            name: [list(getattr(m, hooks)) for hooks in vars(m) if hooks.endswith("_hooks")]
            for name, m in model.named_modules()
        },
    }


class TestNothingChanges:
    def model(self) -> nn.Module:
        return nn.Sequential(
            QConv3d(3, 4, 3, threshold=0.5, scale="channel", offset=0.1),
            nn.BatchNorm3d(4),
            nn.ReLU(inplace=True),
            nn.Dropout3d(0.5),
            QConv3d(4, 2, 1, weight_quantization="lsq"),
        )

    def test_model(self):
        model = self.model()
        model[1].eval()
        before = _everything(model)
        diagnose(model, clip())
        assert _everything(model) == before
        assert all(p.grad is None for p in model.parameters())

    def test_gradients_that_are_there_stay(self):
        model = self.model()
        model(clip()).sum().backward()
        gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
        diagnose(model, clip())
        assert all(p.grad is gradients[name][0] for name, p in model.named_parameters())
        assert all(torch.equal(*pair) for pair in gradients.values())

    def test_hooks_are_not_called(self):
        model, seen = self.model(), []
        for module in model.modules():
            module.register_forward_hook(lambda *_: seen.append("forward"))
            module.register_forward_pre_hook(lambda *_: seen.append("before"))
            module.register_full_backward_hook(lambda *_: seen.append("backward"))
        model[0].weight.register_hook(lambda _: seen.append("tensor"))
        model[0].weight.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
        assert all(layer.gradient_norm > 0 for layer in diagnose(model, clip()).layers)
        assert seen == []

    def test_random_numbers(self):
        model, x = self.model(), clip()
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        expected = diagnose(model, x)
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        assert diagnose(model, x) == expected  # nor do they matter

    def test_batch_statistics_are_those_of_the_mode(self):
        model, x = self.model(), 5 + clip()
        training = diagnose(model, x)
        assert model[1].num_batches_tracked == 0
        assert diagnose(model.eval(), x).layers[1] != training.layers[1]

    def test_the_batch(self):
        model = binarize(MutatedInputs(), SIGNS, report=False)
        batch = next(entry for entry in TRAPS if entry.build is MutatedInputs).inputs()
        held = list(batch)
        copies = [tensor.clone() for tensor in batch]
        diagnose(model, batch)
        assert [id(tensor) for tensor in batch] == [id(tensor) for tensor in held]
        assert all(torch.equal(*pair) for pair in zip(batch, copies, strict=True))

    def test_a_batch_with_a_history(self):
        leaf = clip().requires_grad_()
        diagnose(TwoLayers(), leaf * 1)
        diagnose(TwoLayers(), leaf)
        assert leaf.grad is None

    def test_what_a_model_keeps_between_calls(self):
        model = binarize(Cache(), SIGNS, report=False)
        model(clip(2, 2, 4, 6, 6))
        kept = {name: id(value) for name, value in vars(model).items()}
        diagnose(model, clip(2, 2, 4, 6, 6))
        assert {name: id(value) for name, value in vars(model).items()} == kept


def test_forms_of_a_batch():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = QConv3d(3, 2, 1)

        def forward(self, x, y=None):
            return self.conv(x[0] + x[1] if isinstance(x, list) else x if y is None else x + y)

    model, x, y = Sum(), clip(), clip()
    expected = diagnose(model, x + y)
    for batch in ((x, y), {"x": x, "y": y}, [x, y]):
        assert diagnose(model, batch) == expected


class TestFormats:
    @staticmethod
    def diagnosis() -> Diagnosis:
        torch.manual_seed(0)
        model = nn.Sequential(
            QConv3d(
                3, 4, 3, input_quantization="identity", weight_quantization="identity", gradient_cancellation_threshold=0
            ),
            nn.ReLU(),
            QConv3d(4, 2, 1, scale=1e-4),
        )
        return diagnose(model, clip())

    def test_text(self):
        text = self.diagnosis().to_text()
        assert text == str(self.diagnosis())
        table = text.split("\n\n")[1].splitlines()
        headers = [
            "layer",
            "+1",
            "+1 min",
            "+1 median",
            "+1 max",
            "channels",
            "constant",
            "lost",
            "window",
            "gradient",
            "SNR (dB)",
        ]
        assert re.split("  +", table[0].strip()) == headers
        cells = [line.split() for line in table[2:]]
        assert cells[0] == ["0", "-", "-", "-", "-", "3", "0", "0", "1", cells[0][9], "inf"]
        assert cells[1][:8] == ["2", "1", "1", "1", "1", "4", "4", "4"]
        ratio = self.diagnosis().layers[1].gradient_ratio
        assert 0 < ratio < 0.001
        assert cells[1][9] == f"{ratio:.3g}"  # not 0.00

    def test_the_table_fits_a_terminal(self):
        with pytest.warns(UserWarning, match="see a constant"):
            model = binarize(r3d_18(), "bitorch", report=False)
        table = diagnose(model, clip(1, 3, 4, 32, 32)).to_text().split("\n\n")[1]
        assert max(map(len, table.splitlines())) <= 140

    def test_json_is_json(self):
        diagnosis = self.diagnosis()

        def refuse(constant: str):
            raise AssertionError(constant)

        read = json.loads(diagnosis.to_json(), parse_constant=refuse)
        assert read["layers"][0]["snr_db"] == "inf"
        assert read["layers"][1] == diagnosis.layers[1].to_dict()
        assert read["dead"] == ["2"]

    def test_csv_and_markdown_have_every_number_exact(self):
        diagnosis = self.diagnosis()
        rows = list(csv.DictReader(io.StringIO(diagnosis.to_csv())))
        assert [float(row["gradient"]) for row in rows] == [layer.gradient_ratio for layer in diagnosis.layers]
        assert [float(row["SNR (dB)"]) for row in rows] == [layer.snr_db for layer in diagnosis.layers]
        assert [int(row["calls"]) for row in rows] == [1, 1]
        header = next(line for line in diagnosis.to_markdown().splitlines() if line.startswith("|"))
        assert [cell.strip() for cell in header.strip("|").split("|")] == list(rows[0])


def test_scalars_are_read_back_by_tensorboard(tmp_path):
    model = nn.Sequential(QConv3d(3, 4, 1, input_quantization="lsq"), nn.ReLU(), QConv3d(4, 2, 1))
    model[0].weight.requires_grad_(requires_grad=False)
    diagnosis = diagnose(model, clip())
    with SummaryWriter(tmp_path) as writer:
        for tag, value in diagnosis.scalars().items():
            writer.add_scalar(tag, value, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    read = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read.pop("dead") == [(7, 1.0)]
    measures = ("calls", "positive", "lowest_positive", "median_positive", "highest_positive", "constant_channels")
    measures += ("lost_channels", "float_constant_channels", "nonzero", "window", "nonfinite")
    measures += ("gradient_norm", "float_gradient_norm", "gradient_ratio", "snr_db")
    expected = {f"{what}/{layer.name}": getattr(layer, what) for layer in diagnosis.layers for what in measures}
    assert {tag for tag, value in expected.items() if value is None} > {"positive/0", "gradient_norm/0"}
    assert read == {tag: [(7, pytest.approx(value))] for tag, value in expected.items() if value is not None}


def test_scalars_of_a_layer_without_a_name():
    scalars = diagnose(QConv3d(3, 4, 1), clip()).scalars()
    assert scalars["calls"] == 1.0
    assert scalars["dead"] == 0.0
