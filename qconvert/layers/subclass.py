"""The quantized counterpart of a Conv3d subclass."""

import types
from typing import Any, TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Conv3d)

_counterparts: dict[tuple[type[nn.Conv3d], type[nn.Conv3d]], Any] = {}


def quantized_class(base: type[nn.Conv3d], layer: type[Layer]) -> type[Layer]:
    """Return the class that is ``base`` in everything but the convolution, which is ``layer``'s.

    ``class QConv3DSimple(Conv3DSimple, QConv3d)``: isinstance, static methods, properties and a forward that ends in
    ``super().forward(x)`` or ``self._conv_forward(...)`` go on working. There is one such class for each pair.
    """
    if issubclass(layer, base):
        return layer
    if issubclass(base, layer):
        return base
    if (base, layer) not in _counterparts:
        _counterparts[base, layer] = _derived(base, layer)
    counterpart: type[Layer] = _counterparts[base, layer]
    return counterpart


def _derived(base: type[nn.Conv3d], layer: type[nn.Conv3d]) -> type:
    # the class exists only in memory: pickle its instances as "the counterpart of base"
    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return _empty, (base, layer), vars(self)

    members = {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": f"{base.__name__}, quantized."}
    return types.new_class(f"Q{base.__name__}", (base, layer), exec_body=lambda namespace: namespace.update(members))


def _empty(base: type[nn.Conv3d], layer: type[Layer]) -> Layer:
    counterpart = quantized_class(base, layer)
    return counterpart.__new__(counterpart)
