"""What a trace found, as plain data without torch: `Site`, one convolution, and `Opaque`, a module that stops the trace."""

from collections.abc import Iterable
from dataclasses import dataclass

CONV3D = "Conv3d"
"""The kind of site that a rule can select; every other kind is listed and left alone."""

ROLES = ("first", "last", "shortcut")


@dataclass(frozen=True)
class Site:
    """One convolution of a model.

    Attributes:
        name: its dotted name (for a functional convolution: the owner's name and the graph node's).
        aliases: the other names under which the same module is registered.
        type: its class name.
        kind: `CONV3D` (nn.Conv3d or a subclass), or what else it is: "ConvTranspose3d", "functional conv3d".
        in_channels, out_channels, groups: channels and channel groups (0 where unknown).
        kernel_size: (kD, kH, kW), or () where unknown.
        parameters: number of weights and biases.
        roles: which of `ROLES` it has in the traced graph.
        blocker: why it cannot be converted, or None.
        converted: whether it is a QConv3d already.
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

    @property
    def names(self) -> tuple[str, ...]:
        """All its names."""
        return (self.name, *self.aliases)

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


def conv3d_names(sites: Iterable[Site]) -> list[str]:
    """Return every name of every Conv3d among the sites."""
    return [name for site in sites if site.kind == CONV3D for name in site.names]
