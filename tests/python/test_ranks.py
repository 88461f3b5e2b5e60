"""Several ranks: ownership, agreement, PerRank, other world sizes. Each rank is a thread here; tests/process has real
ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from fake_core import FakeDaemon
from states import random_tensor

import safepoint
from safepoint import _engine, _launch, errors
from safepoint._pieces import owners
from safepoint._plan import prepare
from safepoint._shard import parse_shard
from safepoint._state import flatten


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Gives the ranks a store in this process; calling it begins another launch."""

    def begin() -> None:
        store = torch.distributed.HashStore()
        monkeypatch.setattr(_launch, "_nonces", {})
        monkeypatch.setattr(_engine, "_histories", {})
        monkeypatch.setattr(_launch, "store_for", lambda rank, world_size: store if world_size > 1 else None)

    begin()
    return begin


def on_ranks(world_size: int, work: Callable[[int, safepoint.Checkpointer], Any], name: str = "job") -> list[Any]:
    """What `work` returned on each rank; raises the first error."""
    results: list[Any] = [None] * world_size
    problems: list[BaseException] = []
    made = [safepoint.Checkpointer(name, rank=rank, world_size=world_size) for rank in range(world_size)]

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, made[rank])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return results


def replicated(seed: int) -> dict[str, Any]:
    state: dict[str, Any] = {f"t{i}": random_tensor((i + 1, 100), torch.float32, seed) for i in range(20)}
    return {**state, "tied": state["t3"], "value": seed, "array": b"x" * 5000}


def test_equal_structures_are_spread_and_whole(fake: FakeDaemon, launch: Callable[[], None]) -> None:
    saved = replicated(1)
    attempts = on_ranks(3, lambda rank, c: (lambda s: (s.wait(timeout=20), s.attempt))(c.save(1, replicated(1)))[1])
    assert len(set(attempts)) == 1
    shards = {rank: data for (_, rank), data in fake.space("job").shards.items()}
    headers = {rank: data[: 8 + int.from_bytes(data[:8], "little")] for rank, data in shards.items()}
    parsed = {rank: parse_shard(h, rank, h.index(b',"format":"pt"')) for rank, h in headers.items()}
    names = [set(p.pieces) for p in parsed.values()]
    assert set.union(*names) == {*saved} - {"value"} and sum(map(len, names)) == len(saved) - 1
    sizes = [sum(p.nbytes for pieces in shard.pieces.values() for p in pieces) for shard in parsed.values()]
    assert max(sizes) < 1.3 * min(sizes)
    assert [set(p.values) for _, p in sorted(parsed.items())] == [{"value"}, set(), set()]
    # Any number of ranks gets everything back.
    for world_size in (1, 2, 3, 5):
        launch()

        def load(rank: int, c: safepoint.Checkpointer) -> None:
            target = replicated(2)
            assert c.restore(target).step == 1  # type: ignore[union-attr]
            assert target["value"] == 1 and all(
                torch.equal(target[n].view(torch.uint8), saved[n].view(torch.uint8)) for n in saved if n[0] == "t"
            )

        on_ranks(world_size, load)


def test_ownership_is_the_same_on_every_rank_and_balanced() -> None:
    flat = flatten({str(i): torch.zeros(1 + i * 37 % 91, 16) for i in range(200)})
    plans = [owners(prepare(flat, rank)[1], 4) for rank in range(4)]
    assert all(plan == plans[0] for plan in plans) and set(plans[0].values()) == {0, 1, 2, 3}


def test_unequal_structures_keep_everything(fake: FakeDaemon, launch: Callable[[], None]) -> None:
    """Pipeline stages: nothing may be left out because of another rank's names."""

    def work(rank: int, c: safepoint.Checkpointer) -> None:
        c.save(1, {f"stage{rank}": torch.full((4,), rank), "both": torch.full((4,), rank), "rank": rank}).wait(
            timeout=20
        )
        target = {f"stage{rank}": torch.zeros(4).long(), "both": torch.zeros(4).long(), "rank": -1}
        c.restore(target)
        assert target["rank"] == rank and target["both"][0] == rank and target[f"stage{rank}"][0] == rank
        everything = {"stage0": torch.zeros(4).long(), "stage1": torch.ones(4).long()}
        c.restore(everything)
        assert everything["stage0"][0] == 0 and everything["stage1"][0] == 1

    on_ranks(2, work)


def test_changed_structure_drops_nothing(fake: FakeDaemon, launch: Callable[[], None]) -> None:
    def work(rank: int, c: safepoint.Checkpointer) -> None:
        c.save(1, replicated(1)).wait(timeout=20)
        state = replicated(1)
        if rank == 1:
            state["new"] = torch.ones(3)
        c.save(2, state).wait(timeout=20)
        target: dict[str, Any] = {**replicated(2), "new": torch.zeros(3)}
        c.restore(target)
        assert target["new"].sum() == 3 and torch.equal(
            target["t7"].view(torch.uint8), replicated(1)["t7"].view(torch.uint8)
        )

    on_ranks(2, work)


def test_no_store_operation_after_the_first_save(
    fake: FakeDaemon, launch: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int, c: safepoint.Checkpointer) -> Any:
        c.save(1, replicated(1)).wait(timeout=20)
        barrier.wait(20)
        monkeypatch.setattr(_launch, "store_for", None)
        barrier.wait(20)
        for step in range(2, 5):
            c.save(step, {**replicated(1), "more": torch.zeros(step)}).wait(timeout=20)

    barrier = threading.Barrier(2)
    on_ranks(2, work)


def test_per_rank_parts(fake: FakeDaemon, launch: Callable[[], None]) -> None:
    def state(rank: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(rank).get_state()
        return {
            "w": torch.ones(3),
            "rng": safepoint.PerRank(rng),
            "loader": safepoint.PerRank({"at": rank, "buffer": b"%d" % rank * 5000}),
        }

    on_ranks(2, lambda rank, c: c.save(1, state(rank)).wait(timeout=20))
    launch()

    def load(rank: int, c: safepoint.Checkpointer) -> None:
        target = state(rank + 10)
        c.restore(target)
        expected = state(rank if rank < 2 else rank + 10)  # Rank 2 did not exist: it keeps what it has.
        assert torch.equal(target["rng"].value, expected["rng"].value)
        assert target["loader"].value == expected["loader"].value

    on_ranks(3, load)
    with pytest.raises(errors.Mismatch, match="new@0"):
        on_ranks(2, lambda rank, c: c.restore({"new": safepoint.PerRank(1)}) if rank == 0 else None)


def test_ranks_agree_on_one_attempt(fake: FakeDaemon, launch: Callable[[], None]) -> None:
    """I-7: a step that completes between two ranks' restores changes nothing."""

    def work(rank: int, c: safepoint.Checkpointer) -> Any:
        c.save(1, {"x": 1}).wait(timeout=20)
        c.save(2, {"x": 2}).wait(timeout=20)

    on_ranks(2, work)
    launch()
    first, second = (safepoint.Checkpointer("job", rank=rank, world_size=2) for rank in range(2))
    a = first.restore({"x": 0})
    fake.space("job").attempts[a.attempt].state = "retired" if a else ""
    b = second.restore({"x": 0})
    assert a is not None and b is not None and a.attempt == b.attempt


def test_without_identity_saving_is_refused(
    fake: FakeDaemon, launch: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "store_for", lambda rank, world_size: None)
    for name in ("SAFEPOINT_LAUNCH_ID", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    c = safepoint.Checkpointer("job", rank=0, world_size=2)
    with pytest.raises(errors.Unavailable, match="SAFEPOINT_LAUNCH_ID"):
        c.save(1, {"x": 1})
    assert c.restore({"x": 1}) is None


def test_older_launch_is_fenced(fake: FakeDaemon) -> None:
    old = safepoint.Checkpointer("job", rank=0, world_size=1)
    old.save(1, {"x": 1}).wait(timeout=20)
    new = safepoint.Checkpointer("job", rank=0, world_size=1)
    _launch._nonces.clear()
    new.save(1, {"x": 1}).wait(timeout=20)
    with pytest.raises(errors.Fenced):
        old.save(2, {"x": 1})
