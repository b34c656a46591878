"""Whether a checkpoint fits what is to go on from it."""

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError


def check_same(what: str, saved: Mapping[Any, Any], own: Mapping[Any, Any]) -> None:
    """Find the first thing in which a checkpoint differs.

    Raises:
        ModelError: saying it.
    """
    for key in {**own, **saved}:
        if saved.get(key) != own.get(key):
            there, here = (each.get(key, "not there") for each in (saved, own))
            raise ModelError(
                f"the checkpoint does not fit: {what} {key!r} is {there} in the checkpoint and {here} in this training"
            )
