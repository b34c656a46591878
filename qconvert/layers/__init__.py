"""Layers with quantized weights and inputs. Same paths and names as in bitorch.layers."""

from .qactivation import QActivation
from .qconv3d import QConv3d, QConv3d_NoAct, conv3d
from .subclass import obstacle

__all__ = ["QActivation", "QConv3d", "QConv3d_NoAct", "conv3d", "obstacle"]
