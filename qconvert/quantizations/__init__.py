"""Quantizers, by class and by name. Same paths and names as in bitorch.quantizations."""

from .approx_sign import ApproxSign
from .base import Quantization
from .dorefa import InputDoReFa, WeightDoReFa
from .identity import Identity
from .lsq import LSQ
from .progressive_sign import ProgressiveSign
from .registry import quantization_from_name, quantization_names, quantizer, register_custom_quantization
from .sign import Sign
from .ste_heaviside import SteHeaviside
from .swish_sign import SwishSign
from .ternary import Ternary

__all__ = [
    "LSQ",
    "ApproxSign",
    "Identity",
    "InputDoReFa",
    "ProgressiveSign",
    "Quantization",
    "Sign",
    "SteHeaviside",
    "SwishSign",
    "Ternary",
    "WeightDoReFa",
    "quantization_from_name",
    "quantization_names",
    "quantizer",
    "register_custom_quantization",
]
