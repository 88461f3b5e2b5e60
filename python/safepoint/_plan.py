"""From the pieces of one rank to the layout of its shard: where their bytes go, and the header's static part.

Computed once per structure: a save whose walk gives equal tokens, shapes and dtypes reuses the plan. Layout of the
file: docs/formats/shard.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safepoint import _core
from safepoint._objects import Json
from safepoint._pieces import Piece, check_tensor, compact, make_pieces, owned_by
from safepoint._shard import VERSION
from safepoint._state import Flat, Names, Token, check_names
from safepoint._walk import Addresses, Tensors, describe, paused_collector, read_tensors
from safepoint.errors import InternalError, InvalidArgument, NotPlain

ALIGN = 4096
Table = npt.NDArray[np.uint64]


def align_up(value: int) -> int:
    return -(-value // ALIGN) * ALIGN


@dataclass(slots=True)
class Snapshot:
    """What is compared to see that the structure did not change."""

    tokens: list[Token]
    tensors: Tensors
    boxes: list[object]  # Of the boxed tensors, in their order.
    arrays: list[tuple[object, ...]]

    @staticmethod
    def of(flat: Flat) -> Snapshot:
        """RuntimeError, NotImplementedError, ValueError: a tensor has no such thing as an address or strides."""
        return Snapshot(flat.tokens, read_tensors(flat.tensors), _boxes(flat), _arrays(flat))


def _boxes(flat: Flat) -> list[object]:
    return [boxed.boxes for boxed in flat.boxed]


def _arrays(flat: Flat) -> list[tuple[object, ...]]:
    return [(a.dtype.str, a.shape) if isinstance(a, np.ndarray) else (type(a), len(a)) for a in flat.arrays]


@dataclass(slots=True)
class SavePlan:
    """Layout of one rank's shard for one structure."""

    snapshot: Snapshot
    names: Names
    ties: list[tuple[int, int]]  # (alias, base) among tensors; both must still share their bytes.
    static: bytes
    structure: bytes
    data_bytes: int
    order: npt.NDArray[np.intp]  # Number of the piece per segment, by rising data offset; empty pieces have none.
    offsets: Table  # Data offset per segment.
    sizes: Table
    copied: list[
        int
    ]  # Tensors in `order` whose bytes must be made first: not contiguous, or with a conjugate or negative bit.
    device: list[int]  # Tensors in `order` that are not in this machine's memory.
    values: list[int]  # Owned values, numbers in `flat.values`.
    owned_values: frozenset[int]
    value_paths: list[str]  # Their paths as JSON texts.
    expected: bool
    room: int = 0

    def match(self, flat: Flat) -> Addresses | None:
        """Addresses of `flat.tensors`, if the plan describes this state, too; `flat` is of a walk that was given the
        plan's tokens.
        """
        known = self.snapshot
        if flat.tokens is not known.tokens or _boxes(flat) != known.boxes or _arrays(flat) != known.arrays:
            return None
        try:
            addresses = known.tensors.match(flat.tensors)
        except (RuntimeError, NotImplementedError, ValueError):
            return None  # One of them has no address any more; `prepare` tells it by name.
        if addresses is None or any(addresses[alias] != addresses[base] for alias, base in self.ties):
            return None
        return addresses

    def dynamic_part(self, step: Json, objects: str) -> tuple[bytes, int]:
        """The dynamic part padded to its room, after the length word; and the static offset.

        Room never shrinks, so that offsets rarely change.
        """
        values = f'"safepoint.step":{compact(compact(step))},"safepoint.objects":{compact(objects)}'
        text = f'{{"__metadata__":{{{values}'.encode("ascii")
        if 8 + len(text) > self.room:
            self.room = align_up(8 + len(text) + max(256, len(text) // 4))
        return text.ljust(self.room - 8), self.room

    @property
    def header_bytes(self) -> int:
        return self.room + len(self.static)

    def length(self) -> int:
        return self.header_bytes + self.data_bytes

    def header(self, dynamic: bytes) -> bytes:
        return (self.header_bytes - 8).to_bytes(8, "little") + dynamic + self.static

    def segments(self, addresses: npt.NDArray[np.uint64]) -> Table:
        """Rows of (address, shard offset, size) for `_core.Lease.start`."""
        table = np.empty((len(self.order), 3), dtype=np.uint64)
        table[:, 0] = addresses[self.order]
        table[:, 1] = self.offsets + np.uint64(self.header_bytes)
        table[:, 2] = self.sizes
        return table


def _static_part(
    pieces: Sequence[Piece], placed: Sequence[tuple[int, int]], aliases: Sequence[int], expected: list[str]
) -> bytes:
    """`placed`: (piece, data offset) of what is in the file; `aliases`: owned pieces that share another's bytes."""
    # In the order of the state, so that dicts made from the file have it, too.
    rows = [(pieces[number], begin) for number, begin in sorted(placed)]
    entries = [(p.key, p.dtype, p.stored_shape, p.offsets, begin, begin + p.nbytes) for p, begin in rows]
    held = [p for p, _ in rows]
    named = held + [pieces[number] for number in aliases]
    about: dict[str, dict[str, Json]] = {
        "global": {p.key: p.global_shape for p in held if p.global_shape != p.shape},
        "path": {p.key: p.leaf.path for p in named if list(p.leaf.path) != p.name.split(".")},
        "raw": {p.key: {"dtype": p.raw, "shape": p.shape} for p in held if p.raw is not None},
        "alias": {pieces[number].key: pieces[pieces[number].alias_of].key for number in aliases},
        "name": {p.key: p.name for p in named if p.key != p.name},
    }
    info: dict[str, Json] = {"version": VERSION, **{key: value for key, value in about.items() if value}}
    if expected:
        info["expected"] = expected
    return _core.static_part(entries, compact(info))


@paused_collector()
def make_plan(
    flat: Flat, names: Names, pieces: list[Piece], snapshot: Snapshot, *, rank: int, world_size: int, agreed: bool
) -> SavePlan:
    """`agreed`: all ranks are known to have the same structure, so each tensor needs one owner only."""
    owned = owned_by(pieces, rank, world_size, agreed)
    stored: list[int] = []
    aliases: list[int] = []
    for number, (piece, own) in enumerate(zip(pieces, owned, strict=True)):
        if own:
            (stored if piece.alias_of < 0 else aliases).append(number)
    nbytes = np.array([piece.nbytes for piece in pieces], dtype=np.uint64)
    order = np.array(stored, dtype=np.intp)
    # No gaps are allowed in the file: multiples of 64 bytes first, then by falling element size, so that everything is
    # aligned by itself.
    uneven = nbytes[order] % 64 != 0
    if uneven.any():
        rest = sorted(order[uneven].tolist(), key=lambda number: -pieces[number].alignment)
        order = np.concatenate((order[~uneven], np.array(rest, dtype=np.intp)))
    sizes = nbytes[order]
    offsets = np.cumsum(sizes, dtype=np.uint64) - sizes
    placed = list(zip(order.tolist(), offsets.tolist(), strict=True))
    expected: list[str] = []
    if agreed and world_size > 1:
        expected = sorted({p.name for p in pieces if not p.leaf.per_rank and not p.is_value})
    static = _static_part(pieces, placed, aliases, expected)
    data_bytes = int(sizes.sum())
    filled = sizes > 0
    order, offsets, sizes = order[filled], offsets[filled], sizes[filled]
    tensors = snapshot.tensors
    in_memory = order[order < len(flat.tensors)]
    for number in in_memory[tensors.addresses[in_memory] == 0].tolist():
        raise NotPlain(f"{pieces[number].leaf.name}: a tensor without memory of its own")
    far = np.array([device.type != "cpu" for device in tensors.devices], dtype=np.bool_)
    odd = ~tensors.contiguous | tensors.negative | tensors.conjugate
    values = [i for i, leaf in enumerate(names.values) if leaf.per_rank or not agreed or rank == 0]
    return SavePlan(
        snapshot=snapshot,
        names=names,
        ties=[(n, p.alias_of) for n, p in enumerate(pieces) if p.alias_of >= 0],
        static=static,
        structure=hashlib.sha256(static).digest(),
        data_bytes=data_bytes,
        order=order,
        offsets=offsets,
        sizes=sizes,
        copied=in_memory[odd[in_memory] & ~far[in_memory]].tolist(),
        device=in_memory[far[in_memory]].tolist(),
        values=values,
        owned_values=frozenset(values),
        value_paths=[compact(names.values[i].path) for i in values],
        expected=bool(expected),
    )


def array_address(array: np.ndarray[Any, Any] | bytes | bytearray) -> tuple[int, np.ndarray[Any, Any]]:
    """Address of the values in row-major order, and the object that keeps them there."""
    if not isinstance(array, np.ndarray):
        array = np.frombuffer(array, dtype=np.uint8)
    array = np.ascontiguousarray(array)
    return array.ctypes.data, array


@paused_collector()
def prepare(flat: Flat, rank: int) -> tuple[Names, list[Piece], Snapshot]:
    """Everything that ownership is decided from. InvalidArgument or NotPlain names what cannot be saved."""
    names = describe(flat.tokens)
    check_names(names)
    if (
        len(names.tensors) != len(flat.tensors)
        or len(names.arrays) != len(flat.arrays)
        or len(names.values) != len(flat.values)
    ):
        raise InternalError("the walk and its description differ")
    try:
        snapshot = Snapshot.of(flat)
        pieces = make_pieces(flat, names, rank, snapshot.tensors)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, NotPlain):
            raise
        for tensor, leaf in zip(flat.tensors, names.tensors, strict=True):
            check_tensor(tensor, leaf)
            try:
                read_tensors([tensor])
            except (RuntimeError, NotImplementedError, ValueError) as reason:
                raise NotPlain(f"{leaf.name}: {type(tensor).__qualname__} has no plain bytes: {reason}") from reason
        raise NotPlain(f"a tensor has no plain bytes: {error}") from error
    if len({p.name for p in pieces}) != len({p.leaf.name for p in pieces}):
        raise InvalidArgument(
            "the name of one part of the state is that of a PerRank part with @ and the rank behind it"
        )
    return names, pieces, snapshot
