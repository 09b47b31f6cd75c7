"""Memory that the calls of one thread's kernels use again and again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64


def aligned_bytes(num_bytes: int) -> NDArray[np.uint8]:
    """Return bytes of any contents that begin at a cache line.

    numpy asks for huge pages for them where the system leaves that to the program; torch does not.

    Examples
    --------
    >>> aligned_bytes(100).size, aligned_bytes(100).ctypes.data % 64
    (100, 0)
    """
    spare = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -spare.ctypes.data % ALIGNMENT
    return spare[start : start + num_bytes]


class Scratch:
    """A buffer that grows to the largest call so far. Mutable; one call at a time may use it.

    Memory fresh from the system is zeroed page by page when it is first touched, which costs more
    than many a product: a caller keeps one of these for all its calls.

    Examples
    --------
    >>> scratch = Scratch()
    >>> scratch.address(1000) % 64, scratch.num_bytes >= 1000
    (0, True)
    """

    def __init__(self) -> None:
        self._bytes: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._address = 0
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self._num_bytes

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return at least `num_bytes` of any contents that begin at a cache line.

        Whoever holds the array may use it after the buffer has grown elsewhere.
        """
        self.address(num_bytes)
        return self._bytes

    def address(self, num_bytes: int) -> int:
        """Return the address of at least `num_bytes` of any contents, at a cache line's start."""
        if num_bytes > self._num_bytes:
            # A quarter more: contexts grow by a token a step.
            self._num_bytes = num_bytes + num_bytes // 4
            self._bytes = aligned_bytes(self._num_bytes)
            self._address = self._bytes.ctypes.data
        return self._address
