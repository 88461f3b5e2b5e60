"""Which boxes of a global tensor a rank has (safepoint/_boxes.py), against torch's own splitting."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from fake_core import FakeDaemon
from states import same
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import safepoint
from safepoint import _boxes, _state, _torch, errors
from safepoint._boxes import Box, Chunks, dtensor_boxes, known_parts, narrowed, order_of_factors, parts_of
from safepoint._pieces import fingerprint, owned_by
from safepoint._plan import prepare
from safepoint._shard import parse_shard
from safepoint._state import flatten
from safepoint._torch import Placement


def coordinates(mesh: tuple[int, ...]) -> Any:
    return itertools.product(*map(range, mesh))


def check(
    whole: torch.Tensor,
    local: torch.Tensor,
    mesh: tuple[int, ...],
    at: tuple[int, ...],
    placements: list[Placement],
    order: dict[int, tuple[int, ...]],
) -> tuple[Box, ...]:
    boxes = dtensor_boxes(whole.shape, mesh, at, placements, order, local.shape)
    assert not isinstance(boxes, str), boxes
    assert sum(torch.Size(box.shape).numel() for box in boxes) == local.numel()
    for box in boxes:
        there = whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))]
        assert torch.equal(narrowed(local, box), there), (mesh, at, placements, box)
    return boxes


@pytest.mark.parametrize("mesh", [(1,), (2,), (3,), (4,), (2, 2), (2, 3), (3, 2), (2, 2, 2)])
def test_left_to_right_is_what_torch_splits(mesh: tuple[int, ...]) -> None:
    """Every placement of every mesh dimension, _StridedShard included; uneven and too short ones, too."""
    kinds: list[Any] = [None, Shard(0), Shard(1), _StridedShard(0, split_factor=2), _StridedShard(0, split_factor=3)]
    for length, layout in itertools.product((1, 2, 5, 12), itertools.product(kinds, repeat=len(mesh))):
        whole = torch.arange(length * 4).view(length, 4)
        placements = [
            Placement(None, 1) if p is None else Placement(p.dim, p.split_factor if hasattr(p, "split_factor") else 1)
            for p in layout
        ]
        for at in coordinates(mesh):
            local = whole
            for size, place, placement in zip(mesh, at, layout, strict=True):
                if placement is not None:
                    local = placement._split_tensor(local, size, with_padding=False)[0][place]
            check(whole, local, mesh, at, placements, {})


@pytest.mark.parametrize("mesh", [(2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (2, 2, 2), (3, 2, 2)])
def test_factors_tell_the_order(mesh: tuple[int, ...]) -> None:
    """FSDP2 over tensor parallel on one dimension, and every other order: chunked in it, with any number of rows."""
    for applied in itertools.permutations(range(len(mesh))):
        placements = []
        for number in range(len(mesh)):
            before = applied[: applied.index(number)]
            placements.append(Placement(0, torch.Size([mesh[n] for n in before if n > number]).numel()))
        assert order_of_factors(mesh, placements) == {0: applied}
        for length in (1, 3, 9, 13, 24):
            whole = torch.arange(length * 2).view(length, 2)
            count = 0
            for at in coordinates(mesh):
                local = whole
                for number in applied:
                    chunks = list(torch.chunk(local, mesh[number]))
                    local = chunks[at[number]] if at[number] < len(chunks) else local[:0]
                boxes = check(whole, local, mesh, at, placements, {0: applied})
                assert len(boxes) == 1
                count += local.numel()
            assert count == whole.numel()


def test_a_view_s_factor_gives_several_boxes() -> None:
    (first, second) = check(
        torch.arange(8),
        torch.tensor([2, 3, 6, 7]),
        (2,),
        (1,),
        [Placement(0, 2)],
        order_of_factors((2,), [Placement(0, 2)]),
    )
    assert first == Box((2,), (2,), (8,), 0, 1, (0,)) and second == Box((2,), (6,), (8,), 0, 1, (2,))


def test_replicas_and_contradictions() -> None:
    boxes = dtensor_boxes((4,), (2, 3), (1, 2), [Placement(0, 1), Placement(None, 1)], {}, (2,))
    assert boxes == (Box((2,), (2,), (4,), 2, 3),)
    assert "does not follow" in str(dtensor_boxes((4,), (2,), (1,), [Placement(0, 1)], {}, (3,)))


@pytest.fixture
def group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def header_of(fake: FakeDaemon, attempt: bytes) -> bytes:
    data = fake.space("job").shards[(attempt, 0)]
    return data[: 8 + int.from_bytes(data[:8], "little")]


def test_chunks_are_saved_and_restored(fake: FakeDaemon) -> None:
    whole = torch.arange(24.0).view(4, 6)

    def state(value: torch.Tensor) -> dict[str, Any]:
        parts = [(value[:2, 1:3], (0, 1)), (value[3:, :], (3, 0)), (value[:2, :1], (0, 0)), (value[:0], (4, 0))]
        return {"w": Chunks((4, 6), parts), "w@1": torch.ones(2), "n": Chunks((3,), [])}

    c = safepoint.Checkpointer("job", rank=0, world_size=1)
    save = c.save(1, state(whole))
    save.wait(timeout=20)
    pieces = parse_shard(header_of(fake, save.attempt), 0).pieces
    assert set(pieces) == {"w", "w@1"} and len(pieces["w"]) == 4 and len(pieces["w@1"]) == 1
    assert {(p.offsets, p.shape) for p in pieces["w"]} == {
        ((0, 1), (2, 2)),
        ((3, 0), (1, 6)),
        ((0, 0), (2, 1)),
        ((4, 0), (0, 6)),
    }
    assert all(p.global_shape == (4, 6) for p in pieces["w"])
    target = torch.zeros(4, 6)
    c.restore(state(target))
    expected = torch.zeros(4, 6)
    expected[:2, :3], expected[3:] = whole[:2, :3], whole[3:]
    assert torch.equal(target, expected)
    # Another cut: one box over two stored ones.
    other = torch.zeros(2, 3)
    c.restore({"w": Chunks((4, 6), [(other, (0, 0))])})
    assert torch.equal(other, whole[:2, :3])
    with pytest.raises(errors.Mismatch) as raised:
        c.restore({"none": Chunks((2,), [(torch.zeros(1), (0,)), (torch.zeros(1), (1,))])})
    assert raised.value.missing == ("none",)
    with pytest.raises(errors.Mismatch, match="fill 0 of 6"):
        c.restore({"w": Chunks((4, 6), [(torch.zeros(1, 6), (2, 0))])})


@pytest.mark.parametrize("chunks", [[(torch.zeros(2), (3,))], [(torch.zeros(2), (-1,))], [(torch.zeros(2, 1), (0, 0))]])
def test_chunks_outside_are_refused(chunks: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        Chunks((4,), chunks)


def test_changed_number_of_boxes_is_a_changed_structure(fake: FakeDaemon) -> None:
    c = safepoint.Checkpointer("job", rank=0, world_size=1)
    for step, cuts in enumerate(([0, 4], [0, 1, 4], [0, 2, 4], [0, 4])):
        whole = torch.full((4,), float(step))
        ends = itertools.pairwise(cuts)
        c.save(step, {"w": Chunks((4,), [(whole[a:b], (a,)) for a, b in ends]), "t": torch.ones(1)}).wait(timeout=20)
        target = {"w": torch.zeros(4), "t": torch.zeros(1)}
        c.restore(target)
        same(target, {"w": whole, "t": torch.ones(1)})


class Listing:
    """What torch.distributed.checkpoint calls checkpointable, without being a tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def size(self) -> torch.Size:
        return torch.Size([6])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([at]), torch.Size([2])) for at in (0, 4)]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        return self.value[index.offset[0] : index.offset[0] + 2]


def test_objects_that_list_their_chunks(fake: FakeDaemon) -> None:
    c = safepoint.Checkpointer("job", rank=0, world_size=1)
    c.save(1, {"l": Listing(torch.arange(6))}).wait(timeout=20)
    value = torch.zeros(6, dtype=torch.int64)
    c.restore({"l": Listing(value)})
    assert value.tolist() == [0, 1, 0, 0, 4, 5]


def test_sharded_tensor(group: None, fake: FakeDaemon) -> None:
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard
    from torch.distributed._shard.sharded_tensor import init_from_local_shards

    def make(value: float) -> Any:
        parts = [
            LocalShard.from_tensor_and_offsets(torch.full((2, 3), float(value + i)), [2 * i, 0], rank=0)
            for i in range(2)
        ]
        return init_from_local_shards(parts, 4, 3)

    c = safepoint.Checkpointer("job", rank=0, world_size=1)
    c.save(1, {"s": make(5)}).wait(timeout=20)
    other = make(0)
    c.restore({"s": other})
    assert [s.tensor[0, 0].item() for s in other.local_shards()] == [5, 6]
    whole = torch.zeros(4, 3)
    c.restore({"s": whole})
    assert whole[:, 0].tolist() == [5, 5, 6, 6]


def test_partial_is_named(group: None, fake: FakeDaemon) -> None:
    mesh = init_device_mesh("cpu", (1,))
    partial = DTensor.from_local(torch.zeros(3), mesh, [Partial()])
    assert "Partial" in str(parts_of(partial)[1])
    with pytest.raises(errors.NotPlain, match=r"a\.b: .*Partial"):
        safepoint.Checkpointer("job", rank=0, world_size=1).save(1, {"a": {"b": partial}})


def test_a_known_layout_is_found_and_another_is_not(group: None) -> None:
    """The short way of warm saves says what the long one says, or nothing."""
    mesh = init_device_mesh("cpu", (1,))
    value = DTensor.from_local(torch.ones(4, 2), mesh, [Shard(0)])
    assert known_parts(value) is None  # Nobody has seen it yet.
    (local,), boxes = parts_of(value)
    (again,), same_boxes = known_parts(value)  # type: ignore[misc]
    assert again is local is value._local_tensor and same_boxes is boxes
    value._local_tensor = torch.ones(3, 2)
    assert known_parts(value) is None
    value._local_tensor = local
    value._spec.placements = (Replicate(),)
    assert known_parts(value) is None
    partial = DTensor.from_local(torch.zeros(3), mesh, [Partial()])
    assert parts_of(partial)[1] == known_parts(partial)[1]  # type: ignore[index]
    for other in (torch.ones(2), Chunks((2,), []), object()):
        assert known_parts(other) is None
    assert _state.KINDS.get(DTensor, _state.BOXED) == _state.kind_of(value) == _state.BOXED


def test_rank_outside_the_mesh(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the others name, dtype and shape, so all agree on who saves what; it saves nothing of it."""
    mesh = init_device_mesh("cpu", (1,))
    inside = {"w": DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)]), "t": torch.ones(2)}
    flat = flatten(inside)
    names, pieces, _ = prepare(flat, 0)
    seen = fingerprint(pieces, names)
    outside = {"w": DTensor.from_local(torch.zeros(3, 2), mesh, [Shard(0)]), "t": torch.ones(2)}
    monkeypatch.setattr(_torch, "mesh_place", lambda layout: None)
    monkeypatch.setattr(_boxes, "_layouts", {})
    monkeypatch.setattr(_boxes, "_specs", {})
    flat = flatten(outside)
    assert [token[2] for token in flat.tokens] == [("D0", "t")] and len(flat.tensors) == 1
    names, pieces, _ = prepare(flat, 1)
    assert fingerprint(pieces, names) == seen
    assert [(p.name, p.absent) for p in pieces] == [("t", False), ("w", True)]
    assert owned_by(pieces, 1, 2, agreed=False) == [True, False]
