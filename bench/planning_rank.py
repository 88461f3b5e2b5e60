"""Rank side of `bench/planning.py`: saves of many tiny DTensors, where everything but the copy is what takes time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.distributed import distributed_c10d

from bench.scenarios import State

if TYPE_CHECKING:
    from bench.rank import Rank

_FUNCTIONS = (
    "all_gather all_gather_coalesced all_gather_into_tensor all_gather_object all_reduce all_reduce_coalesced "
    "all_to_all all_to_all_single barrier batch_isend_irecv broadcast broadcast_object_list gather gather_object irecv "
    "isend monitored_barrier new_group recv recv_object_list reduce reduce_scatter reduce_scatter_tensor scatter "
    "scatter_object_list send send_object_list"
)
_METHODS = (
    "_allgather_base _reduce_scatter_base allgather allgather_coalesced allgather_into_tensor_coalesced allreduce "
    "allreduce_coalesced alltoall alltoall_base barrier broadcast gather monitored_barrier recv recv_anysource reduce "
    "reduce_scatter reduce_scatter_tensor_coalesced scatter send"
)


class Operations:
    """Counts what goes to the process group: torch.distributed's functions, and the group's own methods."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        changed: list[tuple[Any, str, Any]] = []
        targets = [(torch.distributed, _FUNCTIONS), (distributed_c10d, _FUNCTIONS)]
        for owner, names in [*targets, (torch.distributed.ProcessGroup, _METHODS)]:
            for name in names.split():
                if name in vars(owner):
                    # As it is in the class: a bound method put back in place of its descriptor would lose `self`.
                    changed.append((owner, name, vars(owner)[name]))
                    setattr(owner, name, self._counted(name, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, real in changed:
                setattr(owner, name, real)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return real(*args, **kwargs)

        return call


def sharded_state(rank: int, ranks: int, tensors: int) -> State:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (ranks,))
    model = {
        f"layer{i}.weight": DTensor.from_local(torch.full((8, 16), float(rank + i)), mesh, [Shard(0)], run_check=False)
        for i in range(tensors)
    }
    return State({"model": model})


def run(rank: Rank) -> None:
    """Every save is timed on all ranks at once; operations are counted in saves of their own, which are not timed."""
    config, system = rank.config, rank.system
    state = sharded_state(rank.place.rank, rank.place.ranks, config["tensors"])
    system.prepare(state)
    blocked, complete, worked = [], [], []
    for step in range(1, config["saves"] + 1):
        rank.barrier()
        cpu, began = time.thread_time(), time.perf_counter()
        handle = system.save(step, state)
        system.wait_safe(handle)
        took = time.perf_counter() - began
        worked.append(time.thread_time() - cpu)
        system.wait_memory(handle)
        copy = system.copy_seconds(handle)
        blocked.append(took - copy)
        complete.append(time.perf_counter() - began - copy)
        rank.barrier()
        system.drop(step)
    operations = Operations()
    rank.barrier()
    for step in range(config["saves"] + 1, config["saves"] + 4):
        with operations.counting():
            system.wait_memory(system.save(step, state))
        rank.barrier()
        system.drop(step)
    rank.tell(
        "planned", {"blocked": blocked, "complete": complete, "cpu": worked, "operations": sorted(operations.names)}
    )
