"""What the optional settings of quantized layers add to a model: RPReLU, shortcuts, standardized weights."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..layers import QConv3d_NoAct

_WORK = {
    "standardize": "each forward pass standardizes the latent weights",
    "shortcut": "1 float addition per output value",
    "rprelu": "3 float operations per output value",
}
"""What an option computes. None of it is a MAC, so none of it is among the FLOPs."""


@dataclass(frozen=True)
class Option:
    """An optional setting, in all the layers that have it.

    Attributes:
        name: the rule key.
        layers: number of layers.
        parameters, parameter_bits: what it adds; they are in the counts of the layers, too.
    """

    name: str
    layers: int
    parameters: int = 0
    parameter_bits: int = 0

    def __str__(self) -> str:
        added = f"{self.parameters:,} parameters, {self.parameter_bits:,} bits" if self.parameters else "no parameters"
        where = f"{self.layers} layer{'' if self.layers == 1 else 's'}"
        return f"{self.name} in {where}: {added}; {_WORK[self.name]} (not among the FLOPs)."


def options_of(model: nn.Module) -> tuple[Option, ...]:
    """Return the options that are on in at least one layer."""
    layers = [module for module in model.modules() if isinstance(module, QConv3d_NoAct)]
    bent = [layer.rprelu for layer in layers if layer.rprelu is not None]
    found = (
        Option("standardize", sum(layer.standardize for layer in layers)),
        Option("shortcut", sum(layer.shortcut for layer in layers)),
        Option("rprelu", len(bent), *_size(parameter for module in bent for parameter in module.parameters())),
    )
    return tuple(option for option in found if option.layers)


def _size(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Return the number of values and of bits, each Parameter once."""
    distinct = {id(parameter): parameter for parameter in parameters}.values()
    return sum(each.numel() for each in distinct), sum(each.numel() * each.dtype.itemsize * 8 for each in distinct)
