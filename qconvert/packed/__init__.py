"""What is reported is real: files in which a weight takes the bits that its report counts, and models that run on bits.

docs/packed-format.md specifies the files.
"""

from .file import PackedFile
from .loading import load
from .packing import pack
from .saving import save

__all__ = ["PackedFile", "load", "pack", "save"]
