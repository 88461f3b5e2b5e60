"""One rank of tests/process/test_reshard.py: saves one model in every layout, loads it in every other one.

Every rank computes the true values from the names, so nothing that is compared ever went through safepoint or another
rank. Arguments: folder, rank, world size, loader, "save" or "load" or both (separated by a comma). A phase waits for
the file `<phase>` in the folder; its result is written to `<phase>-<world size>-<rank>.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import safepoint
from safepoint import dcp

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from leaving import leave

State = dict[str, Any]

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "up.weight": ((50, 33), torch.float32),  # Over 3 or 4 ranks: uneven.
    "up.bias": ((50,), torch.float32),
    "down.weight": ((33, 50), torch.float32),
    "down.bias": ((33,), torch.float32),
    "few": ((3, 5), torch.bfloat16),  # Fewer rows than 4 ranks: empty pieces.
    "one": ((1, 70), torch.float32),
    "wide": ((6, 300), torch.bfloat16),
}
SAVED_BY = (2, 4)


def truth(name: str) -> torch.Tensor:
    """The whole tensor of a name, computed from the name alone."""
    part, _, parameter = name.partition(".")
    if part == "model":
        shape, dtype = SHAPES[parameter]
        generator = torch.Generator().manual_seed(zlib.crc32(parameter.encode()))
        return torch.randn(shape, generator=generator).to(dtype)
    value = truth(f"model.{parameter}")
    return {"exp_avg": value * 0.5, "exp_avg_sq": value * value, "step": torch.tensor(float(len(parameter)))}[part]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(33, 50)
        self.down = torch.nn.Linear(50, 33)
        for name in ("few", "one", "wide"):
            shape, dtype = SHAPES[name]
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype)))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(truth(f"model.{name}"))


def with_moments(parameters: dict[str, torch.Tensor]) -> State:
    """Parameters and what AdamW keeps for them, as its operations would make it: in the layout of the parameters."""
    plain = {name: p.detach() for name, p in parameters.items()}
    return {
        "model": plain,
        "exp_avg": {name: p * 0.5 for name, p in plain.items()},
        "exp_avg_sq": {name: p * p for name, p in plain.items()},
        "step": {name: truth(f"step.{name}") for name in plain},
    }


def grid(world_size: int, shapes: dict[int, tuple[int, int]], names: tuple[str, str]) -> Any:
    return init_device_mesh("cpu", shapes[world_size], mesh_dim_names=names)


def ddp(rank: int, world_size: int) -> State:
    return with_moments(dict(torch.nn.parallel.DistributedDataParallel(Net()).module.state_dict()))


def fsdp(rank: int, world_size: int) -> State:
    return with_moments(fully_shard(Net(), mesh=init_device_mesh("cpu", (world_size,))).state_dict())


def hsdp(rank: int, world_size: int) -> State:
    mesh = grid(world_size, {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 2)}, ("replicate", "shard"))
    return with_moments(fully_shard(Net(), mesh=mesh).state_dict())


def split(net: Net, mesh: Any) -> Net:
    parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def tensor_parallel(rank: int, world_size: int) -> State:
    return with_moments(split(Net(), init_device_mesh("cpu", (world_size,))).state_dict())


def fsdp_over_tp(rank: int, world_size: int) -> State:
    """_StridedShard: both split the rows of `up`."""
    mesh = grid(world_size, {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2)}, ("dp", "tp"))
    return with_moments(fully_shard(split(Net(), mesh["tp"]), mesh=mesh["dp"]).state_dict())


def by_hand(rank: int, world_size: int) -> State:
    mesh = grid(world_size, {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 2)}, ("a", "b"))
    placements: list[list[Any]] = [[Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Replicate()]]
    parameters = {}
    for number, name in enumerate(SHAPES):
        whole = truth(f"model.{name}")
        chosen = placements[number % 3] if whole.dim() > 1 else placements[0]
        parameters[name] = distribute_tensor(whole, mesh, chosen)
    return with_moments(parameters)


def pipeline(rank: int, world_size: int) -> State:
    """Each rank has other names, and one that all have."""
    names = [name for number, name in enumerate(SHAPES) if number % world_size == rank or name == "one"]
    return with_moments({name: truth(f"model.{name}") for name in names})


LAYOUTS: dict[str, Callable[[int, int], State]] = {
    f.__name__: f for f in (ddp, fsdp, hsdp, tensor_parallel, fsdp_over_tp, by_hand, pipeline)
}


def leaves(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    for part in ("model", "exp_avg", "exp_avg_sq", "step"):
        for name, value in state[part].items():
            yield f"{part}.{name}", value


def local_bytes(state: State) -> int:
    return sum((v.to_local() if isinstance(v, DTensor) else v).nbytes for _, v in leaves(state))


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


def differences(state: State) -> list[str]:
    """Names that differ from the truth in any bit, by torch's own gathering of DTensors."""
    found = []
    for name, value in leaves(state):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        expected = truth(name)
        if whole.shape != expected.shape or whole.dtype != expected.dtype or bits(whole) != bits(expected):
            found.append(name)
    return found


# How a checkpoint gets back into a state; the result is the number of bytes that were read, if it is known.
Loader = Callable[[str, State], int | None]


def native() -> Loader:
    made: dict[str, safepoint.Checkpointer] = {}

    def load(namespace: str, state: State) -> int | None:
        if namespace not in made:
            made[namespace] = safepoint.Checkpointer(namespace)
        info = made[namespace].restore(state)
        assert info is not None and info.step == 3, info
        return info.bytes

    return load


def stock(planning: Literal["own", "dcp"]) -> Loader:
    """torch's own `load`, with its own planner, and our reader."""

    def load(namespace: str, state: State) -> int | None:
        torch_dcp.load(state, storage_reader=dcp.Reader(namespace, planning=planning))
        return None

    return load


LOADERS: dict[str, Callable[[], Loader]] = {
    "native": native,
    "dcp": lambda: stock("own"),
    "dcp-planned": lambda: stock("dcp"),
}


def save(rank: int, world_size: int) -> State:
    told = {}
    for name, make in LAYOUTS.items():
        state = make(rank, world_size)
        wrong = differences(state)
        with safepoint.Checkpointer(f"{name}-{world_size}") as checkpointer:
            checkpointer.save(3, {**state, "epoch": 7}).wait("memory", timeout=60)
        told[name] = wrong
    wrong = save_objects(rank, world_size)
    return {"saved": told | {"objects": wrong}}


def objects(rank: int, world_size: int) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    net = fully_shard(Net(), mesh=init_device_mesh("cpu", (world_size,)))
    return net, torch.optim.AdamW(net.parameters(), foreach=False)


def save_objects(rank: int, world_size: int) -> list[str]:
    """A module and its optimizer as they are: Stateful objects with DTensors in them."""
    net, optimizer = objects(rank, world_size)
    for name, p in net.named_parameters():
        value = p.detach()
        optimizer.state[p] = {"step": truth(f"step.{name}"), "exp_avg": value * 0.5, "exp_avg_sq": value * value}
    with safepoint.Checkpointer(f"objects-{world_size}") as checkpointer:
        checkpointer.save(3, {"net": net, "optimizer": optimizer}).wait("memory", timeout=60)
    return []


def load_objects(rank: int, world_size: int, saved_by: int) -> list[str]:
    """Into a fresh optimizer, which has no state yet: it gets DTensors like its parameters, and can go on."""
    net, optimizer = objects(rank, world_size)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    with safepoint.Checkpointer(f"objects-{saved_by}") as checkpointer:
        info = checkpointer.restore({"net": net, "optimizer": optimizer})
    assert info is not None
    state = with_moments(net.state_dict())
    for name, p in net.named_parameters():
        for part in ("exp_avg", "exp_avg_sq", "step"):
            state[part][name] = optimizer.state[p][part]
            if part != "step" and not (isinstance(optimizer.state[p][part], DTensor)):
                return [f"{part}.{name} is no DTensor"]
    wrong = differences(state)
    if info.bytes != local_bytes(state):
        wrong.append(f"{info.bytes} bytes read for {local_bytes(state)}")
    for p in net.parameters():
        p.grad = p.detach() * 0
    optimizer.step()
    return wrong


def load(rank: int, world_size: int, loader: str) -> State:
    """Into every layout from every other one; with the loaders that share the native one's reads, a third of them."""
    load_with = LOADERS[loader]()
    told: dict[str, list[str]] = {}
    for name, make in LAYOUTS.items():
        state = make(rank, world_size)
        for saved_as in LAYOUTS:
            for saved_by in SAVED_BY:
                if loader != "native" and zlib.crc32(f"{loader} {name} {saved_as} {saved_by}".encode()) % 3:
                    continue
                for _, value in leaves(state):
                    value.zero_()
                target = {**state, "epoch": 0}
                count = load_with(f"{saved_as}-{saved_by}", target)
                wrong = differences(state)
                if target["epoch"] != 7:
                    wrong.append("epoch")
                # Rows split the same way everywhere: what is read is what is needed, to the byte.
                rows = {"ddp", "fsdp", "hsdp", "pipeline"}
                if count is not None and {name, saved_as} <= rows and count != local_bytes(state):
                    wrong.append(f"{count} bytes read for {local_bytes(state)}")
                told[f"{saved_as} by {saved_by} as {name}"] = wrong
    return {"loaded": told}


def main() -> None:
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    loader, phases = sys.argv[4], sys.argv[5].split(",")
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for phase in phases:
        while not (folder / phase).exists():
            time.sleep(0.02)  # Between two looks for a file that the test makes.
        try:
            if phase == "save":
                result = save(rank, world_size)
            else:
                result = load(rank, world_size, loader)
                if loader == "native":
                    for saved_by in SAVED_BY:
                        result["loaded"][f"objects by {saved_by}"] = load_objects(rank, world_size, saved_by)
        except BaseException:
            result = {"error": traceback.format_exc()}
        path = folder / f"{phase}-{world_size}-{rank}.json"
        path.with_suffix(".part").write_text(json.dumps(result))
        path.with_suffix(".part").rename(path)
        if "error" in result:
            os._exit(1)  # The others may be waiting in a collective; the test ends them.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
