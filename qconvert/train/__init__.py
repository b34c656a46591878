"""Quantization-aware training: what it needs beside your own training loop."""

from .schedule import Schedule

__all__ = ["Schedule"]
