"""qconvert: pretrained video and volumetric PyTorch models to binary and low-bit ones.

>>> import qconvert
>>> model = qconvert.binarize(model, "default")  # prints what it does to parameter bits and FLOPs
"""

from . import train
from .diagnosis import Diagnosis, diagnose
from .errors import ConstantInputWarning, InputError, ModelError, QConvertError, QuantizerError, RuleError
from .layers import QActivation, QConv3d, QConv3d_NoAct
from .packed import PackedFile, load, pack, save
from .pipeline import binarize, plan, preview
from .report import Profile, Report, compare, profile
from .rules import Plan, Rules, bundled_rules, load_rules
from .timing import Benchmark, benchmark
from .trace import Traced, trace

__version__ = "0.1.0"

__all__ = [
    "Benchmark",
    "ConstantInputWarning",
    "Diagnosis",
    "InputError",
    "ModelError",
    "PackedFile",
    "Plan",
    "Profile",
    "QActivation",
    "QConv3d",
    "QConv3d_NoAct",
    "QConvertError",
    "QuantizerError",
    "Report",
    "RuleError",
    "Rules",
    "Traced",
    "benchmark",
    "binarize",
    "bundled_rules",
    "compare",
    "diagnose",
    "load",
    "load_rules",
    "pack",
    "plan",
    "preview",
    "profile",
    "save",
    "trace",
    "train",
]
