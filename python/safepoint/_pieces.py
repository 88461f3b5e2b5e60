"""What one rank has, piece by piece, and which pieces it owns. Decided without talking to another rank."""

from __future__ import annotations

import hashlib
import heapq
import json
import operator
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from safepoint import _torch
from safepoint._boxes import Box
from safepoint._objects import Json, array_dtype_name
from safepoint._state import NAME_BYTES_MAX, Flat, Leaf, LongList, LongTuple, Names
from safepoint._walk import Tensors
from safepoint.errors import InvalidArgument, NotPlain

_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def compact(value: Json) -> str:
    return _ENCODER.encode(value)


class Piece(NamedTuple):
    """One tensor or array as this rank has it."""

    leaf: Leaf
    name: str  # Name in the checkpoint: the leaf's, with the rank behind it for PerRank parts.
    key: str  # Name in the file: the second piece of a tensor needs another one.
    dtype: str  # safetensors' name.
    raw: str | None  # True type where `dtype` does not say it.
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]  # As the file states it: raw pieces have more or fewer elements of another size.
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    nbytes: int
    alignment: int
    alias_of: int  # Number of the piece whose bytes it shares, or -1.
    replica: int
    replicas: int  # 0: a plain tensor, which every rank of the job has.
    absent: bool  # This rank has no part of it; the piece stands for what all ranks must agree on.

    @property
    def is_value(self) -> bool:
        """A long list or tuple: a value of Python's, which may have another length in the next step or on another rank.

        Like the values that are no pieces, it is rank 0's.
        """
        return self.raw is not None and self.raw.startswith(("list:", "tuple:"))


def _raw_stored_shape(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    """As bytes, with the dimensions kept: a reader that knows nothing of raw pieces still sees consistent offsets."""
    return (*shape[:-1], shape[-1] * item) if shape else (item,)


def check_tensor(tensor: torch.Tensor, leaf: Leaf) -> None:
    where = f"{leaf.name}: "
    if _torch.is_wrapper(tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        raise NotPlain(f"{where}tensors of class {kind} have no plain bytes; save what is inside")
    if tensor.is_quantized:
        raise NotPlain(f"{where}quantised tensors are not supported; save int_repr(), scale and zero point")
    if tensor.layout != torch.strided:
        raise NotPlain(f"{where}a tensor of layout {tensor.layout}; save its indices and values")
    if tensor.is_meta:
        raise NotPlain(f"{where}a tensor on the meta device has no values")
    if tensor.dtype not in _torch.DTYPE_NAMES and tensor.dtype not in _torch.RAW_NAMES:
        raise NotPlain(f"{where}dtype {tensor.dtype} is not supported")


def _tensor_piece(tensor: torch.Tensor, leaf: Leaf, name: str, box: Box | None) -> Piece:
    check_tensor(tensor, leaf)
    shape = tuple(tensor.shape)
    dtype = _torch.DTYPE_NAMES.get(tensor.dtype)
    raw = None if dtype else _torch.RAW_NAMES[tensor.dtype]
    item = tensor.element_size()
    return Piece(
        leaf,
        name,
        name,
        dtype or "U8",
        raw,
        shape,
        shape if dtype else _raw_stored_shape(shape, item),
        box.offsets if box else (0,) * len(shape),
        box.global_shape if box else shape,
        tensor.numel() * item,
        item,
        -1,
        box.replica if box else 0,
        box.replicas if box else 0,
        False,
    )


def _array_piece(array: np.ndarray[Any, Any] | bytes | bytearray, leaf: Leaf, name: str) -> Piece:
    if not isinstance(array, np.ndarray):
        raw = type(array).__name__
        if raw not in ("bytes", "bytearray"):
            raise NotPlain(f"{leaf.name}: {type(array).__module__}.{raw} is not a plain value")
        shape: tuple[int, ...] = (len(array),)
        return Piece(leaf, name, name, "U8", raw, shape, shape, (0,), shape, len(array), 1, -1, 0, 0, False)
    if type(array) not in _ARRAYS or (dtype_name := array_dtype_name(array.dtype)) is None:
        raise NotPlain(
            f"{leaf.name}: an array of class {type(array).__qualname__} and dtype {array.dtype} has no plain form"
        )
    shape = array.shape
    # Little-endian numbers are readable by every safetensors reader; other elements are bytes.
    code = dtype_name.lstrip("<|=")
    natural = None if dtype_name.startswith(">") else _ARRAY_DTYPES.get(code)
    stored = shape if natural else _raw_stored_shape(shape, array.dtype.itemsize)
    zeros = (0,) * len(shape)
    alignment = array.dtype.itemsize if natural else 1
    return Piece(
        leaf,
        name,
        name,
        natural or "U8",
        f"{array.python if isinstance(array, LongList) else 'numpy'}:{dtype_name}",
        shape,
        stored,
        zeros,
        shape,
        array.nbytes,
        alignment,
        -1,
        0,
        0,
        False,
    )


_ARRAYS = frozenset({np.ndarray, LongList, LongTuple})
_ARRAY_DTYPES = {
    "f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8",
    "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL", "c8": "C64",
}  # fmt: skip


def name_for_rank(leaf: Leaf, rank: int) -> str:
    return f"{leaf.name}@{rank}" if leaf.per_rank else leaf.name


def _file_key(name: str, taken: set[str]) -> str:
    """A key for a further piece of a tensor: its name with a number behind it that makes it differ from all others."""
    number = 1
    while (key := f"{name}@{number}") in taken:
        number += 1
    if len(key.encode()) > NAME_BYTES_MAX:
        raise InvalidArgument(f"the name {name[:80]!r}... is too long for a tensor of several pieces")
    taken.add(key)
    return key


def _plain_pieces(names: Names, rank: int, tensors: Tensors) -> list[Piece | None]:
    """The pieces of tensors that need no second look: dense, of a common dtype, sharing their address with no other.

    The same that the general way makes of them, for thousands of them.
    """
    _, group, counts = np.unique(tensors.addresses, return_inverse=True, return_counts=True)
    plain = tensors.plain & ((counts[group] == 1) | (tensors.nbytes == 0))
    dtypes = {dtype: (name, dtype.itemsize) for dtype, name in _torch.DTYPE_NAMES.items()}
    make = tuple.__new__  # What Piece(...) comes to, without its frame.
    pieces: list[Piece | None] = []
    for leaf, dtype, shape, nbytes, known in zip(
        names.tensors, tensors.dtypes, tensors.shapes, tensors.nbytes.tolist(), plain.tolist(), strict=True
    ):
        about = dtypes.get(dtype)
        if not known or about is None:
            pieces.append(None)
            continue
        name = f"{leaf.name}@{rank}" if leaf.per_rank else leaf.name
        dtype_name, item = about
        zeros = (0,) * len(shape)
        fields = (leaf, name, name, dtype_name, None, shape, shape, zeros, shape, nbytes, item, -1, 0, 0, False)
        pieces.append(make(Piece, fields))
    return pieces


def make_pieces(flat: Flat, names: Names, rank: int, tensors: Tensors) -> list[Piece]:
    """Pieces in the order of `flat.tensors`, then `flat.arrays`, then what this rank has no part of.

    `tensors`: of `flat.tensors`. NotPlain names what has no plain bytes.
    """
    boxes: dict[int, Box] = {}
    further: list[int] = []  # Second and later pieces of their tensors.
    for boxed, leaf in zip(flat.boxed, names.boxed, strict=True):
        if isinstance(boxed.boxes, str):
            raise NotPlain(f"{leaf.name}: {boxed.boxes}")
        boxes.update(enumerate(boxed.boxes, boxed.first))
        further += boxed.numbers[1:]
    pieces: list[Piece] = []
    first: dict[tuple[Any, ...], int] = {}
    plain = _plain_pieces(names, rank, tensors)
    for index, (tensor, leaf, known) in enumerate(zip(flat.tensors, names.tensors, plain, strict=True)):
        if known is not None and index not in boxes:
            pieces.append(known)
            continue
        box = boxes.get(index)
        piece = _tensor_piece(tensor, leaf, name_for_rank(leaf, rank), box)
        if piece.nbytes and box is None:
            same = (tensor.data_ptr(), tensor.dtype, piece.shape, tensor.stride(), leaf.per_rank)
            base = first.setdefault(same, index)
            if (
                base != index
                and tensor.is_conj() == flat.tensors[base].is_conj()
                and tensor.is_neg() == flat.tensors[base].is_neg()
            ):
                piece = piece._replace(alias_of=base)
        pieces.append(piece)
    for array, leaf in zip(flat.arrays, names.arrays, strict=True):
        pieces.append(_array_piece(array, leaf, name_for_rank(leaf, rank)))
    for boxed, leaf in zip(flat.boxed, names.boxed, strict=True):
        if not boxed.numbers and isinstance(boxed.value, torch.Tensor):
            shape = tuple(boxed.value.shape)
            like = torch.empty((0,) * len(shape), dtype=boxed.value.dtype)
            nowhere = Box(tuple(like.shape), shape, shape)
            pieces.append(_tensor_piece(like, leaf, name_for_rank(leaf, rank), nowhere)._replace(absent=True))
    if further:
        taken = {piece.name for piece in pieces} | {leaf.name for leaf in names.values}
        for index in further:
            pieces[index] = pieces[index]._replace(key=_file_key(pieces[index].name, taken))
    return pieces


_NAME = operator.attrgetter("name")


def fingerprint(pieces: Sequence[Piece], names: Names) -> bytes:
    """16 bytes, equal on two ranks when both have the same names, dtypes, global shapes, ties and values' names
    (PerRank parts aside).
    """
    rows: list[Json] = []
    for p in sorted(pieces, key=_NAME):
        if not p.leaf.per_rank and not p.is_value and p.key == p.name:  # How many boxes a rank has may differ.
            alias = pieces[p.alias_of].name if p.alias_of >= 0 else None
            rows.append([p.name, p.dtype, p.raw, p.global_shape, alias, p.replicas > 0])
    leaves = [*names.values, *(p.leaf for p in pieces if p.is_value)]
    values: list[Json] = sorted([leaf.name for leaf in leaves if not leaf.per_rank])
    return hashlib.blake2b(compact([rows, values]).encode(), digest_size=16).digest()


def owners(pieces: Sequence[Piece], world_size: int) -> dict[str, int]:
    """Owner of each plain tensor when all ranks have the same: largest first, each to the rank with the least bytes so
    far.
    """
    plain = [p for p in pieces if p.replicas == 0 and p.alias_of < 0 and not p.leaf.per_rank and not p.is_value]
    loads = [(0, rank) for rank in range(world_size)]
    result: dict[str, int] = {}
    for piece in sorted(plain, key=lambda p: (-p.nbytes, p.name)):
        load, rank = loads[0]
        result[piece.name] = rank
        heapq.heapreplace(loads, (load + piece.nbytes, rank))
    return result


def owned_by(pieces: Sequence[Piece], rank: int, world_size: int, agreed: bool) -> list[bool]:
    if not agreed:
        return [not piece.absent for piece in pieces]
    spread = owners(pieces, world_size)
    result = []
    for piece in pieces:
        base = pieces[piece.alias_of] if piece.alias_of >= 0 else piece
        if piece.absent:
            result.append(False)
        elif piece.leaf.per_rank:
            result.append(True)
        elif piece.is_value:
            result.append(rank == 0)
        elif piece.replicas:
            # A hash of the name spreads the copies without a word between the ranks.
            # An empty tensor has no piece with bytes; somebody must still name it.
            result.append(
                (piece.nbytes > 0 or 0 in piece.global_shape)
                and zlib.crc32(piece.name.encode()) % piece.replicas == piece.replica
            )
        else:
            result.append(spread[base.name] == rank)
    return result
