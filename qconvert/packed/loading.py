"""`load`: a float model and a file to the model that was saved."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, QConvertError
from ..layers import QConv3d, QConv3d_NoAct
from ..loading import listed
from ..quantizations.levels import Levels
from ..quantizations.stored import Stored, bare
from ..rewrite import rewrite
from ..rules import Decision, Plan, nearest
from ..sites import Site, conv3d_names
from ..trace import copied, trace, unwrapped
from .file import Contents, read
from .header import DecisionRecord, Header, LayerRecord, PlanRecord, WeightRecord
from .planes import plane_bytes, unpacked
from .weights import quantizes, users


def load(path: str | Path, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Return the model that `save` has written, in evaluation mode: bit for bit it computes what that computed there.

    The file says which layers are converted, and how. Nothing in it is run. A layer whose weight was packed holds the
    quantized values, which do not train; a file saved with ``latent=True`` brings back a model that trains on.

    Args:
        path: the file.
        model: the float model, which is copied, or a function that makes it. What weights it has makes no difference; what
            device and dtype, the result has too. A model converted alike will also do.

    Raises:
        ModelError: if there is no such file, it is damaged or of a newer version, or the model is another one, saying where
            they differ. The model that came in is as it was in any case.
    """
    path = Path(path)
    contents = read(path)
    built = _own(model)
    try:
        converted = _converted(built, contents.header)
        _fill(converted, contents)
    except QConvertError as error:
        raise ModelError(f"{path} does not fit {type(built).__name__}: {error}") from error
    converted.eval()
    return converted


def _own(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise ModelError(f"load takes a model or a function that makes it, got {type(model).__name__}")
        return unwrapped(model())
    try:
        return copied(unwrapped(model))
    except ModelError as error:
        raise ModelError(f"{error}. Or pass load a function that makes the model, which is not copied") from error


def _converted(model: nn.Module, header: Header) -> nn.Module:
    """Convert the model by the file's decisions, and make its layers what they were."""
    with torch.inference_mode(mode=False):  # what is made there cannot be trained
        if header.plan is not None:
            rewrite(model, _plan(model, header.plan))
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QConv3d_NoAct)}
        for name in sorted(header.layers.keys() ^ layers.keys()):
            where = "the file" if name in header.layers else "this model"
            raise ModelError(f"{name!r} is a quantized layer in {where} only. {nearest(name, header.layers)}")
        for name, layer in layers.items():
            try:
                _settle(layer, header.layers[name])
            except QConvertError as error:
                raise ModelError(f"layer {name!r}: {error}") from error
    return model


def _plan(model: nn.Module, record: PlanRecord) -> Plan:
    """Return the file's plan for this model.

    By its decisions, not by its rules once more: a model may have been converted in several steps.
    """
    traced = trace(model)
    rows = {row.layer: row for row in record.decisions}
    convs = {site.name: site for site in traced.sites if site.is_conv3d}
    for name, row in rows.items():
        if row.convert and name not in convs:
            there = nearest(name, conv3d_names(traced.sites))
            raise ModelError(f"it has no Conv3d {name!r}, which the file converts. {there}")
    return Plan(record.to_rules(), tuple(_decisions(traced.sites, rows)), traced.opaque, traced.overwrites)


def _decisions(sites: tuple[Site, ...], rows: Mapping[str, DecisionRecord]) -> Iterator[Decision]:
    for site in sites:
        row = rows.get(site.name)
        if site.converted:
            yield Decision(site, False, "", "already a QConv3d, left as it is")
        elif row is None:
            yield Decision(site, False, "", "the file says nothing about it")
        elif row.convert and site.blocker is not None:
            raise ModelError(f"{site.name!r}, which the file converts, cannot be converted: {site.blocker}")
        else:
            yield row.on(site)


def _settle(layer: QConv3d_NoAct, record: LayerRecord) -> None:
    """Make the layer what the record says, if it is not. What it learns is filled in later."""
    layer._weight_quantize = bare(layer._weight_quantize)
    if isinstance(layer, QConv3d):
        layer.activation.activation_function = bare(layer.activation.activation_function)
    if LayerRecord.of(layer) != record:
        layer._quantize(**record.arguments())
    if LayerRecord.of(layer) != record:
        raise ModelError(f"it is a {type(layer).__name__}, which cannot become what the file says: {record!r}")


def _fill(model: nn.Module, contents: Contents) -> None:
    """Fill in every tensor. Nothing is written before all of them have been compared."""
    own = _tensors_of(model)
    names: dict[int, list[str]] = {}  # of one tensor
    for key, tensor in own.items():
        names.setdefault(id(tensor), []).append(key)
    computing = users(model)
    _compare(list(names.values()), own, contents)
    for key in contents.header.weights:
        for name, module in computing[id(own[key])]:
            if not quantizes(module, id(own[key])):
                raise ModelError(f"{key} is packed, and {name!r} ({type(module).__name__}) computes with it in float")
    state: dict[str, Tensor] = {}
    for keys in names.values():
        (key,) = contents.tensors.keys() & keys
        record, value = contents.header.weights.get(key), contents.tensors[key]
        value = value if record is None else _decoded(key, value, record, own[key].device)
        state |= dict.fromkeys(keys, value)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # of a model that has load_state_dict hooks of its own
        raise ModelError(str(error)) from error
    for key, record in contents.header.weights.items():
        own[key].requires_grad_(False)  # there are no latent values to train
        for _, layer in computing[id(own[key])]:
            _hold(layer, record.levels)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict(keep_vars=True)
    for key, value in own.items():
        if not isinstance(value, Tensor) or value.is_meta:
            what = "on the meta device" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ModelError(f"its {key!r} is {what} and cannot be filled in")
    return own


def _compare(groups: list[list[str]], own: Mapping[str, Tensor], contents: Contents) -> None:
    """Compare names, shapes and dtypes of the file's tensors with the model's.

    Raises:
        ModelError: naming what is missing, unexpected, tied in one of them only, or of another shape or dtype.
    """
    tensors, records = contents.tensors, contents.header.weights
    present = [sorted(tensors.keys() & keys) for keys in groups]
    wrong = {key: _misfit(tensors[key], records.get(key), own[key]) for keys in present for key in keys}
    problems = [
        *listed("missing", {keys[0] for keys, found in zip(groups, present, strict=True) if not found}),
        *listed("unexpected", tensors.keys() - own.keys()),
        *listed("without a tensor", records.keys() - tensors.keys()),
        *listed("one tensor here and several in the file", {" and ".join(found) for found in present if len(found) > 1}),
        *listed("different", {f"{key} {misfit}" for key, misfit in wrong.items() if misfit is not None}),
    ]
    if problems:
        raise ModelError("; ".join(problems))


def _misfit(tensor: Tensor, record: WeightRecord | None, own: Tensor) -> str | None:
    """Return how the file's tensor differs from what the model, or the file itself, says about it."""
    if record is None:
        is_alike = tensor.dtype == own.dtype or (tensor.is_floating_point() and own.is_floating_point())
        return _unlike("of shape", tensor.shape, own.shape) or (None if is_alike else _unlike("", tensor.dtype, own.dtype))
    planes = (record.bits, plane_bytes(math.prod(record.shape)))
    return (
        _unlike("of shape", tuple(record.shape), tuple(own.shape))
        or _unlike("as bit planes of shape", tuple(tensor.shape), planes)
        or _unlike("as bit planes of", tensor.dtype, torch.uint8)
    )


def _unlike(what: str, seen: object, wanted: object) -> str | None:
    return None if seen == wanted else f"{what} {seen} instead of {wanted}".strip()


def _decoded(key: str, planes: Tensor, record: WeightRecord, device: torch.device) -> Tensor:
    """Return the quantized weight."""
    codes = torch.from_numpy(unpacked(planes.numpy(), math.prod(record.shape)))
    if codes.numel() and codes.max() >= record.count:
        raise ModelError(f"{key} has the code {codes.max()}, and {record.quantizer} has {record.count} levels")
    return record.levels.values(device)[codes.to(device)].view(record.shape)


def _hold(layer: Any, levels: Levels) -> None:
    """Let the layer take its weight's values as they are."""
    layer._weight_quantize = Stored(layer._weight_quantize, levels).eval()
    layer.standardize = False  # what is quantized has been standardized
