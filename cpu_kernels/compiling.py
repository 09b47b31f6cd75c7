"""How kernels are compiled: once, for good, and anew when a file of this package has changed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

# functools.cache lets two threads both compile and then drops one result, whose code is in use.
_COMPILING = threading.Lock()


@cache
def source_stamp() -> int:
    """Return a number made from the files' times of change.

    numba's disk cache looks at the file of the compiled function only, but what a function closes
    over is part of its key: a kernel that closes over this number is compiled again when a file
    that it calls has changed. (Not over a compiled function: that makes a new key in every
    process.)

    Examples
    --------
    >>> source_stamp() > 0
    True
    """
    total = sum(file.stat().st_mtime_ns for file in Path(__file__).parent.glob("*.py"))
    return total % 2**62  # numba's integers have 64 bits


def compile_body(call: type[ctypes.Structure]) -> Callable[[Callable[..., None]], Any]:
    """Return a decorator that makes a Python function `void body(call *)`, kept on disk.

    The function gets a numba pointer; `numba.carray(pointer, 1)[0]` is the call.
    """
    pointer = types.CPointer(numba.from_dtype(np.dtype(call)))  # type: ignore[no-untyped-call]
    compile_it: Callable[[Callable[..., None]], Any] = numba.cfunc(
        types.void(pointer), cache=True, nogil=True, error_model="numpy"
    )
    return compile_it


def compiled_address(compiled: Callable[..., Any], *arguments: Any) -> int:
    """Return the address of the C function that a `functools.cache`d compilation gives."""
    with _COMPILING:
        return int(compiled(*arguments).address)
