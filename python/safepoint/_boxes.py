"""Which boxes of global tensors this process holds: DTensors, ShardedTensors, objects that list their chunks, Chunks.

A DTensor's piece of a dimension is a list of runs of indices. Shard cuts it like torch.chunk: equal parts, the last
ones shorter or empty. _StridedShard(factor f) is what a mesh dimension has that was applied after a later one, which
had cut the dimension into f parts: the runs of a rank are no single range then. torch states the order in which mesh
dimensions were applied, or it follows from the factors; where it does not (views), it is from left to right.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from safepoint import _torch
from safepoint.errors import InvalidArgument


class Box(NamedTuple):
    """Place of a local piece in a global tensor."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    replica: int = 0  # Which of the `replicas` ranks with the same piece this one is.
    replicas: int = 1
    start: tuple[int, ...] | None = None  # Where it begins in the local tensor; None: it is all of it.


class Chunks:
    """A tensor of which this process holds some boxes: a leaf of the state like any tensor.

    `chunks`: (tensor, offsets in the global tensor); all of one dtype. Restoring writes into the tensors.
    """

    __slots__ = ("chunks", "shape")

    def __init__(self, shape: Sequence[int], chunks: Sequence[tuple[torch.Tensor, Sequence[int]]]) -> None:
        self.shape = tuple(shape)
        self.chunks = [(tensor, tuple(offsets)) for tensor, offsets in chunks]
        for tensor, offsets in self.chunks:
            if len(offsets) != len(self.shape) or tensor.dim() != len(self.shape):
                raise InvalidArgument(f"a chunk of {tensor.dim()} dimensions of a tensor of {len(self.shape)}")
            for begin, size, whole in zip(offsets, tensor.shape, self.shape, strict=True):
                if not 0 <= begin <= whole - size:
                    raise InvalidArgument(
                        f"the chunk of {list(tensor.shape)} at {list(offsets)} is not inside {list(self.shape)}"
                    )
        if len({tensor.dtype for tensor, _ in self.chunks}) > 1:
            raise InvalidArgument("the chunks of one tensor have several dtypes")

    def __repr__(self) -> str:
        return f"Chunks({list(self.shape)}, {len(self.chunks)} of them here)"


def is_boxed(value: object) -> bool:
    """Whether a value stands for boxes of a global tensor."""
    return type(value) is Chunks or _torch.has_chunk_list(value) or _torch.is_sharded_tensor(value)


Parts = tuple[list[torch.Tensor], "tuple[Box, ...] | str"]


def parts_of(value: Any) -> Parts:
    """The local tensors, which share the value's memory, and the box of each; a text says why there are no boxes.

    NotPlain: the value contradicts itself.
    """
    if _torch.is_dtensor(value) and not _torch.has_chunk_list(local := _torch.local_tensor(value)):
        boxes = _dtensor_boxes_of(value, local)
        if _is_whole(boxes):
            return [local], boxes
        assert not isinstance(boxes, str)
        return [narrowed(local, box) for box in boxes], boxes
    if type(value) is Chunks:
        whole, chunks = value.shape, value.chunks
    elif _torch.is_sharded_tensor(value):
        whole, chunks = _torch.sharded_tensor_chunks(value)
    else:
        whole, chunks = tuple(value.size()), _torch.listed_chunks(value)
    return [tensor for tensor, _ in chunks], tuple(Box(tuple(t.shape), at, whole) for t, at in chunks)


def narrowed(local: torch.Tensor, box: Box) -> torch.Tensor:
    """The part of the local tensor that has this box; shares its memory."""
    if box.start is None:
        return local
    for dimension, (begin, size) in enumerate(zip(box.start, box.shape, strict=True)):
        if size != local.shape[dimension]:
            local = local.narrow(dimension, begin, size)
    return local


def known_parts(value: Any) -> Parts | None:
    """`parts_of` a DTensor whose description was seen before and has one part, as nearly all have. It is asked for each
    of thousands in every save, so it looks at as little as decides it.
    """
    if type(value) not in _classes:
        return None
    spec, local = _torch.dtensor_parts(value)
    found = _specs.get(id(spec))
    if found is None:
        return None
    known, placements, shape, boxes, whole = found
    if not whole or known is not spec or placements is not spec.placements or shape != local.shape:
        return None
    return ([local], boxes) if type(local) is torch.Tensor else None


# Made once per layout, and mostly found by the identity of torch's description of it: a save has thousands of tensors.
_KEPT = 1 << 16
_layouts: dict[_torch.DTensorLayout, tuple[Box, ...] | str] = {}
# By the id of the description, which is held, so that its id stays: description, its placements, local shape, boxes,
# and whether the local tensor is their only part.
_specs: dict[int, tuple[Any, Any, torch.Size, tuple[Box, ...] | str, bool]] = {}
_classes: set[type] = set()  # Of the DTensors that were met: DTensor.


def _is_whole(boxes: tuple[Box, ...] | str) -> bool:
    """Whether the local tensor as it is stands for all of them; without boxes it does."""
    return isinstance(boxes, str) or (len(boxes) == 1 and boxes[0].start is None)


def _dtensor_boxes_of(value: Any, local: torch.Tensor) -> tuple[Box, ...] | str:
    spec, _ = _torch.dtensor_parts(value)
    found = _specs.get(id(spec))
    if found is not None and found[0] is spec and found[1] is spec.placements and found[2] == local.shape:
        return found[3]
    layout = _torch.dtensor_layout(value)
    boxes = _layouts.get(layout)
    for kept in (_layouts, _specs):
        if len(kept) >= _KEPT:
            kept.clear()
    if boxes is None:
        boxes = _layouts[layout] = _make_boxes(layout)
    _classes.add(type(value))
    _specs[id(spec)] = (spec, spec.placements, local.shape, boxes, _is_whole(boxes))
    return boxes


def _make_boxes(layout: _torch.DTensorLayout) -> tuple[Box, ...] | str:
    placements = _torch.placements_of(layout)
    if isinstance(placements, str):
        return placements
    place = _torch.mesh_place(layout)
    if place is None:
        return ()
    if all(placement.factor == 1 for placement in placements):
        order = _torch.stated_order(layout)
    else:
        order = order_of_factors(place[0], placements) if layout.factors_are_order else {}
    return dtensor_boxes(layout.shape, *place, placements, order, layout.local_shape)


def dtensor_boxes(
    shape: Sequence[int],
    mesh: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[_torch.Placement],
    order: dict[int, tuple[int, ...]],
    local_shape: Sequence[int],
) -> tuple[Box, ...] | str:
    """The boxes of the rank at `coordinate` of a mesh; a text: the local tensor is not what the layout says.

    `order`: tensor dimension -> mesh dimensions as they were applied to it; left to right where it is silent.
    """
    replica, replicas = 0, 1
    for size, at, placement in zip(mesh, coordinate, placements, strict=True):
        if placement.dim is None:
            replica, replicas = replica * size + at, replicas * size
    runs: list[list[tuple[int, int]]] = []
    for dimension, length in enumerate(shape):
        found = _runs(dimension, length, mesh, coordinate, placements, order, local_shape[dimension])
        if found is None:
            return (
                f"a DTensor of {list(shape)} placed as {[tuple(p) for p in placements]} on a mesh of {list(mesh)} has "
                f"{list(local_shape)} here, which does not follow from that"
            )
        runs.append(found)
    boxes = []
    starts = [list(itertools.accumulate((size for _, size in found), initial=0)) for found in runs]
    for chosen in itertools.product(*(range(len(found)) for found in runs)):
        boxes.append(
            Box(
                tuple(found[i][1] for found, i in zip(runs, chosen, strict=True)),
                tuple(found[i][0] for found, i in zip(runs, chosen, strict=True)),
                tuple(shape),
                replica,
                replicas,
                tuple(start[i] for start, i in zip(starts, chosen, strict=True)),
            )
        )
    return (boxes[0]._replace(start=None),) if len(boxes) == 1 else tuple(boxes)


Runs = list[tuple[int, int]]  # (first index, count), in the order of the local tensor.


def _runs(
    dimension: int,
    length: int,
    mesh: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[_torch.Placement],
    order: dict[int, tuple[int, ...]],
    local_length: int,
) -> Runs | None:
    """The indices of one dimension that are here. None: not as many as the local tensor has."""
    whole = [(0, length)]
    if dimension in order:
        runs = whole
        for number in order[dimension]:
            runs = _chunk(runs, mesh[number], coordinate[number])
        if _count(runs) == local_length:
            return _joined(runs, length)
    runs = whole
    for number, (split, factor) in enumerate(placements):
        if split == dimension:
            parts = [_chunk(runs, factor, part) for part in range(factor)]
            runs = [run for part in parts for run in _chunk(part, mesh[number], coordinate[number])]
    return _joined(runs, length) if _count(runs) == local_length else None


def order_of_factors(mesh: Sequence[int], placements: Sequence[_torch.Placement]) -> dict[int, tuple[int, ...]]:
    """The order in which mesh dimensions were applied, from the factors of _StridedShard; silent where no order has
    them.

    The factor of a mesh dimension is the number of parts that later mesh dimensions, applied before it, had made.
    """
    result = {}
    for dimension in {placement.dim for placement in placements if placement.dim is not None}:
        applied: list[int] | None = []
        for number in reversed(range(len(placements))):
            if applied is None or placements[number].dim != dimension:
                continue
            parts = list(itertools.accumulate((mesh[n] for n in applied), operator.mul, initial=1))
            factor = placements[number].factor
            if factor in parts:
                applied.insert(parts.index(factor), number)
            else:
                applied = None
        if applied is not None:
            result[dimension] = tuple(applied)
    return result


def _count(runs: Runs) -> int:
    return sum(size for _, size in runs)


def _chunk(runs: Runs, parts: int, part: int) -> Runs:
    """Like torch.chunk of the indices, with empty ones at the end where there are too few."""
    total = _count(runs)
    size = math.ceil(total / parts)
    begin, end = min(total, part * size), min(total, (part + 1) * size)
    result, at = [], 0
    for first, count in runs:
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            result.append((first + low - at, high - low))
        at += count
    return result


def _joined(runs: Runs, length: int) -> Runs:
    """Neighbours become one; what is empty is one empty run at the end."""
    result: Runs = []
    for first, count in runs:
        if result and sum(result[-1]) == first:
            result[-1] = (result[-1][0], result[-1][1] + count)
        else:
            result.append((first, count))
    return result or [(length, 0)]
