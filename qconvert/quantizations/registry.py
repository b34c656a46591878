"""Quantizers by name."""

from typing import Any

from ..errors import QuantizerError, did_you_mean
from .approx_sign import ApproxSign
from .base import Quantization, argument_names
from .dorefa import InputDoReFa, WeightDoReFa
from .identity import Identity
from .lsq import LSQ
from .progressive_sign import ProgressiveSign
from .sign import Sign
from .ste_heaviside import SteHeaviside
from .swish_sign import SwishSign
from .ternary import Ternary

_BUNDLED: tuple[type[Quantization], ...] = (
    Identity,
    Sign,
    ApproxSign,
    SwishSign,
    SteHeaviside,
    ProgressiveSign,
    WeightDoReFa,
    InputDoReFa,
    Ternary,
    LSQ,
)
_by_name: dict[str, type[Quantization]] = {cls.name: cls for cls in _BUNDLED}


def quantization_names() -> list[str]:
    """Return the names of all quantizers, in the order in which they were registered."""
    return list(_by_name)


def quantization_from_name(name: str) -> type[Quantization]:
    """Return the quantizer class of that name.

    Raises:
        QuantizerError: (a ValueError) if there is none.
    """
    if name not in _by_name:
        known = ", ".join(_by_name)
        raise QuantizerError(f"unknown quantizer {name!r}. Known: {known}.{did_you_mean(str(name), _by_name)}")
    return _by_name[name]


def register_custom_quantization(custom_quantization: type[Quantization]) -> None:
    """Make a quantizer class known under its ``name``, to layers and to rule files.

    Raises:
        QuantizerError: if it is not a subclass of `Quantization`, or its name belongs to a bundled quantizer.
    """
    if not (isinstance(custom_quantization, type) and issubclass(custom_quantization, Quantization)):
        raise QuantizerError(f"a custom quantizer must be a subclass of Quantization, got {custom_quantization!r}")
    if custom_quantization.name == Quantization.name:
        raise QuantizerError(f"{custom_quantization.__name__} needs a name of its own, as a class attribute")
    taken = _by_name.get(custom_quantization.name)
    if taken in _BUNDLED and taken is not custom_quantization:
        raise QuantizerError(f"the name {custom_quantization.name!r} belongs to qconvert's own {taken.__name__}")
    _by_name[custom_quantization.name] = custom_quantization


def quantizer(quantization: str | Quantization, **settings: Any) -> Quantization:
    """Return a quantizer from its name and constructor settings; a `Quantization` module is returned as it is.

    Raises:
        QuantizerError: if the name is unknown, a setting is unknown or its value is out of range.
    """
    if isinstance(quantization, Quantization):
        return quantization
    if not isinstance(quantization, str):
        raise QuantizerError(f"a quantizer is a name or a Quantization module, got {quantization!r}")
    cls = quantization_from_name(quantization)
    allowed = argument_names(cls) if settings else []
    for name in settings:
        if name not in allowed:
            takes = f"Its settings: {', '.join(allowed)}." if allowed else "It has no settings."
            raise QuantizerError(f"quantizer {quantization!r} has no setting {name!r}. {takes}{did_you_mean(name, allowed)}")
    try:
        built = cls(**settings)
    except QuantizerError:
        raise
    except (TypeError, ValueError) as error:
        raise QuantizerError(f"quantizer {quantization!r} does not take {settings}: {error}") from error
    if built.bit_width < 1:
        raise QuantizerError(f"quantizer {quantization!r} has no bit_width: set it to the bits of one quantized value")
    return built
