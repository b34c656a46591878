"""Whether a layer's input can be added to its output."""

from collections.abc import Sequence

from torch import nn

from .padding import padding_amounts


def no_shortcut(conv: nn.Conv3d) -> str | None:
    """Return why the convolution's input cannot be added to its output, or None: it takes equal channels and sizes."""
    if conv.in_channels != conv.out_channels:
        return f"{conv.in_channels} -> {conv.out_channels} channels"
    if any(step != 1 for step in conv.stride):
        return f"stride {_sizes(conv.stride)}"
    border = conv._reversed_padding_repeated_twice
    if conv.padding_mode == "zeros":  # a subclass may have set its padding to 0 since
        border = padding_amounts(conv.padding, conv.kernel_size, conv.dilation)
    added = [left + right for left, right in zip(border[-2::-2], border[-1::-2], strict=True)]
    spans = zip(added, conv.dilation, conv.kernel_size, strict=True)
    changes = [amount - step * (size - 1) for amount, step, size in spans]
    return f"the size changes by {_sizes(changes)}" if any(changes) else None


def _sizes(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
