"""`QConv3d` and `QConv3d_NoAct`: 3D convolution with quantized weights and inputs."""

from functools import partial
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own idiom)
from torch import Tensor, nn

from ..derived import below_parametrizations
from ..errors import ModelError, QuantizerError
from ..quantizations import Identity, Quantization, quantizer
from ..quantizations.staged import at_work
from .computed import is_trained
from .fused import computes_in, fused
from .padding import Size, padding_amounts
from .qactivation import QActivation
from .rprelu import RPReLU
from .shortcut import no_shortcut
from .standardization import fitted_scale, latent
from .subclass import obstacle, own_state, quantized_class

Part = TypeVar("Part", bound=nn.Module)
torch.fx.wrap("computes_in")  # whether autocast is on is asked when a traced model runs

_KERNEL_DIMS = 3
Start = float | Tensor | None
"""What a setting per channel starts from: one number for all, or one for each."""
ScaleStart = str | Start


def conv3d(
    input: Tensor,  # noqa: A002 (the name in F.conv3d)
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    pad_value: float = 0.0,
) -> Tensor:
    """Convolve like `torch.nn.functional.conv3d`, padding with ``pad_value``.

    Shapes: input (N, C, D, H, W) or (C, D, H, W), weight (O, C / groups, kD, kH, kW), output (N, O, D', H', W').
    Where ``pad_value`` is 0 the convolution's own padding is used, and nothing is copied then, nor where nothing is padded.
    """
    if pad_value != 0.0 and padding not in (0, (0, 0, 0), "valid"):
        # one size after the other: under torch.fx the shape is a Proxy, which cannot be iterated over
        kernel_size = tuple(weight.shape[dim] for dim in (-3, -2, -1))
        input = F.pad(input, padding_amounts(padding, kernel_size, dilation), value=pad_value)  # noqa: A001
        padding = 0
    return F.conv3d(input, weight, bias, stride, padding, dilation, groups)


def per_channel(output: Tensor, scale: Tensor | None, *summands: Tensor | None) -> Tensor:
    """Return the output of a convolution times the scale plus the summands, each of shape (O,) or None for none."""
    if scale is not None:
        output = output * scale.view(-1, 1, 1, 1)
    for summand in summands:
        if summand is not None:
            output = output + summand.view(-1, 1, 1, 1)
    return output


def default_pad_value(inputs: Quantization) -> float:
    """Return the border's value where none is given: -1, which has a code, for inputs of 1 bit, else 0."""
    return -1.0 if inputs.bit_width == 1 else 0.0


class QConv3d_NoAct(nn.Conv3d):  # noqa: N801 (bitorch's name)
    """3D convolution with quantized weights; its input is taken as it comes.

    Forward: ``y = scale * conv3d(pad(x), Q_w(weight)) + offset + bias``, all three per output channel, in float, after the
    convolution; then the shortcut, ``y + x``, and RPReLU, where they are on. Gradient: that of the convolution, times that
    of Q_w for the latent weight.

    Shapes: as `torch.nn.Conv3d`: (N, C, D, H, W) or (C, D, H, W) in, (N, O, D', H', W') or (O, D', H', W') out.

    Padding: with ``padding_mode="zeros"`` the border is filled with ``pad_value``; where that is 0 the convolution's own
    padding is used. The other padding modes and ``padding="same"`` mean what they mean in torch.

    Semantics of bitorch's layer of that name (https://github.com/hpi-xnor/bitorch); docs/semantics.md lists the
    differences. The scale is XNOR-Net's (Rastegari et al. 2016, https://arxiv.org/abs/1603.05279): without a start given it
    is the least-squares fit of ``scale * Q_w(weight)`` to the weight, which for the sign is mean |weight|. It is learned,
    and so is the offset.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype: as Conv3d.
        bias: as Conv3d, but off by default.
        weight_quantization: quantizer of the weight, by name or as a module.
        pad_value: value of the border; None is -1, which has a 1-bit code where the input is binary.
        scale: a learned factor per output channel: ``"channel"`` for one that starts at the fit, or its start as a number or
            a tensor of shape (O,). None is no factor.
        offset: a learned summand per output channel: its start as a number or a tensor of shape (O,). None is no summand.
        standardize: whether the weight less its mean and over its standard deviation, per output channel, is quantized in
            the latent weight's place (IR-Net, Qin et al. 2020, https://arxiv.org/abs/1909.10788).
        shortcut: whether the input, as the convolution reads it before any quantizer, is added to the output (Bi-Real Net,
            Liu et al. 2018, https://arxiv.org/abs/1808.00278). It takes equal channels and sizes.
        rprelu: whether an `RPReLU` comes last (ReActNet, Liu et al. 2020).
        latent_clip: half-width of the range to which the training clips the latent weight; None is no clipping. The layer
            itself only holds it.

    Raises:
        QuantizerError: for an unknown quantizer, scale or offset, a shortcut between unequal shapes, or a clip of 0 or less.
    """

    scale: nn.Parameter | None
    offset: nn.Parameter | None
    rprelu: RPReLU | None
    _last_signs: Tensor | None = None
    _default_pad_value = -1.0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_quantization: str | Quantization = "sign",
        pad_value: float | None = None,
        scale: ScaleStart = None,
        offset: Start = None,
        standardize: bool = False,
        shortcut: bool = False,
        rprelu: bool = False,
        latent_clip: float | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]  # sizes of three, which mypy cannot know
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]  # a Literal in torch's stubs
            device,
            dtype,
        )
        QConv3d_NoAct._quantize(
            self,
            weight_quantization=weight_quantization,
            pad_value=pad_value,
            scale=scale,
            offset=offset,
            standardize=standardize,
            shortcut=shortcut,
            rprelu=rprelu,
            latent_clip=latent_clip,
        )

    @classmethod
    def from_float(cls, conv: nn.Conv3d, **settings: Any) -> Self:
        """Return the layer that quantizes ``conv``: the same Parameters, buffers, hooks and attributes, nothing copied.

        Args:
            conv: a Conv3d, or an instance of a subclass, whose class the result then derives from as well.
            settings: the keyword-only arguments of the constructor.

        Raises:
            ModelError: if ``conv`` is no Conv3d, or one that cannot be quantized (`obstacle` says why).
            QuantizerError: as the constructor.
        """
        if not isinstance(conv, nn.Conv3d):
            raise ModelError(f"from_float takes a Conv3d, got {type(conv).__name__}")
        hindrance = None if isinstance(conv, QConv3d_NoAct) else obstacle(conv)
        if hindrance is not None:
            raise ModelError(f"this {type(conv).__name__} cannot be quantized: {hindrance}")
        layer_class: type[Self] = below_parametrizations(conv, partial(quantized_class, layer=cls))
        layer = layer_class.__new__(layer_class)
        vars(layer).update(own_state(conv))
        layer._quantize(**settings)
        return layer

    def _quantize(
        self,
        *,
        weight_quantization: str | Quantization = "sign",
        pad_value: float | None = None,
        scale: ScaleStart = None,
        offset: Start = None,
        standardize: bool = False,
        **around: Any,
    ) -> None:
        if isinstance(scale, str) and scale != "channel":
            raise QuantizerError(f'scale must be "channel", a number, a tensor or None, got {scale!r}')
        self.standardize = standardize
        self._weight_quantize = self._placed(quantizer(weight_quantization))
        self._start_quantizer()
        if pad_value is not None and not isinstance(pad_value, (int, float)):
            raise QuantizerError(f"pad_value must be a number or None, got {pad_value!r}")
        self.pad_value = self._default_pad_value if pad_value is None else float(pad_value)
        fitted = self._fitted_scale() if isinstance(scale, str) else scale
        for name, start in (("scale", fitted), ("offset", offset)):
            values = self._start(name, start, self.out_channels)
            learned = None if values is None else nn.Parameter(values, requires_grad=is_trained(self))
            self.register_parameter(name, learned)
        self._surround(**around)

    def _surround(self, *, shortcut: bool = False, rprelu: bool = False, latent_clip: float | None = None) -> None:
        """Set what is no part of the convolution."""
        hindrance = no_shortcut(self) if shortcut else None
        if hindrance is not None:
            raise QuantizerError(f"no shortcut: the input cannot be added to the output, {hindrance}. Leave it out")
        if latent_clip is not None and not (isinstance(latent_clip, (int, float)) and latent_clip > 0):
            raise QuantizerError(f"latent_clip must be a number above 0 or None, got {latent_clip!r}")
        self.shortcut = shortcut
        self.register_module("rprelu", self._placed(RPReLU(self.out_channels)) if rprelu else None)
        self.latent_clip = latent_clip

    def _start_quantizer(self) -> None:
        self._weight_quantize.start_from(latent(self.weight.detach(), standardize=self.standardize))

    def _fitted_scale(self) -> Tensor:
        return fitted_scale(self._weight_quantize, self.weight, standardize=self.standardize)

    def _placed(self, module: Part) -> Part:
        """Return the module as the layer is: its device, dtype and mode; frozen where its weight is."""
        placed = module.to(self.weight.device, self.weight.dtype).train(self.training)
        return placed.requires_grad_(is_trained(self))

    def _start(self, name: str, start: Start, channels: int) -> Tensor | None:
        """Return the start of a setting per channel as a tensor of its own, as the layer is."""
        if start is None:
            return None
        if not isinstance(start, (int, float, Tensor)):
            raise QuantizerError(f"{name} must be a number, a tensor or None, got {start!r}")
        values = torch.as_tensor(start, device=self.weight.device, dtype=self.weight.dtype)
        if values.shape not in ((), (1,), (channels,)):
            raise QuantizerError(f"{name} must have {channels} values or 1, got shape {tuple(values.shape)}")
        return values.detach().expand(channels).clone()

    def reset_parameters(self) -> None:
        """Start the weight anew (Xavier normal), and what depends on it."""
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if hasattr(self, "_weight_quantize"):  # not yet while Conv3d's constructor runs
            self._start_quantizer()
            if self.scale is not None:
                self.scale.data.copy_(self._fitted_scale())
            if self.offset is not None:
                nn.init.zeros_(self.offset)
            if self.rprelu is not None:
                self.rprelu.reset_parameters()

    def _apply_padding(self, x: Tensor) -> Tensor:
        """Return ``x`` with its border, as the convolution sees it."""
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return F.pad(x, padding_amounts(self.padding, self.kernel_size, self.dilation), value=self.pad_value)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 (Conv3d's name)
        # here, not in forward: a subclass may end in super().forward(x) or in self._conv_forward(x, weight, bias)
        output = self._quantized_conv(input, weight, bias)
        if self.shortcut:
            output = output + input
        return output if self.rprelu is None else self.rprelu(output)

    def _quantized_conv(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        """Return what there is before shortcut and RPReLU."""
        quantized = self._weight_quantize(latent(weight, standardize=self.standardize))
        # with float weights there is no exact integer sum to keep apart from the bias: leave it to the convolution
        is_float = isinstance(at_work(self._weight_quantize), Identity) and self.scale is None
        inner_bias, outer_bias = (bias, None) if is_float else (None, bias)
        padding: str | Size = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._apply_padding(input), 0  # noqa: A001
        output = conv3d(
            input, quantized, inner_bias, self.stride, padding, self.dilation, self.groups, pad_value=self.pad_value
        )
        return per_channel(output, self.scale, self.offset, outer_bias)

    def extra_repr(self) -> str:
        """Show Conv3d's arguments, the border value, what is per channel, and the settings that are on."""
        learned = "".join(f", {name}=per channel" for name in ("scale", "offset") if getattr(self, name) is not None)
        on = "".join(f", {name}=True" for name in ("standardize", "shortcut") if getattr(self, name))
        clip = "" if self.latent_clip is None else f", latent_clip={self.latent_clip:g}"
        shape: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shape}, pad_value={self.pad_value:g}{learned}{on}{clip}"


class QConv3d(QConv3d_NoAct):
    """3D convolution with quantized weights and inputs.

    Forward: ``y = scale * conv3d(pad(Q_in(u)), Q_w(weight)) + offset + bias``, ``u = (x - threshold) / spread``; then
    the shortcut, ``y + x``, and RPReLU, where they are on. The border is added after the input quantizer: -1 where that has
    1 bit, 0 where it has more.
    Gradient: to u that of Q_in where ``|u| <= gradient_cancellation_threshold``, else 0; to the latent weight that of Q_w.

    Shapes: as `torch.nn.Conv3d`: (N, C, D, H, W) or (C, D, H, W) in, (N, O, D', H', W') or (O, D', H', W') out.

    Cost of a binary layer: 1 bit per weight; its multiply-accumulates are XNOR and popcount.

    Semantics of bitorch's layer of that name (https://github.com/hpi-xnor/bitorch); docs/semantics.md lists the differences.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype: as Conv3d.
        bias: as Conv3d, but off by default.
        input_quantization: quantizer of the input, by name or as a module.
        weight_quantization: quantizer of the weight, by name or as a module.
        gradient_cancellation_threshold: half-width of the window in which the input gradient passes; None or 0 is off.
        pad_value: value of the border; None is -1 for a 1-bit input quantizer and 0 for any other.
        threshold: what is taken off the input before it is quantized, learned per input channel: its start as a number
            or a tensor of shape (C,). None is no threshold.
        spread: what the input is divided by then, per input channel: a positive number or a tensor of shape (C,), which is
            not learned. None is 1.
        scale: a learned factor per output channel: ``"channel"`` for one that starts at the fit, or its start as a number or
            a tensor of shape (O,). None is no factor.
        offset: a learned summand per output channel: its start as a number or a tensor of shape (O,). None is no summand.
        standardize: whether the weight less its mean and over its standard deviation, per output channel, is quantized in
            the latent weight's place (IR-Net, Qin et al. 2020, https://arxiv.org/abs/1909.10788).
        shortcut: whether the input, as the convolution reads it before any quantizer, is added to the output (Bi-Real Net,
            Liu et al. 2018, https://arxiv.org/abs/1808.00278). It takes equal channels and sizes.
        rprelu: whether an `RPReLU` comes last (ReActNet, Liu et al. 2020).
        latent_clip: half-width of the range to which the training clips the latent weight; None is no clipping. The layer
            itself only holds it.

    Raises:
        QuantizerError: for an unknown quantizer, a negative window, a start of the wrong shape, a shortcut between unequal
            shapes, or a clip of 0 or less.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_quantization: str | Quantization = "sign",
        weight_quantization: str | Quantization = "sign",
        gradient_cancellation_threshold: float | None = 1.0,
        pad_value: float | None = None,
        threshold: Start = None,
        spread: Start = None,
        scale: ScaleStart = None,
        offset: Start = None,
        standardize: bool = False,
        shortcut: bool = False,
        rprelu: bool = False,
        latent_clip: float | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            weight_quantization=weight_quantization,
            pad_value=pad_value,
            scale=scale,
            offset=offset,
            standardize=standardize,
            shortcut=shortcut,
            rprelu=rprelu,
            latent_clip=latent_clip,
        )
        self._quantize_inputs(input_quantization, gradient_cancellation_threshold, threshold, spread, pad_value)

    def _quantize(
        self,
        *,
        input_quantization: str | Quantization = "sign",
        gradient_cancellation_threshold: float | None = 1.0,
        pad_value: float | None = None,
        threshold: Start = None,
        spread: Start = None,
        **others: Any,
    ) -> None:
        super()._quantize(pad_value=pad_value, **others)
        self._quantize_inputs(input_quantization, gradient_cancellation_threshold, threshold, spread, pad_value)

    def _quantize_inputs(
        self,
        quantization: str | Quantization,
        window: float | None,
        threshold: Start,
        spread: Start,
        pad_value: float | None,
    ) -> None:
        starts = {
            name: self._start(name, start, self.in_channels)
            for name, start in (("threshold", threshold), ("spread", spread))
        }
        spreads = starts["spread"]
        if spreads is not None and not spreads.is_meta and not (spreads > 0).all():
            raise QuantizerError(f"spread must be above 0, got {spread!r}")
        self.activation = self._placed(QActivation(quantization, window, **starts))
        if pad_value is None:
            self.pad_value = default_pad_value(self.activation.activation_function)

    def _quantized_conv(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        if isinstance(input, Tensor) and input.dim() > _KERNEL_DIMS and input.shape[-4] == 1 != self.in_channels:
            F.conv3d(input, weight, groups=self.groups)  # raises: thresholds would spread the one channel to all
        if not self._runs_fused:
            return super()._quantized_conv(self.activation(input), weight, bias)
        inputs, weights = at_work(self.activation.activation_function), at_work(self._weight_quantize)
        spread = self.activation.spread
        output: Tensor = fused(
            input,
            latent(weight, standardize=self.standardize),
            self.activation.threshold,
            None if spread is None else spread.to(weight.dtype),  # FSDP casts Parameters and no buffers
            self.scale,
            self.offset,
            bias,
            inputs.operator,
            [float(each) for each in inputs.operator_settings],
            weights.operator,
            [float(each) for each in weights.operator_settings],
            self.activation.window,
            self.stride,
            padding_amounts(self.padding, self.kernel_size, self.dilation),
            self.pad_value,
            self.dilation,
            self.groups,
            computes_in(input, weight),
        )
        return output

    @property
    def _runs_fused(self) -> bool:
        """Whether a step of training is one operator: not where hooks, ONNX or other quantizers see what lies between."""
        inputs, weights = self.activation.activation_function, self._weight_quantize
        quantizers = (at_work(inputs), at_work(weights))
        parts = (self.activation, inputs, weights, *quantizers)
        return (
            self.training
            and torch.is_grad_enabled()
            and not torch.onnx.is_in_onnx_export()
            and self.padding_mode == "zeros"
            and not isinstance(quantizers[1], Identity)
            and type(self.activation) is QActivation
            and all(type(each).quantize is Quantization.quantize and each.operator is not None for each in quantizers)
            and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        )
