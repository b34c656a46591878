"""Compiled work on torch's own threads: one OpenMP runtime and one pool, so none competes with torch's for the cores."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info


def run(worker: int, arguments: NDArray[np.int64]) -> None:
    """Call a compiled worker on each of torch's threads (`torch.get_num_threads`), all with the same arguments.

    The workers share the work out among themselves. Where torch has no OpenMP, one of them does all of it.

    Args:
        worker: address of a function ``void worker(int64_t *arguments)``.
        arguments: what it is given; it may write to it.
    """
    parallel = _parallel()
    if parallel is None or torch.get_num_threads() == 1:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker)(arguments.ctypes.data)
    else:
        parallel(worker, arguments.ctypes.data, torch.get_num_threads(), 0)


@cache
def _parallel() -> Callable[..., Any] | None:
    """Return ``GOMP_parallel`` of the OpenMP runtime that torch runs on, which LLVM's and Intel's runtimes have as well."""
    runtimes = [Path(each["filepath"]) for each in threadpool_info() if each["user_api"] == "openmp"]
    own = [path for path in runtimes if Path(torch.__file__).parent in path.parents]
    for path in own or runtimes[:1]:
        function: Any = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if function is not None:
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            function.restype = None
            return function  # type: ignore[no-any-return]
    return None
