"""What quantization-aware training needs beside a training loop of your own."""

from .batchnorm import reestimate_batchnorm
from .clipping import clip_latent_weights
from .distillation import Distillation, distill
from .finite import finite
from .health import flip_rate
from .parameters import parameter_groups
from .schedule import Schedule

__all__ = [
    "Distillation",
    "Schedule",
    "clip_latent_weights",
    "distill",
    "finite",
    "flip_rate",
    "parameter_groups",
    "reestimate_batchnorm",
]
