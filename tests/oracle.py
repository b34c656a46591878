"""Naive numpy reference: what the layers and quantizers compute, written once more as plainly as possible.

Imports neither qconvert nor torch. Integer arrays in, integer arrays out, so comparisons can be exact.
"""

import numpy as np

NUMPY_PADDING = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def sign(x):
    """-1 below zero, +1 elsewhere: at 0, at -0.0 and for NaN."""
    return np.where(x < 0, -1, 1)


def heaviside(x):
    """+1 above zero, -1 elsewhere: at 0, at -0.0 and for NaN."""
    return np.where(x > 0, 1, -1)


def ternary(w):
    """-a, 0, +a: the weights above 0.7 mean|w| keep their sign, a is the mean of their magnitudes."""
    magnitude = np.abs(w)
    kept = magnitude > 0.7 * magnitude.mean()
    a = magnitude[kept].mean() if kept.any() else 0.0
    return np.where(kept, a * np.sign(w), 0.0)


def lsq(x, step, lowest, highest):
    """Multiples of the step, ``lowest * step`` to ``highest * step``."""
    return step * np.round(np.clip(x / step, lowest, highest))


def lsq_gradients(grad_output, x, step, lowest, highest, values):
    """(gradient of x, gradient of the step), Esser et al. 2020, eq. 3 and 5 and the gradient scale of section 2.2.

    ``values``: its N_W, the number of weights, or N_F, the number of features.
    """
    scaled = x / step
    inside = (lowest < scaled) & (scaled < highest)
    outside_value = np.where(scaled <= lowest, lowest, highest)
    of_step = np.where(inside, np.round(scaled) - scaled, outside_value)
    return np.where(inside, grad_output, 0), (grad_output * of_step).sum() / np.sqrt(values * highest)


def triple(value):
    return (value,) * 3 if isinstance(value, int) else tuple(value)


def borders(padding, kernel, dilation):
    """(before, after) for D, H and W."""
    if padding == "valid":
        return [(0, 0)] * 3
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in triple(padding)]


def pad(x, amounts, pad_value=0, padding_mode="zeros"):
    """``x`` (N, C, D, H, W) with a border; a fractional ``pad_value`` makes integers floats."""
    amounts = [(0, 0), (0, 0), *amounts]
    if padding_mode == "zeros":
        return np.pad(x.astype(np.result_type(x, pad_value)), amounts, constant_values=pad_value)
    return np.pad(x, amounts, NUMPY_PADDING[padding_mode])


def conv3d(
    x, w, bias=None, stride=1, padding=0, dilation=1, groups=1, pad_value=0, padding_mode="zeros"
):  # the arguments of torch's, and the value of the border
    """One sum per output value. ``x`` is (N, C, D, H, W) or (C, D, H, W), ``w`` is (O, C / groups, kD, kH, kW)."""
    if x.ndim == 4:
        return conv3d(x[None], w, bias, stride, padding, dilation, groups, pad_value, padding_mode)[0]
    stride, dilation, kernel = triple(stride), triple(dilation), w.shape[2:]
    x = pad(x, borders(padding, kernel, dilation), pad_value, padding_mode)
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [(n - e) // s + 1 for n, e, s in zip(x.shape[2:], extent, stride, strict=True)]
    channels, outputs_of_a_group = w.shape[1], len(w) // groups
    y = np.zeros((len(x), len(w), *size), np.result_type(x, w))
    for n, o, *position in np.ndindex(y.shape):
        start = o // outputs_of_a_group * channels
        box = [slice(p * s, p * s + e, d) for p, s, e, d in zip(position, stride, extent, dilation, strict=True)]
        y[n, o, *position] = (x[n, start : start + channels, *box] * w[o]).sum()
    return y if bias is None else y + bias.reshape(-1, 1, 1, 1)
