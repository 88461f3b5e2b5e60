"""The reads of one restore: which bytes of which shard go where, and reading them, verified."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from safepoint import _torch
from safepoint._boxes import Box
from safepoint._objects import Decoder, array_dtype
from safepoint._shard import Checkpoint, Shard, StoredPiece, parse_shard
from safepoint._state import LONG_DTYPES, LONG_KINDS
from safepoint.errors import Corrupt, ProtocolError

if TYPE_CHECKING:
    from safepoint._core import ReadPin, ShardReader, StoredPin

    Pin = ReadPin | StoredPin  # One attempt that is held for reading, in memory or in a store.

Table = npt.NDArray[np.uint64]

_BLOCK = 1 << 20
_ROW_BYTES = 256  # What could be copied in the time that one row of a table takes.


class _Read(NamedTuple):
    rank: int
    begin: int
    nbytes: int
    address: int
    in_place: bool  # Into the caller's memory.


def stored_dtype(piece: StoredPiece) -> torch.dtype | None:
    """None: it is no tensor of torch's."""
    return _torch.DTYPES_BY_NAME.get(piece.dtype) if piece.raw is None else _torch.RAW_DTYPES.get(piece.raw)


class Shards:
    """The shards of one pinned attempt, in memory or in a store; opens each once."""

    def __init__(self, pin: Pin) -> None:
        self.pin = pin
        self._readers: dict[int, ShardReader] = {}

    @property
    def source(self) -> str:
        """The tier that the shards opened so far are read from."""
        tiers = {reader.from_store for reader in self._readers.values()}
        return "memory+durable" if len(tiers) == 2 else "durable" if True in tiers else "memory"

    def reader(self, rank: int) -> ShardReader:
        if rank not in self._readers:
            self._readers[rank] = self.pin.shard(rank)
        return self._readers[rank]

    @contextlib.contextmanager
    def reporting(self, rank: int, modified: bool = False, in_place: bool = False) -> Iterator[None]:
        """Tells the daemon about a corrupt block, and the error what happened to the caller's state.

        `modified`: it was changed before; `in_place`: what runs here writes into it.
        """
        try:
            yield
        except Corrupt as error:
            error.state_modified = modified or (in_place and error.state_modified)
            error.rank = rank
            if error.block is not None:
                self.pin.report_corrupt(rank, error.block)
            raise

    def parse(self, rank: int) -> Shard:
        """The verified and parsed header. ProtocolError: it is not of this attempt and rank (nothing is ever mixed)."""
        with self.reporting(rank):
            reader = self.reader(rank)
            shard = parse_shard(reader.header(), rank, reader.static_offset)
        info = self.pin.info
        found = (shard.step["attempt"], shard.step["step"], shard.step["world_size"])
        if found != (info.attempt.hex(), info.step, info.world_size):
            raise ProtocolError(
                f"shard of rank {rank}: its header says (attempt, step, world size) {found}, "
                f"the daemon {(info.attempt.hex(), info.step, info.world_size)}"
            )
        return shard


class Reads:
    """Collects reads; nothing is read before `run`."""

    def __init__(self, stored: Checkpoint, decoder: Decoder) -> None:
        self._stored = stored
        self._decoder = decoder
        self._reads: list[_Read] = []
        self._ranges: dict[int, list[Table]] = {}  # By rank; rows of (offset in the shard, bytes, address).
        self._placed: set[tuple[object, ...]] = set()  # What the ranges into plain memory are.
        self._in_place: set[int] = set()  # Ranks with ranges that go into the caller's memory.
        self._keep: list[Any] = []  # Memory that reads go to.
        self._changed: list[torch.Tensor] = []
        # What follows the reads: copies out of temporary memory, values put in place.
        self.after: list[Callable[[], None]] = []

    @property
    def bytes(self) -> int:
        """What `run` copies out of the shards."""
        ranges = sum(int(table[:, 1].sum()) for tables in self._ranges.values() for table in tables)
        return sum(read.nbytes for read in self._reads) + ranges

    def whole(self, pairs: list[tuple[torch.Tensor, StoredPiece, int, int]]) -> None:
        """Whole stored tensors straight into the caller's: (tensor, piece, its address, its bytes), each contiguous and
        in this machine's memory.
        """
        for _, piece, _, nbytes in pairs:
            if piece.nbytes != nbytes:
                raise _wrong_size(piece, nbytes)
        tensors = [pair[0] for pair in pairs]
        self._changed += tensors
        self._keep += tensors
        make = tuple.__new__  # What _Read(...) comes to, without its frame.
        self._reads += [make(_Read, (piece[0], piece[6], nbytes, at, True)) for _, piece, at, nbytes in pairs]

    def into(
        self, tensor: torch.Tensor, name: str, pieces: list[StoredPiece], box: Box | None, *, in_place: bool
    ) -> str | None:
        """The stored pieces into a tensor, `box` of the global one. Returns what is wrong, if they do not fill it.

        `in_place`: it is the caller's.
        """
        offsets = box.offsets if box is not None else (0,) * tensor.dim()
        for piece in pieces:
            _check(piece, pieces[0], name)
        if in_place and tensor.numel():
            self._changed.append(tensor)
        plain = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
        size = tuple(tensor.shape)
        for piece in pieces:
            if piece.shape == size and (piece.offsets or (0,) * len(size)) == offsets:
                direct = plain and tensor.is_contiguous()
                target = tensor if direct else torch.empty(size, dtype=tensor.dtype)
                self._read(piece, target, in_place and direct)
                if not direct:
                    self.after.append(functools.partial(_torch.copy_values, tensor, target))
                return None
        overlaps = [overlap for piece in pieces if (overlap := _overlap(piece, offsets, size)) is not None]
        filled = sum(math.prod(overlap.sizes) for overlap in overlaps)
        if filled != tensor.numel() or not _disjoint(overlaps):
            return f"{name} (its pieces fill {filled} of {tensor.numel()} elements)"
        for overlap in overlaps:
            self._range(tensor, overlap, plain, in_place)
        return None

    def converted(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        """After the reads: what was read into `source`, into one of the caller's tensors of another dtype."""
        self._changed.append(tensor)
        self.after.append(functools.partial(_torch.copy_values, tensor, source))

    def _range(self, tensor: torch.Tensor, overlap: _Overlap, plain: bool, in_place: bool) -> None:
        """What a tensor and a piece that was cut otherwise have in common: only that is read."""
        piece, sizes = overlap.piece, overlap.sizes
        item = tensor.element_size()
        if math.prod(piece.shape) * item != piece.nbytes:
            raise ProtocolError(
                f"the shard of rank {piece.rank} has {piece.nbytes} bytes for {list(piece.shape)} {tensor.dtype}"
            )
        target = tensor
        for dimension, (first, count) in enumerate(zip(overlap.target, sizes, strict=True)):
            target = target.narrow(dimension, first, count)
        strides = _row_major(piece.shape)
        begin = piece.begin + item * sum(a * b for a, b in zip(overlap.source, strides, strict=True))
        run, outer = _run(sizes, strides, target.stride() if plain else _row_major(sizes))
        span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if outer and span * item < _ROW_BYTES * math.prod(size for size, _, _ in outer):
            # So close together that a table of them costs more: one range that has them all, and torch picks.
            buffer = torch.empty(span, dtype=tensor.dtype)
            self._add_rows(piece.rank, [(begin, span * item, buffer.data_ptr())], False, buffer)
            self.after.append(functools.partial(_torch.copy_values, target, buffer.as_strided(sizes, strides)))
            return
        if not plain:
            buffer = torch.empty(sizes, dtype=tensor.dtype)
            self.after.append(functools.partial(_torch.copy_values, target, buffer))
            target = buffer
        elif (place := (piece.rank, begin, target.data_ptr(), sizes)) in self._placed:
            return  # A tied target asks for the same bytes again.
        else:
            self._placed.add(place)
        begins = _begins(outer)
        table = np.empty((len(begins), 3), dtype=np.uint64)
        table[:, 0] = begins[:, 0] * item + begin
        table[:, 1] = run * item
        table[:, 2] = begins[:, 1] * item + target.data_ptr()
        self._add_rows(piece.rank, table, in_place and plain, target)

    def _add_rows(self, rank: int, rows: Any, in_place: bool, target: torch.Tensor) -> None:
        self._keep.append(target)
        self._ranges.setdefault(rank, []).append(np.asarray(rows, dtype=np.uint64))
        if in_place:
            self._in_place.add(rank)

    def _read(self, piece: StoredPiece, target: torch.Tensor, in_place: bool) -> None:
        if piece.nbytes != target.nbytes:
            raise _wrong_size(piece, target.nbytes)
        if piece.nbytes:
            self._keep.append(target)
            self._reads.append(_Read(piece.rank, piece.begin, piece.nbytes, target.data_ptr(), in_place))

    def getter(self, name: str, old: Any) -> Callable[[], Any]:
        """How to get what is stored under a name, once it was read. An array goes into `old` where that fits."""
        stored = self._stored.values.get(name)
        if stored is not None:
            value = self._decoder.decode(stored.coded, name)
            return lambda: value
        pieces = self._stored.pieces[name]
        first = pieces[0]
        if first.raw in ("bytes", "bytearray"):
            buffer = np.empty(first.nbytes, dtype=np.uint8)
            self._read_array(first, buffer, in_place=False)
            return lambda: buffer.tobytes() if first.raw == "bytes" else bytearray(buffer)
        if first.raw is not None and first.raw.startswith("numpy:"):
            dtype = array_dtype(first.raw.removeprefix("numpy:"))
            if math.prod(first.shape) * dtype.itemsize != first.nbytes:
                raise ProtocolError(f"{name}: {first.nbytes} bytes for an array of {list(first.shape)} {dtype}")
            same = isinstance(old, np.ndarray) and old.dtype == dtype and old.shape == first.shape
            in_place = same and old.flags.c_contiguous and old.flags.writeable
            array = old if in_place else np.empty(first.shape, dtype)
            self._read_array(first, array, in_place=in_place)
            return lambda: array
        kind, _, name_of_dtype = (first.raw or "").partition(":")
        if kind in LONG_KINDS:
            return self._long_sequence(first, LONG_KINDS[kind], name_of_dtype, name)
        torch_dtype = stored_dtype(first)
        if torch_dtype is None:
            raise ProtocolError(f"{name}: unknown type {first.raw or first.dtype}")
        tensor = torch.empty(first.global_shape, dtype=torch_dtype)
        if (problem := self.into(tensor, name, pieces, None, in_place=False)) is not None:
            raise ProtocolError(problem)
        return lambda: tensor

    def _long_sequence(
        self, piece: StoredPiece, make: Callable[[Any], Any], dtype: str, name: str
    ) -> Callable[[], Any]:
        if (
            dtype not in LONG_DTYPES
            or len(piece.shape) != 1
            or piece.shape[0] * np.dtype(dtype).itemsize != piece.nbytes
        ):
            raise ProtocolError(f"{name}: {piece.nbytes} bytes for {list(piece.shape)} elements of {piece.raw!r}")
        array = np.empty(piece.shape, dtype)
        self._read_array(piece, array, in_place=False)
        return lambda: make(array.tolist())

    def _read_array(self, piece: StoredPiece, array: np.ndarray[Any, Any], *, in_place: bool) -> None:
        self._keep.append(array)
        if piece.nbytes:
            self._reads.append(_Read(piece.rank, piece.begin, piece.nbytes, array.ctypes.data, in_place))

    def verify(self, shards: Shards) -> None:
        """Checks every block that will be read. Corrupt: one does not match; nothing was changed."""
        for rank, table in self._tables():
            first = table[:, 0] // _BLOCK
            last = (table[:, 0] + table[:, 1] - np.uint64(1)) // _BLOCK
            # Some range touches a block where more ranges began than had ended.
            steps = np.zeros(int(last.max()) + 2, dtype=np.int64)
            np.add.at(steps, first.astype(np.intp), 1)
            np.add.at(steps, last.astype(np.intp) + 1, -1)
            wanted = np.cumsum(steps) > 0
            edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False])).astype(np.int8)))
            for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                bad = shards.reader(rank).verify(begin, end - begin)
                if bad:
                    shards.pin.report_corrupt(rank, bad[0])
                    error = Corrupt(
                        f"shard of rank {rank}: block {bad[0]} does not match its checksum; nothing was changed"
                    )
                    error.rank, error.block = rank, bad[0]
                    raise error

    def _tables(self) -> Iterator[tuple[int, Table]]:
        """Per rank everything that is read: rows of (offset in the shard, bytes, address)."""
        tables = {rank: list(ranges) for rank, ranges in self._ranges.items()}
        wholes: dict[int, list[tuple[int, int, int]]] = {}
        for read in dict.fromkeys(self._reads):  # Tied targets ask for the same bytes twice.
            wholes.setdefault(read.rank, []).append((read.begin, read.nbytes, read.address))
        for rank, rows in wholes.items():
            tables.setdefault(rank, []).append(np.array(rows, dtype=np.uint64))
        for rank, parts in tables.items():
            yield rank, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def run(self, shards: Shards) -> None:
        """Reads, then does what follows. Corrupt says whether the caller's state was changed."""
        modified = False
        writes_in_place = self._in_place | {read.rank for read in self._reads if read.in_place}
        for rank, table in self._tables():
            in_place = rank in writes_in_place
            with shards.reporting(rank, modified, in_place):
                shards.reader(rank).read(table.data)
            modified = modified or in_place
        for action in self.after:
            action()
        _torch.bump_versions(self._changed)


class _Overlap(NamedTuple):
    """What a stored piece and a target have in common."""

    piece: StoredPiece
    source: tuple[int, ...]  # Where it begins in the piece.
    target: tuple[int, ...]  # And in the target.
    sizes: tuple[int, ...]


def _check(piece: StoredPiece, first: StoredPiece, name: str) -> None:
    """ProtocolError: a piece is not inside its tensor, or of another one than the first. Headers are not trusted."""
    whole = piece.global_shape
    at = piece.offsets or (0,) * len(whole)
    if (
        (piece.dtype, piece.raw, whole) != (first.dtype, first.raw, first.global_shape)
        or not len(at) == len(piece.shape) == len(whole)
        or any(not 0 <= begin <= begin + size <= n for begin, size, n in zip(at, piece.shape, whole, strict=True))
    ):
        raise ProtocolError(
            f"{name}: the shard of rank {piece.rank} says {list(piece.shape)} {piece.raw or piece.dtype} at {list(at)} "
            f"of {list(whole)}, that of rank {first.rank} {first.raw or first.dtype} of {list(first.global_shape)}"
        )


def _overlap(piece: StoredPiece, offsets: tuple[int, ...], shape: tuple[int, ...]) -> _Overlap | None:
    at = piece.offsets or (0,) * len(piece.shape)
    low = [max(a, b) for a, b in zip(at, offsets, strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(at, piece.shape, offsets, shape, strict=True)]
    sizes = tuple(h - lo for lo, h in zip(low, high, strict=True))
    if any(size <= 0 for size in sizes):
        return None
    return _Overlap(
        piece,
        tuple(lo - a for lo, a in zip(low, at, strict=True)),
        tuple(lo - b for lo, b in zip(low, offsets, strict=True)),
        sizes,
    )


def _disjoint(overlaps: list[_Overlap]) -> bool:
    """Whether no two have an element in common: with the right count, they fill the target. Headers are not trusted."""
    if len(overlaps) < 2:
        return True
    low = np.array([overlap.target for overlap in overlaps], dtype=np.int64)
    high = low + np.array([overlap.sizes for overlap in overlaps], dtype=np.int64)
    cut = np.flatnonzero((low != low[0]).any(axis=0) | (high != high[0]).any(axis=0))
    if len(cut) == 1:  # The usual case, with a piece per rank of the job that saved it.
        order = np.argsort(low[:, cut[0]], kind="stable")
        return bool((high[order[:-1], cut[0]] <= low[order[1:], cut[0]]).all())
    for number in range(1, len(overlaps)):
        if ((low[:number] < high[number]) & (low[number] < high[:number])).all(axis=1).any():
            return False
    return True


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dimension in range(len(shape) - 2, -1, -1):
        strides[dimension] = strides[dimension + 1] * shape[dimension + 1]
    return tuple(strides)


Outer = list[tuple[int, int, int]]  # (size, stride in the source, stride in the target), the outermost first.


def _run(sizes: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, Outer]:
    """A box that has these strides in two places: how many elements follow each other in both, and what is around."""
    outer = [(n, a, b) for n, a, b in zip(sizes, source, target, strict=True) if n != 1]
    run = 1
    while outer and outer[-1][1] == run and outer[-1][2] == run:
        run *= outer.pop()[0]
    return run, outer


def _begins(outer: Outer) -> npt.NDArray[np.uint64]:
    """Where the runs begin: rows of (element in the source, element in the target), from the box's first ones."""
    rows = np.zeros((1, 2), dtype=np.uint64)
    for size, a, b in reversed(outer):
        steps = np.arange(size, dtype=np.uint64)[:, None] * np.array([a, b], dtype=np.uint64)
        rows = (steps[:, None, :] + rows[None, :, :]).reshape(-1, 2)
    return rows


def _wrong_size(piece: StoredPiece, nbytes: int) -> ProtocolError:
    """A header is never trusted with the bounds of the caller's memory."""
    return ProtocolError(f"the shard of rank {piece.rank} has {piece.nbytes} bytes for {nbytes}")
