"""What a model costs, in bits and operations: `profile` of one model, `compare` of two."""

from .facts import Layer, Uncounted
from .reports import Profile, Report, Row, compare, profile
from .totals import Totals

__all__ = ["Layer", "Profile", "Report", "Row", "Totals", "Uncounted", "compare", "profile"]
