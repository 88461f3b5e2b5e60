"""The issue's bad input: an index that lies about offsets, and a shard of another world size. A real daemon refuses
them and says why, and nothing of them is ever read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Daemon

import safepoint
from safepoint import _plan
from safepoint._boxes import Chunks

Made = Callable[..., safepoint.Checkpointer]


@pytest.fixture
def make(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon.socket)
    monkeypatch.setenv("SAFEPOINT_START", "0")
    made: list[safepoint.Checkpointer] = []

    def checkpointer(ns: str = "liar", rank: int = 0, world_size: int = 1) -> safepoint.Checkpointer:
        made.append(safepoint.Checkpointer(ns, rank=rank, world_size=world_size))
        return made[-1]

    yield checkpointer
    for each in made:
        each.close()


def honest(value: float) -> dict[str, Any]:
    whole = torch.full((4, 6), value)
    return {"w": Chunks((4, 6), [(whole[:2], (0, 0)), (whole[2:], (2, 0))]), "b": torch.full((8,), value)}


FIRST = b'{\\"w\\":{\\"saved_offsets\\":[0,0]}'
SECOND = b'\\"w@1\\":{\\"saved_offsets\\":[2,0]}'
SHAPE = b'"w":{"dtype":"F32","shape":[2,6]'
LIES = {
    # Seen in one shard alone.
    "outside": (FIRST, FIRST.replace(b"[0,0]", b"[3,0]")),
    "far outside": (FIRST, FIRST.replace(b"[0,0]", b"[18446744073709551615,0]")),
    "below zero": (FIRST, FIRST.replace(b"[0,0]", b"[-1,0]")),
    "dimensions": (FIRST, FIRST.replace(b"[0,0]", b"[0]")),
    "larger shape": (SHAPE, SHAPE.replace(b"[2,6]", b"[9,6]")),
    "huge shape": (SHAPE, SHAPE.replace(b"[2,6]", b"[4611686018427387904,6]")),
    "wider type": (SHAPE, SHAPE.replace(b"F32", b"F64")),
    "bytes of another": (b'"shape":[2,6],"data_offsets":[48,', b'"shape":[2,6],"data_offsets":[0,'),
    "bytes behind the end": (b'"b":{"dtype":"F32","shape":[8]', b'"b":{"dtype":"F32","shape":[80]'),
    "smaller whole": (b'\\"global\\":{\\"w\\":[4,6]', b'\\"global\\":{\\"w\\":[1,6]'),
    "name of nothing": (b'\\"name\\":{\\"w@1\\":', b'\\"name\\":{\\"w@7\\":'),
    # Seen when the pieces are put together.
    "overlap and gap": (SECOND, SECOND.replace(b"[2,0]", b"[1,0]")),
    "gap": (SECOND, SECOND.replace(b"[2,0]", b"[0,0]")),
    "pieces of two wholes": (b'\\"w@1\\":[4,6]', b'\\"w@1\\":[5,6]'),
    "pieces of two types": (b'"w@1":{"dtype":"F32"', b'"w@1":{"dtype":"I32"'),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused(make: Made, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """I-8: the attempt never becomes complete, its save says why, and what was there before stays what is restored."""
    c = make()
    c.save(1, honest(1.0)).wait("memory", timeout=20)
    true = _plan._static_part
    old, new = LIES[lie]

    def lying(*arguments: Any) -> bytes:
        text = true(*arguments)
        assert text.count(old) == 1, text
        text = text.replace(old, new).rstrip()
        return text.ljust(_plan.align_up(len(text)))

    monkeypatch.setattr(_plan, "_static_part", lying)
    c._engine._plan = None  # Another structure.
    with pytest.raises(safepoint.SafepointError) as raised:
        c.save(2, honest(2.0)).wait("memory", timeout=20)
    assert not isinstance(raised.value, safepoint.DeadlineExceeded), raised.value
    latest = c.latest()
    assert latest is not None and latest.step == 1
    target = honest(0.0)
    info = c.restore(target)
    assert info is not None and info.step == 1 and bool((target["b"] == 1).all())
    assert all(bool((tensor == 1).all()) for tensor, _ in target["w"].chunks)
    monkeypatch.setattr(_plan, "_static_part", true)
    c._engine._plan = None
    c.save(3, honest(3.0)).wait("memory", timeout=20)


def test_ranks_that_lie_to_each_other_never_complete(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards, each right by itself: both hold the first half."""
    monkeypatch.setenv("SAFEPOINT_LAUNCH_ID", os.urandom(8).hex())
    ranks = [make("liars", rank, 2) for rank in range(2)]
    half = torch.ones(2, 6)
    saves = [c.save(1, {"w": Chunks((4, 6), [(half, (0, 0))])}) for c in ranks]
    with pytest.raises(safepoint.SafepointError) as raised:
        for save in saves:
            save.wait("memory", timeout=20)
    assert "w" in str(raised.value) and not isinstance(raised.value, safepoint.DeadlineExceeded)
    assert ranks[0].latest() is None
    saves = [c.save(2, {"w": Chunks((4, 6), [(half, (2 * rank, 0))])}) for rank, c in enumerate(ranks)]
    for save in saves:
        save.wait("memory", timeout=20)


def test_a_shard_of_another_world_size_is_refused(daemon: Daemon, make: Made) -> None:
    """A rank that believes in another number of ranks than its generation has gets no room in it."""
    client = daemon.client()
    nonce = os.urandom(16)
    generation = client.open_generation("sizes", nonce, 2, 0, deadline=5.0)
    for rank, world_size in ((0, 3), (2, 3), (1, 1), (0, 1)):
        with pytest.raises(safepoint.SafepointError) as raised:
            client.open_generation("sizes", nonce, world_size, rank, deadline=5.0)
        assert not isinstance(raised.value, safepoint.DeadlineExceeded)
        with pytest.raises(safepoint.SafepointError) as raised:
            client.reserve("sizes", generation.generation, nonce, 1, 1, world_size, rank, 1 << 20, deadline=5.0)
        assert not isinstance(raised.value, safepoint.DeadlineExceeded)
    with pytest.raises(safepoint.SafepointError):
        client.reserve("sizes", generation.generation, nonce, 1, 1, 2, 2, 1 << 20, deadline=5.0)
    lease = client.reserve("sizes", generation.generation, nonce, 1, 1, 2, 1, 1 << 20, deadline=5.0)
    lease.abort("only asked")
    client.close()


@pytest.mark.parametrize("lie", [(b'\\"world_size\\":1', b'\\"world_size\\":2'), (b'\\"rank\\":0', b'\\"rank\\":1')])
def test_a_header_of_another_world_size_is_not_read(
    make: Made, monkeypatch: pytest.MonkeyPatch, lie: tuple[bytes, bytes]
) -> None:
    """The dynamic part is the client's own: the daemon never reads it, the reader compares it with what the daemon
    knows."""
    true = _plan.SavePlan.header
    monkeypatch.setattr(_plan.SavePlan, "header", lambda self, dynamic: true(self, dynamic.replace(*lie)))
    c = make()
    c.save(1, honest(1.0)).wait("memory", timeout=20)
    target = honest(0.0)
    with pytest.raises(safepoint.ProtocolError, match="rank 0"):
        c.restore(target)
    assert bool((target["b"] == 0).all())
