"""What a trace found, as plain data without torch: convolutions, and what stands in the way of tracing or training them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

CONV3D = "Conv3d"
"""The kind of a nn.Conv3d. Rules select it; what is no 3D convolution is listed and left alone."""

FUNCTIONAL = "functional conv3d"
"""The kind of a 3D convolution that is no module. Rules select it too."""

Role = Literal["first", "last", "shortcut", "spatial", "temporal", "depthwise", "pointwise"]
"""What a convolution can be in the traced graph (see roles.py)."""


@dataclass(frozen=True)
class Site:
    """One convolution or linear layer of a model.

    Attributes:
        name: its dotted name (for a functional convolution: the owner's name and the graph node's).
        aliases: the other names under which the same module is registered.
        type: its class name.
        kind: `CONV3D` (nn.Conv3d or a subclass), or what else it is: "ConvTranspose3d", "Conv2d", "Linear", ...
            (torch's class, also of a subclass), or `FUNCTIONAL`.
        in_channels, out_channels, groups: channels and channel groups (0 where unknown).
        kernel_size: (kD, kH, kW), or () where unknown.
        parameters: number of weights and biases.
        roles: which it has in the traced graph, each a `Role`.
        blocker: why it cannot be converted, or None.
        converted: whether it is a QConv3d already.
        no_shortcut: why its input cannot be added to its output, or None.
    """

    name: str
    type: str
    kind: str = CONV3D
    aliases: tuple[str, ...] = ()
    in_channels: int = 0
    out_channels: int = 0
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    parameters: int = 0
    roles: frozenset[str] = frozenset()
    blocker: str | None = None
    converted: bool = False
    no_shortcut: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All its names."""
        return (self.name, *self.aliases)

    @property
    def is_conv3d(self) -> bool:
        """Whether it is a 3D convolution, a module or functional: what a rule can select."""
        return self.kind in (CONV3D, FUNCTIONAL)

    @property
    def grouping(self) -> str:
        """``"dense"``, ``"grouped"`` or ``"depthwise"`` (every input channel its own group)."""
        if self.groups == 1:
            return "dense"
        return "depthwise" if self.groups == self.in_channels else "grouped"


@dataclass(frozen=True)
class Opaque:
    """A module whose forward torch.fx cannot follow.

    Attributes:
        name, type: its dotted name and class name.
        reason: the exception that stopped the trace, and the line where it was raised.
    """

    name: str
    type: str
    reason: str

    def __str__(self) -> str:
        return f"Not traceable: {self.name or 'the model'} ({self.type}): {self.reason}"


@dataclass(frozen=True)
class Overwrite:
    """An operation in place that breaks autograd: it overwrites a value that the backward pass needs.

    Attributes:
        name, type: dotted name and class name of the module whose forward does it.
        node: the node's name in the graph of that forward, "" where it has none.
        reason: what it overwrites.
        obstacle: why it is left as it is, or None where a conversion rewrites it out of place.
    """

    name: str
    type: str
    node: str
    reason: str
    obstacle: str | None = None

    def __str__(self) -> str:
        where = f"{self.name or 'the model'} ({self.type}) overwrites {self.reason}"
        if self.obstacle is None:
            return f"Rewritten out of place: {where}"
        return f"Breaks autograd: {where}. Left as it is: {self.obstacle}"


def conv3d_names(sites: Iterable[Site]) -> list[str]:
    """Return every name of every 3D convolution among the sites."""
    return [name for site in sites if site.is_conv3d for name in site.names]
