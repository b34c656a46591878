"""`observe`: one run of a copy of a converted model, as it is or as its float counterpart, and what each layer saw in it.

Hooks count while the values come by: what is kept are sums, the gradients of the latent weights, and the float outputs.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, QConvertError, first_line
from .example import FORMS, arguments, copied_inputs, refused, tensors_in
from .layers import QActivation, QConv3d
from .quantizations import Identity
from .rng import preserved_rng
from .trace import copied, drop_foreign_hooks


class Observer:
    """What one layer of a copy sees, counted while it runs.

    Args:
        layer: the layer.
        expected: what was seen of that layer in the float model, whose outputs are compared with. None: keep the outputs.
    """

    def __init__(self, layer: QConv3d, expected: "Observer | None" = None) -> None:
        # of their own: layers may share a quantizer
        layer.activation = copied(layer.activation)  # type: ignore[assignment]
        layer._weight_quantize = copied(layer._weight_quantize)  # type: ignore[assignment]
        self.channels = layer.in_channels
        self.input_bits = layer.activation.activation_function.bit_width
        self.window = layer.activation.gradient_cancellation_threshold or math.inf
        self.calls = self.values = self.nonzero = self.nonfinite = self.inside = 0
        self.positive = torch.zeros(self.channels, dtype=torch.int64)
        self.lowest = torch.full((self.channels,), math.inf, dtype=torch.float32)
        self.highest = -self.lowest
        self.expected = expected
        self.outputs: list[Tensor] = []
        self.compared = 0
        self.is_comparable = True
        self.signal = self.noise = 0.0
        self.is_trained = False
        self.gradient: Tensor | None = None
        self._handles = [
            layer.activation.register_forward_pre_hook(self._see_input),
            layer.activation.activation_function.register_forward_hook(self._see_quantized),
            layer.register_forward_hook(self._see_output),
        ]
        vars(layer)["_quantized_conv"] = partial(self._see_weight, layer)

    def close(self) -> None:
        """End the counting: what checkpointing repeats in the backward pass is no further call."""
        for handle in self._handles:
            handle.remove()

    @property
    def constant(self) -> Tensor:
        """For each channel, whether its quantized input has one value."""
        return self.lowest == self.highest

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the latent weight's gradient, summed over the calls; None for a frozen weight."""
        if self.gradient is None:
            return 0.0 if self.is_trained else None
        return self.gradient.double().norm().item() if self.is_trained else None

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio of the output; None where the float model's layer ran another way."""
        if self.expected is None or not self.is_comparable or self.compared != len(self.expected.outputs):
            return None
        ratio = self.signal / self.noise if self.noise else math.inf
        return 10 * math.log10(ratio) if ratio else -math.inf

    def _see_input(self, _activation: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        self.calls += 1
        self.values += x.numel()
        self.nonzero += int(x.count_nonzero())
        self.nonfinite += x.numel() - int(x.isfinite().sum())

    def _see_quantized(self, _quantizer: nn.Module, args: tuple[Tensor, ...], quantized: Tensor) -> None:
        self.inside += int((args[0].detach().abs() <= self.window).sum())
        channels = quantized.detach().movedim(-4, 0).flatten(1)
        if channels.numel():
            self.positive += (channels > 0).sum(1).cpu()
            lowest, highest = channels.aminmax(dim=1)
            self.lowest = torch.minimum(self.lowest, lowest.cpu())
            self.highest = torch.maximum(self.highest, highest.cpu())

    def _see_output(self, _layer: nn.Module, _args: object, output: object) -> None:
        for tensor in tensors_in(output):
            if self.expected is None:
                self.outputs.append(tensor.detach().to("cpu", copy=True))
            else:
                self._compare(tensor.detach().cpu(), self.expected.outputs[self.compared : self.compared + 1])

    def _compare(self, output: Tensor, counterpart: list[Tensor]) -> None:
        self.compared += 1
        if [expected.shape for expected in counterpart] != [output.shape]:
            self.is_comparable = False
            return
        wanted = counterpart[0].double()
        self.signal += wanted.square().sum().item()
        self.noise += (output.double() - wanted).square().sum().item()

    def _see_weight(self, layer: QConv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Stand in for the layer's ``_quantized_conv``."""
        self.is_trained |= weight.requires_grad
        # an alias, whose gradient is of this call alone: layers may share a weight
        alias = weight.view_as(weight)
        if alias.requires_grad:
            alias.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]
        output: Tensor = type(layer)._quantized_conv(layer, x, alias, bias)
        return output

    def _see_gradient(self, gradient: Tensor) -> None:
        self.gradient = gradient.clone() if self.gradient is None else self.gradient + gradient


Observers = Mapping[str, Observer]
"""One for each QConv3d, by its name."""


def converted_layers(model: nn.Module) -> Iterator[tuple[str, QConv3d]]:
    """Yield every QConv3d with its name."""
    for name, module in model.named_modules():
        if isinstance(module, QConv3d):
            yield name, module


def observe(model: nn.Module, batch: Any, expected: Observers | None = None) -> tuple[Observers, str | None]:
    """Return what each layer saw, and why there are no gradients, if so.

    Args:
        model: a converted model; it is not changed.
        batch: its input, in the form of example inputs.
        expected: what the float counterpart's layers saw; None runs that counterpart.

    Raises:
        InputError: if the model does not run on the batch.
    """
    try:
        return _run(model, batch, expected)
    except QConvertError:
        raise
    except Exception as first:  # noqa: BLE001 (a user's forward may raise anything)
        # autograd refuses some in-place operations while the forward runs
        try:
            with torch.no_grad():
                return _run(model, batch, expected)[0], first_line(first)
        except Exception as error:
            raise InputError(f"{refused(model, 'the batch', batch, error)}. Pass one that fits: {FORMS}") from error


def _run(model: nn.Module, batch: Any, expected: Observers | None) -> tuple[Observers, str | None]:
    with preserved_rng(seed=0):
        trial = copied(model)
        drop_foreign_hooks(trial)
        for module in trial.modules():
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        observers = {}
        for name, layer in converted_layers(trial):
            if expected is None:
                make_float(layer)
            observers[name] = Observer(layer, None if expected is None else expected[name])
        args, kwargs = arguments(copied_inputs(batch))
        outputs = trial(*args, **kwargs)
        for observer in observers.values():
            observer.close()
        failure = _backward(outputs)
    if failure:
        for observer in observers.values():
            observer.is_trained = False
    return observers, failure


def make_float(layer: QConv3d) -> None:
    """Turn a layer of a copy back into the convolution that it was made of, bit for bit."""
    layer.activation = QActivation("identity", None)
    layer._weight_quantize = Identity()
    layer.scale = layer.offset = layer.rprelu = None
    layer.standardize = layer.shortcut = False
    layer.pad_value = 0.0


def _backward(outputs: Any) -> str | None:
    """Run the backward pass of a fixed random weighting of the outputs; return why there is none, if so."""
    generator = torch.Generator().manual_seed(0)
    floating = [y for y in tensors_in(outputs) if y.is_floating_point() or y.is_complex()]
    # drawn for all of them: both models get the same, whichever outputs require a gradient
    weightings = [torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device) for y in floating]
    differentiable = [(y, weighting) for y, weighting in zip(floating, weightings, strict=True) if y.requires_grad]
    if not differentiable:
        return "no output requires a gradient"
    try:
        torch.autograd.backward([y for y, _ in differentiable], [weighting for _, weighting in differentiable])
    except Exception as error:  # noqa: BLE001 (RuntimeError after an in-place operation, anything from a user's Function)
        return first_line(error)
    return None
