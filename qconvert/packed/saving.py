"""`save`: a converted model to a file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ModelError, QConvertError
from ..layers import QConv3d, QConv3d_NoAct
from ..layers.computed import weights_at_rest
from ..quantizations.staged import Staged
from ..quantizations.stored import bare
from ..rewrite import plan_of
from ..trace import unwrapped
from .file import PackedFile, write
from .header import Header, LayerRecord, PlanRecord, WeightRecord
from .planes import packed, plane_bytes
from .weights import Weight, quantized_weights

_HALVES = (torch.float16, torch.bfloat16)


def save(model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None, latent: bool = False) -> PackedFile:
    """Write a converted model to a safetensors file, each quantized weight with as many bits as its quantizer has.

    The rules, the decision table and the settings of every layer are in the file, so that `load` needs the float model and
    nothing else. `docs/packed-format.md` specifies it. The file comes into being at once: if that is interrupted, an old
    file of that name stays.

    Args:
        model: a converted model, in any mode, on any device.
        path: the file.
        dtype: torch.bfloat16 or torch.float16: what floating tensors are cast to in the file. None keeps them as they are.
        latent: whether to keep the latent weights, in float, in the place of the quantized ones, to go on training.

    Returns:
        The bits of the file, and which weights are in it in float and why.

    Raises:
        ModelError: if the model has no quantized layer, is in a stage that mixes quantizers, holds what a file cannot, or if
            the file cannot be written.
    """
    model = unwrapped(model)
    if dtype not in (None, *_HALVES):
        raise ModelError(f"dtype must be torch.bfloat16, torch.float16 or None, got {dtype!r}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QConv3d_NoAct)}
    if not layers:
        raise ModelError(f"{type(model).__name__} has no QConv3d: convert it with qconvert.binarize first")
    _check_schedule(layers, latent=latent)
    with torch.no_grad(), weights_at_rest(model):
        weights, reasons = ({}, dict.fromkeys(layers, "latent=True")) if latent else quantized_weights(model)
        with _bare_quantizers(layers):
            state = _tensors(model)
        tensors, records = _stored(state, weights, dtype)
        stored = {id(state[key]) for key in records}
        reasons |= {name: _HIDDEN for name, layer in layers.items() if id(layer.weight) in weights.keys() - stored}
        size = write(Path(path), _header(model, layers, records), tensors)
    tensor_bits = sum(tensor.numel() * tensor.itemsize * 8 for tensor in tensors.values())
    numels = [(record.bits, state[key].numel()) for key, record in records.items()]
    padding = sum(bits * (8 * plane_bytes(numel) - numel) for bits, numel in numels)
    return PackedFile(Path(path), tensor_bits, padding, size - tensor_bits // 8, reasons)


_HIDDEN = "the model's state dict does not hold it as it is"


def _check_schedule(layers: Mapping[str, QConv3d_NoAct], *, latent: bool) -> None:
    """Find a layer whose quantizers of the moment cannot be told by one name."""
    for name, layer in layers.items():
        inputs = [layer.activation.activation_function] if isinstance(layer, QConv3d) else []
        for quantizer in (layer._weight_quantize, *inputs):
            if isinstance(quantizer, Staged) and (latent or quantizer.current is quantizer):
                advice = "Store the schedule's state_dict() and the model's" if latent else "Go on to the end of the stage"
                raise ModelError(f"layer {name!r} has several quantizers, of a schedule that is not over. {advice}")


@contextmanager
def _bare_quantizers(layers: Mapping[str, QConv3d_NoAct]) -> Iterator[None]:
    """Let the state dict be that of a model whose quantizers are those of the rules alone."""
    owners: list[tuple[nn.Module, str]] = [(layer, "_weight_quantize") for layer in layers.values()]
    owners += [(layer.activation, "activation_function") for layer in layers.values() if isinstance(layer, QConv3d)]
    before = [getattr(owner, attribute) for owner, attribute in owners]
    try:
        for (owner, attribute), quantizer in zip(owners, before, strict=True):
            setattr(owner, attribute, bare(quantizer))
        yield
    finally:
        for (owner, attribute), quantizer in zip(owners, before, strict=True):
            setattr(owner, attribute, quantizer)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of the state dict under its first name: Parameters and buffers themselves, not copies."""
    state = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ModelError(f"the state dict holds {key!r}, a {type(value).__name__}: a file can only hold tensors")
        if value.is_meta:
            raise ModelError(f"{key!r} is on the meta device and has no values: give the model weights first")
        state[key] = value
    first = {id(value): key for key, value in reversed(state.items())}
    return {key: state[key] for key in state if first[id(state[key])] == key}


def _stored(
    state: Mapping[str, Tensor], weights: Mapping[int, Weight], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, WeightRecord]]:
    """Return the tensors of the file, and what is to be said about those that are packed."""
    tensors, records = {}, {}
    for key, value in state.items():
        weight = weights.get(id(value))
        if weight is None:
            tensors[key] = _cast(key, value.detach(), dtype)
            continue
        tensors[key] = torch.from_numpy(packed(weight.codes.cpu().numpy(), weight.levels.bits))
        records[key] = WeightRecord.of(weight.levels, value.shape, weight.quantizer)
    return tensors, records


def _cast(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.cpu()
    if dtype is not None and value.is_floating_point():
        cast = value.to(dtype)
        if not torch.equal(cast.isfinite(), value.isfinite()):
            raise ModelError(f"{key!r} has values beyond the range of {dtype}: leave dtype out, or take torch.bfloat16")
        value = cast
    return value.clone(memory_format=torch.contiguous_format)  # of its own: safetensors refuses tensors that share memory


def _header(model: nn.Module, layers: Mapping[str, QConv3d_NoAct], weights: Mapping[str, WeightRecord]) -> Header:
    """Return what the file says about the model.

    Raises:
        ModelError: naming the layer, if it cannot be built again from what a file can say.
    """
    plan = plan_of(model)
    records = {}
    for name, layer in layers.items():
        try:
            records[name] = LayerRecord.of(layer)
        except QConvertError as error:
            raise ModelError(f"layer {name!r} cannot be stored: {error}") from error
    return Header(plan=None if plan is None else PlanRecord.of(plan), layers=records, weights=dict(weights))
