"""How a worker is compiled: for later processes too, where numba finds a folder that it may write to."""

from collections.abc import Callable
from typing import Any

from numba import cfunc, types

_SIGNATURE = types.void(types.CPointer(types.int64))


def compiled_worker(code: Callable[..., None]) -> Any:
    """Return code compiled to ``void worker(int64_t *arguments)``, or read from numba's cache.

    Where the package's folder and the home folder are both read-only there is none: each process compiles for itself.
    """
    try:
        return cfunc(_SIGNATURE, cache=True)(code)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        return cfunc(_SIGNATURE)(code)
