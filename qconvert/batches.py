"""One pass over the user's batches: what is none, and what a model says to one, is told in the same words everywhere."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import nn

from .errors import InputError, QConvertError
from .example import arguments, copied_inputs, described, is_array, refused


def numbered(batches: Iterable[Any], name: str, doing: str) -> Iterator[tuple[int, Any]]:
    """Yield the batches, counted from 1, under a progress bar.

    Args:
        batches: what the user gave.
        name: the argument's name.
        doing: what the progress bar says.

    Raises:
        InputError: if these are no batches, or there is none.
    """
    _check(batches, name)
    number = 0
    for number, batch in enumerate(track(batches, doing, console=Console(stderr=True), transient=True), start=1):
        yield number, batch
    if not number:
        raise InputError(f"{name} has no batch: an iterator that was used up? Pass a list or a DataLoader")


def run(model: nn.Module, inputs: Any, name: str, advice: str) -> None:
    """Run the model on a copy of one batch's inputs, in the form of example inputs.

    Raises:
        InputError: if the model does not run on them: with the batch's name, what was seen, and the advice.
    """
    args, kwargs = arguments(copied_inputs(inputs))
    try:
        model(*args, **kwargs)
    except QConvertError as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:
        raise InputError(f"{refused(model, f'{name},', inputs, error)}. {advice}") from error


def _check(batches: Any, name: str) -> None:
    advice = "pass a list of batches [x], a DataLoader or a generator"
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise InputError(f"{name} is no iterable of batches but {described(batches)}: {advice}")
    # iterating over them gives clips, keys or single arguments, on which a model may even run
    if isinstance(batches, (Mapping, tuple)) or is_array(batches):
        several = ". If its items are the batches, pass list(x)" if isinstance(batches, tuple) else ""
        raise InputError(f"{name} is one batch, {described(batches)}: {advice}{several}")
