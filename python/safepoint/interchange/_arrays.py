"""What is stored like a tensor and is none: arrays, bytes, long lists of numbers. docs/formats/shard.md, `raw`."""

from __future__ import annotations

from typing import Any

import numpy as np

from safepoint._objects import array_dtype
from safepoint._state import LONG_DTYPES, LONG_KINDS
from safepoint.errors import ProtocolError

_BYTES = {"bytes": bytes, "bytearray": bytearray}


def element_dtype(raw: str | None) -> np.dtype[Any] | None:
    """The dtype of an array's elements; None: `raw` is the type of a tensor. ProtocolError: of nothing known."""
    if raw is None:
        return None
    if raw in _BYTES:
        return np.dtype(np.uint8)
    kind, colon, name = raw.partition(":")
    if not colon:
        return None
    if kind == "numpy" or (kind in LONG_KINDS and name in LONG_DTYPES):
        return array_dtype(name)
    raise ProtocolError(f"unknown kind of array {raw!r}")


def make_array(raw: str, shape: tuple[int, ...], data: Any) -> Any:
    """The object of that kind. A numpy array shares the memory of `data`."""
    if raw in _BYTES:
        return _BYTES[raw](data)
    dtype = element_dtype(raw)
    if dtype is None:
        raise ProtocolError(f"{raw} is no kind of array")
    array = np.frombuffer(data, dtype).reshape(shape)
    kind = raw.partition(":")[0]
    return array if kind == "numpy" else LONG_KINDS[kind](array.tolist())
