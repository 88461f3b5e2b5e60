"""One rank of tests/process/test_dcp_ranks.py: `dcp_rank.py FOLDER RANK WORLD SCENARIO...`.

Writes what each scenario found to FOLDER/<scenario>-<rank>.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import safepoint
from safepoint import dcp

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from leaving import leave

RANK, WORLD = int(sys.argv[2]), int(sys.argv[3])
NAMES = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "gather",
    "scatter",
    "barrier",
    "gather_object",
    "scatter_object_list",
    "broadcast_object_list",
    "all_gather_object",
    "reduce_scatter",
)


def whole(step: int, rows: int = 50) -> torch.Tensor:
    return torch.randn(rows, 33, generator=torch.Generator().manual_seed(step))


def state(step: int) -> dict[str, Any]:
    """Sharded, replicated and plain parts; `rng` differs from rank to rank."""
    mesh = init_device_mesh("cpu", (WORLD,))
    return {
        "model": {
            "w": distribute_tensor(whole(step), mesh, [Shard(0)]),
            "v": distribute_tensor(whole(step + 1), mesh, [Shard(1)]),
            "plain": whole(step + 2),
        },
        "optim": {"param_groups": [{"lr": 0.5 * step}], "step": torch.tensor(float(step))},
        "rng": torch.full((4,), RANK * 100 + step),
        "pair": (step, whole(step + 3)),
    }


def check(loaded: dict[str, Any], step: int) -> None:
    assert torch.equal(loaded["model"]["w"].full_tensor(), whole(step))
    assert torch.equal(loaded["model"]["v"].full_tensor(), whole(step + 1))
    assert torch.equal(loaded["model"]["plain"], whole(step + 2))
    assert loaded["optim"]["param_groups"] == [{"lr": 0.5 * step}] and loaded["optim"]["step"].item() == step
    assert loaded["rng"].tolist() == [RANK * 100 + step] * 4
    assert loaded["pair"][0] == step and torch.equal(loaded["pair"][1], whole(step + 3))


def load_and_check(namespace: str, step: int) -> None:
    for function in (torch_dcp.load, dcp.load):
        target = state(900)
        function(target, storage_reader=dcp.Reader(namespace))
        check(target, step)


@contextlib.contextmanager
def counted() -> Any:
    """Every way into the process group: the functions of torch.distributed, and the group's own methods."""
    calls: list[str] = []
    group = dist.group.WORLD
    kept = {name: getattr(dist, name) for name in NAMES if hasattr(dist, name)}
    for name, function in kept.items():

        def wrapped(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            calls.append(_name)
            return _function(*args, **kwargs)

        setattr(dist, name, wrapped)
        setattr(dist.distributed_c10d, name, wrapped)
    store = dist.distributed_c10d._get_default_store()
    keys = store.num_keys()
    sequence = group._get_sequence_number_for_group() if group is not None else 0
    try:
        yield calls
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
            setattr(dist.distributed_c10d, name, function)
        assert group is not None
        if group._get_sequence_number_for_group() != sequence:
            calls.append("the group's sequence number moved")
        if store.num_keys() != keys:
            calls.append("the store has other keys")


def no_collectives(namespace: str) -> dict[str, Any]:
    """After the first save: not one operation of the process group, nor a key in its store."""
    writer = dcp.Writer(namespace, per_rank=["rng"])
    states = {step: state(step) for step in range(1, 8)}
    dcp.async_save(states[1], checkpoint_id="step-1", storage_writer=writer).result(60)
    dist.barrier()
    with counted() as calls:
        for step in range(2, 8):
            dcp.async_save(states[step], checkpoint_id=f"step-{step}", storage_writer=writer).result(60)
    dist.barrier()
    load_and_check(namespace, 7)
    return {"calls": calls}


def torchs_own(namespace: str) -> dict[str, Any]:
    """torch's async_save with our writer, calls overlapping on one group: it would hang without `stage`'s waiting."""
    group = dist.new_group(backend="gloo")  # The trainer has collectives of its own on the default one.
    states = {step: state(step) for step in range(1, 13)}
    futures = []
    writer = dcp.Writer(namespace, per_rank=["rng"])
    for step, value in states.items():
        writer.step = step
        futures.append(
            torch_dcp.async_save(value, checkpoint_id=f"run/step-{step}", storage_writer=writer, process_group=group)
        )
    for future in futures[-2:]:
        future.result(120)
    load_and_check(namespace, 12)
    return {}


def without_collectives_of_torch(namespace: str) -> dict[str, Any]:
    """`no_dist=True`: every rank believes to be the coordinator; the writer knows its rank."""
    writer = dcp.Writer(namespace, step=3, per_rank=["rng"])
    torch_dcp.async_save(state(3), storage_writer=writer, no_dist=True).result(60)
    dist.barrier()
    load_and_check(namespace, 3)
    writer.step = 4
    torch_dcp.async_save(state(4), checkpoint_id="4", storage_writer=writer, use_collectives=False).result(60)
    dist.barrier()
    load_and_check(namespace, 4)
    return {}


def overlapping(namespace: str) -> dict[str, Any]:
    """1,000 overlapping saves without collectives: no hang, each one sealed or refused."""
    writer = dcp.Writer(namespace)
    value = {"w": torch.zeros(1000), "n": 0}
    futures, refused = [], 0
    for step in range(1, 1001):
        value["w"].fill_(step)
        value["n"] = step
        try:
            futures.append((step, dcp.async_save(value, checkpoint_id=f"{step}", storage_writer=writer)))
        except (safepoint.NoSpace, safepoint.LimitExceeded, safepoint.Closed):  # Closed: the other rank was refused.
            refused += 1
    failed: dict[str, int] = {}
    for _, future in futures:
        error = future.exception(60)
        if error is not None:
            failed[type(error).__name__] = failed.get(type(error).__name__, 0) + 1
    dist.barrier()
    latest = writer.checkpointer.latest()
    assert latest is not None
    target = {"w": torch.zeros(1000), "n": 0}
    dcp.load(target, storage_reader=dcp.Reader(namespace))
    assert target["n"] == latest.step and torch.equal(target["w"], torch.full((1000,), float(latest.step)))
    return {"failed": failed, "refused": refused, "latest": latest.step}


def process_mode(namespace: str) -> dict[str, Any]:
    """torch's PROCESS mode: the second half runs in a child, the bytes never leave the shard."""
    kind = AsyncCheckpointerType.PROCESS
    for step in (1, 2):
        value = state(step)
        writer = dcp.Writer(namespace, step=step, per_rank=["rng"], durable=2)
        future = torch_dcp.async_save(value, storage_writer=writer, async_checkpointer_type=kind)
        value["model"]["plain"].zero_()
        future.result(240)
    assert writer.save is not None and writer.save.wait("durable", timeout=60) == "durable"
    load_and_check(namespace, 2)
    writer = dcp.Writer(namespace, step=3, per_rank=["rng"])
    told = ""
    try:
        torch_dcp.async_save(
            state(3), checkpoint_id="step-4", storage_writer=writer, async_checkpointer_type=kind
        ).result(120)
    except (safepoint.SafepointError, CheckpointException, RuntimeError) as error:
        told = str(error)
    assert "names step 4, but step 3 is set" in told, told
    load_and_check(namespace, 2)
    writer = dcp.Writer(namespace, step=5, planning="dcp")
    for function in (dcp.async_save, torch_dcp.async_save):
        told = ""
        try:
            function({"x": torch.ones(3)}, storage_writer=writer, async_checkpointer_type=kind).result(120)
        except (safepoint.InvalidArgument, CheckpointException) as error:
            told = str(error)
        assert "use THREAD, or planning=" in told, told
    load_and_check(namespace, 2)
    return {}


def from_the_store(namespace: str) -> dict[str, Any]:
    """What `process_mode` made durable, without asking a daemon."""
    for planning, function in (("own", dcp.load), ("own", torch_dcp.load), ("dcp", torch_dcp.load)):
        reader = dcp.Reader(f"file://{sys.argv[1]}/store", namespace="process-mode", planning=planning)
        target = state(900)
        function(target, storage_reader=reader)
        check(target, 2)
        assert reader.info is not None and reader.info.source == "durable"
    return {}


class Halving(DefaultSavePlanner):
    """A planner of the user's own."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        found = super().transform_object(write_item, object)
        return found / 2 if torch.is_tensor(found) and found.is_floating_point() else found


def dcps_planning(namespace: str) -> dict[str, Any]:
    """planning="dcp": DCP and its planner decide, over both ranks; duplicates are saved once."""
    value = {key: part for key, part in state(2).items() if key != "pair"}
    writer = dcp.Writer(namespace, step=1, planning="dcp")
    torch_dcp.async_save(value, storage_writer=writer).result(60)
    writer = dcp.Writer(namespace, step=2, planning="dcp")
    torch_dcp.save(value, storage_writer=writer, planner=Halving())
    sizes = [info.bytes for info in writer.checkpointer.steps()]
    for reader in (dcp.Reader(namespace), dcp.Reader(namespace, planning="dcp")):
        target = {key: part for key, part in state(900).items() if key != "pair"}
        torch_dcp.load(target, storage_reader=reader)
        assert torch.equal(target["model"]["w"].full_tensor(), whole(2) / 2)
        assert torch.equal(target["model"]["plain"], whole(4) / 2)
        assert target["optim"]["param_groups"] == [{"lr": 1.0}]
    return {"sizes": sizes}


def another_group(namespace: str) -> dict[str, Any]:
    """A smaller process group saves a smaller world: told, not guessed."""
    group = dist.new_group([0])
    if RANK == 0:
        value = {"x": torch.ones(3)}
        try:
            dcp.async_save(value, checkpoint_id="1", storage_writer=dcp.Writer(namespace), process_group=group)
            raise AssertionError("a group of one rank was taken for the world")
        except safepoint.InvalidArgument as error:
            assert "rank= and world_size=" in str(error)
        writer = dcp.Writer(namespace, rank=0, world_size=1)
        dcp.async_save(value, checkpoint_id="1", storage_writer=writer, process_group=group).result(60)
    dist.barrier()
    return {}


def ranks_out_of_step(namespace: str) -> dict[str, Any]:
    """I-7: a rank that has made one load more, and would read another step, is found out before anything is read."""
    writer = dcp.Writer(namespace)
    value = {"x": torch.ones(3)}
    for step in (1, 2):
        dcp.async_save(value, checkpoint_id=f"{step}", storage_writer=writer).result(60)
    dist.barrier()
    if RANK == 0:
        dcp.load({"x": torch.zeros(3)}, storage_reader=dcp.Reader(namespace), no_dist=True)
    dist.barrier()
    told = ""
    target = {"x": torch.zeros(3)}
    try:
        # Rank 0's second load goes back; rank 1's first one is the first one of rank 0, which took the newest.
        torch_dcp.load(target, storage_reader=dcp.Reader(namespace, step=1 if RANK == 0 else None))
    except CheckpointException as error:
        told = str(error)
    assert target["x"].tolist() == [0, 0, 0]
    return {"told": told}


def a_rank_that_fails_in_its_first_save(namespace: str) -> dict[str, Any]:
    """The other one neither waits a minute for its structure nor for the nonce that rank 0 makes; later all is well."""
    value: dict[str, Any] = {"x": torch.ones(3, 1000), "y": torch.ones(3000)}
    bad = {**value, "bad": torch.ones(3).to_sparse()} if RANK == 0 else value
    begin = time.monotonic()
    told = ""
    try:
        future = dcp.async_save(bad, checkpoint_id="1", storage_writer=dcp.Writer(namespace))
    except safepoint.NotPlain as error:
        told = str(error)
    waited = time.monotonic() - begin
    dist.barrier()
    writer = dcp.Writer(namespace)
    dcp.async_save(value, checkpoint_id="2", storage_writer=writer).result(60)
    own = writer.checkpointer._engine._agreed is not None
    if RANK == 1:
        error = future.exception(60)
        assert isinstance(error, safepoint.SafepointError), error
    dist.barrier()
    target = {"x": torch.zeros(3, 1000), "y": torch.zeros(3000)}
    dcp.load(target, storage_reader=dcp.Reader(namespace))
    assert target["x"].all() and target["y"].all()
    return {"told": told, "waited": waited, "agreed": own}


def uploads_in_flight(namespace: str) -> dict[str, Any]:
    """A load, and a synchronous save, on the group that an upload of torch's is using: each waits for its end."""
    writer = dcp.Writer(namespace, per_rank=["rng"])
    step = 0
    for _ in range(5):
        for planning in ("own", "dcp"):
            step += 1
            writer = dcp.Writer(namespace, step=step, planning=planning)
            torch_dcp.async_save({"x": torch.full((1000,), float(step))}, storage_writer=writer)
            target = {"x": torch.zeros(1000)}
            torch_dcp.load(target, storage_reader=dcp.Reader(namespace))
            assert target["x"].eq(step).all(), (step, target["x"][0])
            step += 1
            writer.step = step
            torch_dcp.async_save({"x": torch.full((1000,), float(step))}, storage_writer=writer)
            step += 1
            other = dcp.Writer(namespace, step=step)
            torch_dcp.save({"x": torch.full((1000,), float(step))}, storage_writer=other)
            torch_dcp.load(target, storage_reader=dcp.Reader(namespace))
            assert target["x"].eq(step).all(), (step, target["x"][0])
    return {}


def a_rank_without_a_state(namespace: str) -> dict[str, Any]:
    for step, planning in enumerate(("own", "dcp"), 1):
        writer = dcp.Writer(namespace, step=step, planning=planning)
        torch_dcp.save({"x": torch.full((9,), float(step))} if RANK == 0 else {}, storage_writer=writer)
        target = {"x": torch.zeros(9)} if RANK == 1 else {}
        torch_dcp.load(target, storage_reader=dcp.Reader(namespace))
        assert RANK == 0 or target["x"].eq(step).all()
    return {}


def different_steps(namespace: str) -> dict[str, Any]:
    """Told by torch's collectives, not by the deadline of ten minutes."""
    told = []
    for planning in ("own", "dcp"):
        for asynchronous in (False, True):
            writer = dcp.Writer(namespace, step=len(told) * 10 + RANK, planning=planning)
            try:
                if asynchronous:
                    torch_dcp.async_save({"x": torch.ones(3)}, storage_writer=writer).result(60)
                else:
                    torch_dcp.save({"x": torch.ones(3)}, storage_writer=writer)
                told.append("")
            except CheckpointException as error:
                told.append(str(error))
    writer = dcp.Writer(namespace, step=100)
    torch_dcp.save({"x": torch.ones(3)}, storage_writer=writer)
    return {"told": told}


def changed_structure(namespace: str) -> dict[str, Any]:
    """Tensors that come and go between steps, on both ranks or on one, by every door."""
    step = 0
    for planning in ("own", "dcp"):
        for how in ("ours", "torch", "sync"):
            for extra in (0, 2, 1, RANK):
                step += 1
                value = {key: part for key, part in state(step).items() if key not in ("rng", "pair")}
                late = {
                    f"late{i}-{RANK if extra == RANK else 0}": torch.full((i + 2,), float(step)) for i in range(extra)
                }
                value["model"].update(late)
                writer = dcp.Writer(namespace, step=step, planning=planning)
                if how == "sync":
                    torch_dcp.save(value, storage_writer=writer)
                else:
                    function = dcp.async_save if how == "ours" else torch_dcp.async_save
                    function(value, storage_writer=writer).result(60)
                dist.barrier()
                target = {key: part for key, part in state(900).items() if key not in ("rng", "pair")}
                target["model"].update({name: torch.zeros_like(tensor) for name, tensor in late.items()})
                dcp.load(target, storage_reader=dcp.Reader(namespace))
                assert torch.equal(target["model"]["w"].full_tensor(), whole(step))
                assert torch.equal(target["model"]["plain"], whole(step + 2))
                assert all(tensor.eq(step).all() for name, tensor in target["model"].items() if name in late)
                dist.barrier()
    return {"steps": step}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=RANK, world_size=WORLD)
    for name in sys.argv[4:]:
        begin = time.monotonic()
        found = globals()[name](name.replace("_", "-"))
        found["seconds"] = time.monotonic() - begin
        (folder / f"{name}-{RANK}.json").write_text(json.dumps(found))
        dist.barrier()
    assert threading.main_thread().is_alive()
    dist.destroy_process_group()


if __name__ == "__main__":  # torch's PROCESS mode starts this file again as a module.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main()
    leave()
