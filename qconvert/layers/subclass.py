"""Conv3d subclasses: whether one can be quantized, and the class that it becomes."""

import inspect
from functools import cache
from typing import Any, TypeVar

from torch import nn

from ..derived import derived

Layer = TypeVar("Layer", bound=nn.Conv3d)


def quantized_class(base: type[nn.Conv3d], layer: type[Layer]) -> type[Layer]:
    """Return the class that is ``base`` in everything but the convolution, which is ``layer``'s.

    ``class QConv3DSimple(Conv3DSimple, QConv3d)``: isinstance, static methods, properties and a forward that ends in
    ``super().forward(x)`` or ``self._conv_forward(...)`` go on working. There is one such class for each pair.
    """
    if issubclass(layer, base):
        return layer
    if issubclass(base, layer):
        return base
    counterpart: type[Layer] = _counterpart(base, layer)  # type: ignore[arg-type]  # classes can be hashed
    return counterpart


@cache
def _counterpart(base: type[nn.Conv3d], layer: type[nn.Conv3d]) -> Any:
    members = {"__module__": base.__module__, "__doc__": f"{base.__name__}, quantized."}
    return derived(f"Q{base.__name__}", (base, layer), members, (quantized_class, base, layer))


def own_state(module: nn.Module) -> dict[str, Any]:
    """Return the module's attributes, for another module: with dicts and sets (parameters, hooks, ...) of their own."""
    return {key: value.copy() if isinstance(value, (dict, set)) else value for key, value in vars(module).items()}


_NEW_ATTRIBUTES = (
    *("_weight_quantize", "pad_value", "scale", "offset", "activation"),
    *("standardize", "shortcut", "rprelu", "latent_clip", "_last_signs"),
)
"""What a QConv3d has beside the attributes of a Conv3d."""


def obstacle(conv: nn.Conv3d) -> str | None:
    """Return why this Conv3d cannot become a quantized one, or None.

    A subclass with a forward of its own can if that forward ends in Conv3d's, as far as its code names it.
    """
    if isinstance(conv._parameters.get("weight"), nn.UninitializedParameter):
        return "no weight yet (a lazy module): run the model once before converting it"
    if not {"forward", "_conv_forward"}.isdisjoint(vars(conv)):
        return "its forward was replaced on the instance"
    for cls in type(conv).__mro__[: type(conv).__mro__.index(nn.Conv3d)]:
        for method in ("forward", "_conv_forward"):
            function = vars(cls).get(method)
            if function is not None and not _names_convolution(function, type(conv)):
                return f"{cls.__name__}.{method} never reaches nn.Conv3d.forward"
    taken = [name for name in _NEW_ATTRIBUTES if hasattr(conv, name)]
    return f"it has attributes of its own named {', '.join(taken)}, which a QConv3d needs" if taken else None


def _names_convolution(function: Any, cls: type[nn.Conv3d]) -> bool:
    """Whether the code names ``_conv_forward``, or ``forward`` of super() or of a base class."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return False
    bases = {"super", *(base.__name__ for base in cls.__mro__)}
    return "_conv_forward" in code.co_names or ("forward" in code.co_names and not bases.isdisjoint(code.co_names))
