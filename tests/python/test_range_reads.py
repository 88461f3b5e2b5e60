"""A restore copies the bytes it needs and no others (safepoint/_reads.py)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from fake_core import BLOCK, FakeDaemon, ShardReader
from states import DTYPES, bits, random_tensor, same

import safepoint
from safepoint import _reads, errors
from safepoint._boxes import Chunks
from safepoint._shard import StoredPiece

Cut = list[tuple[tuple[int, ...], tuple[int, ...]]]  # (offsets, shape) of the boxes


class Touched:
    """What readers were asked for, header reads aside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[int, int, int]] = []  # (rank, offset, bytes)
        original = ShardReader.read

        def read(reader: ShardReader, segments: Any, **keywords: Any) -> int:
            table = np.frombuffer(segments, dtype=np.uint64).reshape(-1, 3).tolist()
            self.rows += [(reader.rank, offset, size) for offset, size, _ in table]
            return original(reader, segments, **keywords)

        monkeypatch.setattr(ShardReader, "read", read)

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.rows)

    @property
    def blocks(self) -> int:
        return len({(rank, b) for rank, at, n in self.rows for b in range(at // BLOCK, (at + n - 1) // BLOCK + 1)})


@pytest.fixture
def touched(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> Touched:
    return Touched(monkeypatch)


def cut(shape: tuple[int, ...], parts: tuple[int, ...]) -> Cut:
    """A grid of boxes, uneven where it has to be."""
    edges = []
    for size, count in zip(shape, parts, strict=True):
        step = -(-size // count)
        edges.append([(a, min(step, size - a)) for a in range(0, size, step)])
    return [(tuple(a for a, _ in box), tuple(n for _, n in box)) for box in itertools.product(*edges)]


def boxes(whole: torch.Tensor, parts: Cut) -> Chunks:
    pieces = [(whole[tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))], at) for at, size in parts]
    return Chunks(whole.shape, pieces)


def saved(state: Any) -> safepoint.Checkpointer:
    c = safepoint.Checkpointer("job", rank=0, world_size=1)
    c.save(1, state).wait(timeout=20)
    return c


SHAPE = (6, 7, 400)
CUTS = [cut(SHAPE, parts) for parts in ((1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 2), (4, 2, 3))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_cut_from_any_cut(touched: Touched, dtype: torch.dtype) -> None:
    """Bit-equal, and not one byte more than the target has where rows are long enough."""
    whole = random_tensor(SHAPE, dtype)
    every = dtype in (torch.float32, torch.bfloat16, torch.complex128)  # Of the others, some pairs are enough.
    for stored in CUTS if every else CUTS[-2:]:
        c = saved({"w": boxes(whole, stored)})
        for wanted in CUTS if every else CUTS[2:]:
            target = torch.zeros(whole.nbytes, dtype=torch.uint8).view(dtype).view(SHAPE)
            touched.rows.clear()
            info = c.restore({"w": boxes(target, wanted)})
            assert bits(target) == bits(whole), (dtype, stored, wanted)
            assert info is not None and info.bytes == touched.bytes
            edges = sorted({at[2] + n for at, size in (*stored, *wanted) for n in (0, size[2])})
            if dtype.itemsize * min(b - a for a, b in itertools.pairwise(edges)) >= _reads._ROW_BYTES:
                assert touched.bytes == whole.nbytes


@pytest.mark.parametrize(
    "make",
    [
        lambda t: torch.zeros(*t.shape).transpose(0, 2).contiguous().transpose(0, 2),
        lambda t: torch.zeros(6, 7, 800)[:, :, ::2],
        lambda t: torch.zeros(*t.shape).to(memory_format=torch.contiguous_format),
        lambda t: torch._neg_view(torch.zeros(*t.shape)),
        lambda t: torch.zeros(*t.shape, requires_grad=True),
    ],
)
def test_into_any_memory(touched: Touched, make: Any) -> None:
    whole = random_tensor(SHAPE, torch.float32)
    for stored in CUTS:
        target = make(whole)
        saved({"w": boxes(whole, stored)}).restore({"w": target})
        assert bits(target) == bits(whole)


def test_a_part_reads_its_part(touched: Touched) -> None:
    """A quarter of the columns of a large matrix: its bytes only, straight from the rows, no piece as a whole."""
    whole = random_tensor((512, 4096), torch.float32)
    c = saved({"w": boxes(whole, cut(whole.shape, (2, 1)))})
    target = torch.zeros(512, 1024)
    touched.rows.clear()
    info = c.restore({"w": Chunks(whole.shape, [(target, (0, 2048))])})
    assert bits(target) == bits(whole[:, 2048:3072])
    assert info is not None and info.bytes == touched.bytes == target.nbytes and len(touched.rows) == 512
    rows = torch.zeros(3, 4096)
    touched.rows.clear()
    c.restore({"w": Chunks(whole.shape, [(rows, (255, 0))])})
    assert bits(rows) == bits(whole[255:258]) and len(touched.rows) == 2 and touched.bytes == rows.nbytes


def test_tiny_rows_are_read_as_one_range(touched: Touched) -> None:
    """One column of many rows: the range from the first to the last, not a table of a row per element."""
    whole = random_tensor((1000, 16), torch.float32)
    c = saved({"w": boxes(whole, [((0, 0), (1000, 16))])})
    target = torch.zeros(1000, 1)
    touched.rows.clear()
    c.restore({"w": Chunks(whole.shape, [(target, (0, 3))])})
    assert bits(target) == bits(whole[:, 3:4])
    assert len(touched.rows) == 1 and touched.bytes == 4 * (999 * 16 + 1)
    # But far apart they are read one by one.
    whole = random_tensor((100, 5000), torch.float32)
    c = saved({"w": boxes(whole, [((0, 0), (100, 5000))])})
    target = torch.zeros(100, 2)
    touched.rows.clear()
    c.restore({"w": Chunks(whole.shape, [(target, (0, 3))])})
    assert bits(target) == bits(whole[:, 3:5])
    assert len(touched.rows) == 100 and touched.bytes == target.nbytes


def test_weights_only(touched: Touched) -> None:
    """Out of weights and optimizer, the weights' bytes and the blocks that have them."""
    weights = {f"w{i}": random_tensor((1 << 20,), torch.float32, i) for i in range(2)}
    optimizer = {f"m{i}": random_tensor((1 << 21,), torch.float32, i) for i in range(2)}
    c = saved({"model": weights, "optimizer": optimizer})
    target = {name: torch.zeros_like(w) for name, w in weights.items()}
    touched.rows.clear()
    info = c.restore({"model": target}, verify_first=True)
    assert all(bits(target[name]) == bits(weights[name]) for name in weights)
    assert info is not None and info.bytes == touched.bytes == 8 << 20 and touched.blocks <= 9


def test_verify_first_looks_at_the_ranges_blocks_only(fake: FakeDaemon) -> None:
    whole = random_tensor((8, 1 << 18), torch.float32)  # A row is one block.
    c = saved({"w": boxes(whole, [((0, 0), whole.shape)])})
    state = {"w": Chunks(whole.shape, [(torch.zeros(2, 1 << 18), (3, 0))])}
    fake.corrupt = {(0, 1), (0, 2), (0, 7)}
    c.restore(state, verify_first=True)
    fake.corrupt = {(0, 4)}
    with pytest.raises(errors.Corrupt) as raised:
        c.restore(state, verify_first=True)
    assert not raised.value.state_modified
    with pytest.raises(errors.Corrupt) as raised:
        c.restore(state)
    assert raised.value.state_modified and raised.value.rank == 0


def test_tied_targets_are_read_once(touched: Touched) -> None:
    whole = random_tensor((64, 64), torch.float32)
    c = saved({"a": boxes(whole, cut(whole.shape, (2, 1))), "b": boxes(whole, cut(whole.shape, (2, 1)))})
    target = torch.zeros(64, 64)
    touched.rows.clear()
    c.restore({"a": target})
    assert touched.bytes == target.nbytes
    alone = len(touched.rows)
    touched.rows.clear()
    c.restore({"a": Chunks((64, 64), [(target, (0, 0)), (target, (0, 0))])})
    assert len(touched.rows) == alone


def piece(offsets: tuple[int, ...] | None, shape: tuple[int, ...], **changes: Any) -> StoredPiece:
    plain = StoredPiece(0, "F32", None, shape, offsets, (4, 4), 4096, 4 * int(np.prod(shape)), None)
    return plain._replace(**changes)


@pytest.mark.parametrize(
    "lie",
    [
        piece((3, 0), (2, 4)),
        piece((2, -1), (2, 4)),
        piece((2,), (2, 4)),
        piece((2, 0), (2, 4, 1)),
        piece((2, 0), (2, 4), dtype="I32"),
        piece((2, 0), (2, 4), raw="complex32"),
        piece((2, 0), (2, 4), global_shape=(4, 5)),
        piece((2, 0), (2, 4), nbytes=64),
        piece((2, 0), (2, 4), nbytes=16),
    ],
)
def test_a_header_that_lies_is_refused(lie: StoredPiece) -> None:
    """I-8: what a header says never becomes an address outside the caller's memory."""
    reads = _reads.Reads(None, None)  # type: ignore[arg-type]
    with pytest.raises(errors.ProtocolError):
        reads.into(torch.zeros(4, 4), "w", [piece((0, 0), (2, 4)), lie], None, in_place=True)
    assert reads.bytes <= 32


def test_gaps_and_overlaps_are_told() -> None:
    # As many elements as the tensor has, in one dimension and in two.
    for lying in ([((0, 0), (2, 4)), ((1, 0), (2, 4))], [((0, 0), (2, 4)), ((2, 0), (2, 2)), ((1, 2), (2, 2))]):
        reads = _reads.Reads(None, None)  # type: ignore[arg-type]
        problem = reads.into(torch.zeros(4, 4), "w", [piece(*box) for box in lying], None, in_place=True)
        assert problem is not None and "fill 16 of 16" in problem and reads.bytes == 0
    for second in (piece((1, 0), (2, 4)), piece((1, 0), (3, 4)), piece((3, 0), (1, 4))):
        reads = _reads.Reads(None, None)  # type: ignore[arg-type]
        problem = reads.into(torch.zeros(4, 4), "w", [piece((0, 0), (2, 4)), second], None, in_place=True)
        assert problem is not None and "fill" in problem and reads.bytes == 0


def test_fresh_optimizer_is_read_once(touched: Touched) -> None:
    """It has no state of its own yet; the empty mapping in its place asked for all of it a second time."""

    def make(steps: int) -> torch.optim.AdamW:
        torch.manual_seed(1)
        parameters = [torch.nn.Parameter(torch.randn(300, 7)) for _ in range(3)]
        optimizer = torch.optim.AdamW(parameters)
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = torch.randn(300, 7)
            optimizer.step()
        return optimizer

    trained, fresh = make(2), make(0)
    c = saved({"o": trained})
    touched.rows.clear()
    info = c.restore({"o": fresh})
    same(trained.state_dict(), fresh.state_dict())
    assert info is not None and info.bytes == touched.bytes == 3 * (2 * 300 * 7 * 4 + 4)


def test_gap_in_a_tensor_without_a_target(fake: FakeDaemon) -> None:
    """The stand-in for the daemon checks no coverage, so this reaches the reader."""
    c = saved({"o": {"w": Chunks((4,), [(torch.ones(2), (0,))])}})
    with pytest.raises(errors.ProtocolError, match="fill 2 of 4"):
        c.restore({"o": {}})
