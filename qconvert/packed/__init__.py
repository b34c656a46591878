"""Packed models: bits that are counted in the place of floats that are multiplied."""

from .packing import pack

__all__ = ["pack"]
