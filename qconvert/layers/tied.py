"""`TiedConv3d`: a functional convolution as a module, around Parameters that another module owns."""

from typing import Any, Self

from torch import Tensor, nn

_TIED = ("weight", "bias")


class TiedConv3d(nn.Conv3d):
    """A Conv3d whose weight and bias are another module's Parameters, which hands them over at each call.

    The very same Parameter objects are its ``weight`` and ``bias``, but it computes with what it is given: its owner's are
    loaded, replaced and parametrized. A state dict has them once, under the owner's names.

    Shapes: input (N, C, D, H, W) or (C, D, H, W), weight (O, C / groups, kD, kH, kW), bias (O,), output (N, O, D', H', W').
    """

    @classmethod
    def around(cls, weight: nn.Parameter, bias: nn.Parameter | None, groups: int = 1, **settings: Any) -> Self:
        """Return the layer of these Parameters; nothing is copied or initialised.

        Args:
            weight: the weight, whose shape says the channels and the kernel.
            bias: the bias.
            groups: channel groups.
            settings: stride, padding and dilation, as Conv3d's.
        """
        outputs, inputs, depth, height, width = weight.shape
        kernel = (depth, height, width)
        layer = cls(inputs * groups, outputs, kernel, groups=groups, bias=bias is not None, device="meta", **settings)
        layer.weight, layer.bias = weight, bias
        return layer

    def forward(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        """Convolve with the weight and bias that are given, else with its own."""
        if weight is None:
            weight, bias = self.weight, self.bias
        output: Tensor = self._conv_forward(input, weight, bias)
        return output

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _TIED:
            destination.pop(f"{prefix}{name}", None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)
        missing_keys[:] = [key for key in missing_keys if key not in [f"{prefix}{name}" for name in _TIED]]


def handed_over(owner: nn.Module) -> set[int]:
    """Return the identities of the Parameters that a module hands over to layers: it computes nothing with them itself."""
    return {id(p) for child in owner.children() if isinstance(child, TiedConv3d) for p in child.parameters()}
