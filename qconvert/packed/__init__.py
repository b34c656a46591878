"""Files in which a converted model takes the bits that its report counts. docs/packed-format.md specifies them."""

from .file import PackedFile
from .loading import load
from .saving import save

__all__ = ["PackedFile", "load", "save"]
