"""How much a convolution's padding adds on each side."""

Size = int | tuple[int, ...]
"""A number for all of D, H, W, or one for each."""


def padding_amounts(padding: str | Size, kernel_size: tuple[int, ...], dilation: Size) -> list[int]:
    """Return (left W, right W, left H, right H, left D, right D), the order of F.pad, in values."""
    if padding == "valid":
        return [0] * 6
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(_triple(dilation), kernel_size, strict=True)]
        # an even kernel takes the odd value on the right, as torch does
        return [amount for total in reversed(totals) for amount in (total // 2, total - total // 2)]
    amounts = _triple(padding)  # type: ignore[arg-type]  # no other words are valid
    return [amount for amount in reversed(amounts) for _ in range(2)]


def _triple(size: Size) -> tuple[int, ...]:
    return (size,) * 3 if isinstance(size, int) else size
