"""`BitConv3d`: a QConv3d that leaves the convolution to a `PackedConv3d`, and how a layer becomes one in its place."""

from torch import Tensor, nn

from ..derived import is_the_users
from ..layers import QConv3d
from ..layers.subclass import quantized_class
from .layer import PackedConv3d


class BitConv3d(QConv3d):
    """A QConv3d, or an instance of a subclass with a forward of its own, that leaves the convolution to a `PackedConv3d`.

    Attributes:
        packed: it; latent weight and quantizers are gone.
        fused: another one, of the same weight, which does the work of what follows too, for the graph that the layer is in.
    """

    packed: PackedConv3d
    fused: PackedConv3d | None

    @property
    def at_work(self) -> PackedConv3d:
        """The one that the model's own forward calls."""
        return self.packed if self.fused is None else self.fused

    @property
    def is_plain(self) -> bool:
        """Whether it does nothing but the convolution."""
        return type(self).forward is nn.Conv3d.forward and type(self)._conv_forward is BitConv3d._conv_forward

    def _conv_forward(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # noqa: A002, ARG002
        output: Tensor = self.packed(input)
        return output


def pack_layer(layer: QConv3d, *, keeps_weight: bool) -> None:
    """Let the layer compute with bits. It stays the same object, with its hooks, and its class's own methods.

    Args:
        layer: the layer, for which `no_packing` is None.
        keeps_weight: whether its latent weight is left for others to read.
    """
    packed = PackedConv3d(layer)
    own = next(cls for cls in type(layer).__mro__ if is_the_users(cls))
    layer.__class__ = quantized_class(own, BitConv3d)
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key, hook in list(hooks.items()):
            if type(hook).__module__.startswith("torch.nn.utils"):  # it computes the latent weight
                del hooks[key]
    layer._modules.clear()
    for name in layer._parameters:
        if name != "weight" or not keeps_weight:
            layer._parameters[name] = None
    layer.packed = packed
    layer.register_module("fused", None)
