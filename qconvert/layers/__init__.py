"""Layers with quantized weights and inputs. Same paths and names as in bitorch.layers."""

from .qactivation import QActivation
from .qconv3d import QConv3d, QConv3d_NoAct, conv3d
from .rprelu import RPReLU
from .shortcut import no_shortcut
from .standardization import standardized
from .subclass import obstacle

__all__ = ["QActivation", "QConv3d", "QConv3d_NoAct", "RPReLU", "conv3d", "no_shortcut", "obstacle", "standardized"]
