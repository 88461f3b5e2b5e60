"""Boxes in row-major tensors: cutting them into contiguous parts, and whether pieces fill a tensor. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

Shape = tuple[int, ...]


def slabs(shape: Shape, limit: int) -> Iterator[tuple[Shape, Shape]]:
    """Cuts a box into (offsets, sizes) of at most `limit` elements each (one at least), in row-major order.

    Each part is contiguous in the row-major bytes of the box.
    """
    split, inner = len(shape), 1
    while split and inner * shape[split - 1] <= limit:
        split -= 1
        inner *= shape[split]
    zeros = (0,) * len(shape)
    if split == 0:
        yield zeros, shape
        return
    cut = split - 1  # The dimension that is cut; those before it are walked one by one.
    rows = max(1, limit // inner)
    for lead in itertools.product(*(range(n) for n in shape[:cut])):
        for begin in range(0, shape[cut], rows):
            count = min(rows, shape[cut] - begin)
            yield (*lead, begin, *zeros[split:]), (*(1,) * cut, count, *shape[split:])


def linear(offsets: Sequence[int], shape: Shape) -> int:
    """Number of the element at `offsets` in row-major order."""
    position = 0
    for offset, size in zip(offsets, shape, strict=True):
        position = position * size + offset
    return position


def is_run(sizes: Shape, shape: Shape) -> bool:
    """Whether a box of these sizes is one run of elements of the row-major tensor."""
    for dimension, size in enumerate(sizes):
        if size != 1:
            return sizes[dimension + 1 :] == shape[dimension + 1 :]
    return True


def fill_problem(boxes: Sequence[tuple[Shape, Shape]], shape: Shape) -> str | None:
    """Why these different (offsets, sizes) do not fill the tensor exactly once; None: they do."""
    volume = 0
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"a piece of {len(sizes)} dimensions in a tensor of {len(shape)}"
        if any(o < 0 or s < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            return f"a piece of {list(sizes)} at {list(offsets)} is not inside {list(shape)}"
        volume += math.prod(sizes)
    if volume != math.prod(shape):
        return f"its pieces have {volume} of {math.prod(shape)} elements"
    if not shape:
        return None
    # Inside, and together as many elements as the tensor: they fill it, unless two overlap.
    along = max(range(len(shape)), key=lambda d: len({offsets[d] for offsets, _ in boxes}))
    active: list[tuple[Shape, Shape]] = []
    for offsets, sizes in sorted((box for box in boxes if math.prod(box[1])), key=lambda box: box[0][along]):
        active = [(o, s) for o, s in active if o[along] + s[along] > offsets[along]]
        for other_offsets, other_sizes in active:
            if all(
                max(a, b) < min(a + n, b + m)
                for a, n, b, m in zip(offsets, sizes, other_offsets, other_sizes, strict=True)
            ):
                return f"pieces at {list(other_offsets)} and {list(offsets)} overlap"
        active.append((offsets, sizes))
    return None
