"""The quantized counterpart of a Conv3d subclass."""

import functools
import types
from typing import Any

from torch import nn


@functools.cache
def quantized_class(base: Any, layer: Any) -> Any:
    """Return the class that is ``base`` in everything but the convolution, which is ``layer``'s.

    ``class QConv3DSimple(Conv3DSimple, QConv3d)``: isinstance, static methods, properties and a forward that ends in
    ``super().forward(x)`` or ``self._conv_forward(...)`` go on working. The class exists only in memory, so its instances
    are pickled as "the quantized counterpart of base".
    """
    if issubclass(layer, base):
        return layer
    if issubclass(base, layer):
        return base

    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return _empty, (base, layer), vars(self)

    members = {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": f"{base.__name__}, quantized."}
    return types.new_class(f"Q{base.__name__}", (base, layer), exec_body=lambda namespace: namespace.update(members))


def _empty(base: Any, layer: Any) -> Any:
    cls = quantized_class(base, layer)
    return cls.__new__(cls)
