"""One step as the exporters read it: its tensors merged from all ranks' pieces, its values, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from safepoint import _torch
from safepoint._objects import Json
from safepoint._reads import Shards
from safepoint._shard import Checkpoint, StoredPiece, name_of
from safepoint._state import element_text
from safepoint.errors import NotFound, ProtocolError
from safepoint.interchange._arrays import element_dtype
from safepoint.interchange._boxes import fill_problem, is_run, linear, slabs

if TYPE_CHECKING:
    from safepoint._reads import Pin

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
BUFFER = 8 << 20


@dataclass(slots=True)
class Tensor:
    """A whole tensor or array of the step."""

    name: str  # In the export.
    path: list[Json]  # In the export; without the rank of a per-rank one.
    rank: int | None  # Of a per-rank one, whose name ends in "@<rank>".
    dtype: str  # safetensors' name.
    raw: str | None  # True type where `dtype` does not say it.
    shape: tuple[int, ...]  # In true elements.
    item: int  # Bytes per true element.
    pieces: list[StoredPiece]  # Different ones, in row-major order of where they begin; they fill the shape.

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.item

    @property
    def file_shape(self) -> tuple[int, ...]:
        """As a safetensors file states it; docs/formats/shard.md, `raw`."""
        if self.raw is None or self.dtype != "U8" or self.item == 1:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] * self.item) if self.shape else (self.item,)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None: it is an array or bytes."""
        return _torch.DTYPES_BY_NAME.get(self.dtype) if self.raw is None else _torch.RAW_DTYPES.get(self.raw)


@dataclass(slots=True)
class Value:
    """A plain value of the step, still encoded."""

    name: str
    path: list[Json]
    rank: int | None
    coded: Json


def item_size(dtype: str, raw: str | None) -> int:
    """Bytes per element. ProtocolError: an unknown type."""
    elements = element_dtype(raw)
    if elements is not None:
        return elements.itemsize
    known = _torch.DTYPES_BY_NAME.get(dtype) if raw is None else _torch.RAW_DTYPES.get(raw)
    if known is None:
        raise ProtocolError(f"unknown type {raw or dtype}")
    return known.itemsize


def origin(piece: StoredPiece) -> tuple[int, ...]:
    return piece.offsets or (0,) * len(piece.shape)


def distinct_pieces(pieces: Sequence[StoredPiece], name: str) -> list[StoredPiece]:
    """Each box once (the first wins), without empty ones unless the tensor is empty, in row-major order.

    ProtocolError: they contradict each other, or do not fill the tensor.
    """
    first = pieces[0]
    shape = first.global_shape
    found: dict[tuple[Any, ...], StoredPiece] = {}
    for piece in pieces:
        if (piece.dtype, piece.raw, piece.global_shape) != (first.dtype, first.raw, shape):
            raise ProtocolError(f"{name}: ranks {first.rank} and {piece.rank} disagree on its dtype or shape")
        if piece.nbytes != math.prod(piece.shape) * item_size(piece.dtype, piece.raw):
            raise ProtocolError(f"{name}: {piece.nbytes} bytes for {list(piece.shape)} {piece.raw or piece.dtype}")
        if piece.nbytes:
            found.setdefault((origin(piece), piece.shape), piece)
    problem = fill_problem(list(found), shape)
    if problem is not None:
        raise ProtocolError(f"{name}: {problem}")
    return sorted(found.values(), key=lambda p: linear(origin(p), shape)) or [first]


def rank_in_name(name: str, path: Sequence[Json]) -> int | None:
    """The rank behind a per-rank name: `x@3` at the path `["x"]`."""
    base = name_of(path)
    tail = name[len(base) + 1 :]
    return int(tail) if name == f"{base}@{tail}" and tail.isdecimal() else None


def strip_path(path: Sequence[Json], prefix: str) -> list[Json]:
    """The path below `prefix` (elements joined by dots), which may end inside an element that has dots itself."""
    rest = prefix
    for depth, element in enumerate(path):
        text = element_text(element)
        if text == rest:
            return list(path[depth + 1 :])
        if rest.startswith(f"{text}."):
            rest = rest[len(text) + 1 :]
        elif text.startswith(f"{rest}."):
            return [text[len(rest) + 1 :], *path[depth + 1 :]]
        else:
            break
    raise ProtocolError(f"the path {list(path)} does not follow its name below {prefix!r}")


class StepSource:
    """The parts of one pinned attempt below `prefix` ("": all), and reading their bytes, verified.

    NotFound: nothing is below the prefix. ProtocolError, Corrupt: the shards are damaged.
    """

    def __init__(self, pin: Pin, prefix: str, progress: Progress) -> None:
        self.info = pin.info
        self._shards = Shards(pin)
        self._progress = progress
        stored = Checkpoint()
        for rank in range(pin.info.world_size):  # Where pieces repeat, the lowest rank's is read.
            stored.add(self._shards.parse(rank))
        self.tensors: list[Tensor] = []
        self.values: list[Value] = []
        for name, pieces in stored.pieces.items():
            path = list(stored.path_of(name))
            place = self._place(name, path, prefix)
            if place is None:
                continue
            chosen = distinct_pieces(pieces, name)
            first = chosen[0]
            item = item_size(first.dtype, first.raw)
            self.tensors.append(Tensor(*place, first.dtype, first.raw, first.global_shape, item, chosen))
        for name, value in stored.values.items():
            place = self._place(name, list(value.path), prefix)
            if place is not None:
                self.values.append(Value(*place, value.coded))
        if prefix and not (self.tensors or self.values):
            raise NotFound(f"step {pin.info.step} has nothing below {prefix!r}")
        self.total = sum(tensor.nbytes for tensor in self.tensors)
        self._done = 0

    @staticmethod
    def _place(name: str, path: list[Json], prefix: str) -> tuple[str, list[Json], int | None] | None:
        rank = rank_in_name(name, path)
        if not prefix:
            return name, path, rank
        if not name.startswith(f"{prefix}."):
            return None
        return name[len(prefix) + 1 :], strip_path(path, prefix), rank

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self.total)

    def _read(self, piece: StoredPiece, offset: int, address: int, size: int) -> None:
        table = np.array([(piece.begin + offset, size, address)], dtype=np.uint64)
        with self._shards.reporting(piece.rank):
            self._shards.reader(piece.rank).read(table.data)
        self._advance(size)

    def read_piece(self, piece: StoredPiece, target: torch.Tensor | npt.NDArray[Any]) -> None:
        """The bytes of one piece into contiguous memory of their size."""
        if target.nbytes != piece.nbytes:
            raise ProtocolError(f"the shard of rank {piece.rank} has {piece.nbytes} bytes for {target.nbytes}")
        if piece.nbytes:
            address = target.data_ptr() if isinstance(target, torch.Tensor) else target.ctypes.data
            self._read(piece, 0, address, piece.nbytes)

    def chunks(self, tensor: Tensor) -> Iterator[memoryview]:
        """The row-major bytes of a whole tensor, in parts that are valid until the next one is asked for.

        Pieces that are runs of the tensor (sharding along the first dimension) go through a buffer of 8 MiB; others
        are put together in memory: one tensor plus that buffer.
        """
        if not tensor.nbytes:
            return
        buffer = np.empty(min(BUFFER, tensor.nbytes), dtype=np.uint8)
        if all(is_run(piece.shape, tensor.shape) for piece in tensor.pieces):
            for piece in tensor.pieces:
                for begin in range(0, piece.nbytes, BUFFER):
                    size = min(BUFFER, piece.nbytes - begin)
                    self._read(piece, begin, buffer.ctypes.data, size)
                    yield buffer[:size].data
            return
        whole = np.empty(tensor.shape, dtype=f"V{tensor.item}")
        for piece in tensor.pieces:
            at = origin(piece)
            for offsets, sizes in slabs(piece.shape, max(1, BUFFER // tensor.item)):
                box = tuple(slice(a + o, a + o + n) for a, o, n in zip(at, offsets, sizes, strict=True))
                size = math.prod(sizes) * tensor.item
                part = buffer[:size]
                self._read(piece, linear(offsets, piece.shape) * tensor.item, part.ctypes.data, size)
                whole[box] = part.view(whole.dtype).reshape(sizes)
        yield whole.reshape(-1).view(np.uint8).data
