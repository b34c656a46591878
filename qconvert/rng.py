"""The random number generators, left as they were."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the generators of torch, Python and numpy when done: a user's forward may draw while it is traced or counted.

    Args:
        seed: what they start from meanwhile; None leaves them where they are.
    """
    numpy = sys.modules.get("numpy")  # no dependency; a forward that draws from it has imported it
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            if seed is not None:
                random.seed(seed)
                torch.default_generator.manual_seed(
                    seed
                )  # torch.manual_seed would write down the stack for every GPU backend
                if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                    torch.cuda.manual_seed_all(seed)
                if numpy:
                    numpy.random.seed(seed)
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
