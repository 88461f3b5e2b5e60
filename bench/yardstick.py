"""What every time is compared with: one warm memcpy of the same number of bytes by one thread."""

from __future__ import annotations

import ctypes
import time

import torch

_BUFFER_BYTES = 500_000_000  # Two are beyond every cache; more bytes are copied in turns, to spare memory.


class Yardstick:
    """The C library's memcpy between two touched buffers. Owned by one thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        length = min(size, _BUFFER_BYTES)
        self._source = torch.ones(length, dtype=torch.uint8)
        self._target = torch.ones(length, dtype=torch.uint8)
        self()

    def __call__(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        left = self._size
        while left > 0:
            length = min(left, self._source.numel())
            ctypes.memmove(self._target.data_ptr(), self._source.data_ptr(), length)
            left -= length
        return time.perf_counter() - began
