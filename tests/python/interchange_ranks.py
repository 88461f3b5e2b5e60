"""Two ranks for test_interchange, started by torchrun.

`save` writes one state to memory, to a DCP folder and as torch's own sharded Hugging Face files, with the whole tensors
beside; `restore` reads an imported step into other shards.

Each rank leaves `result-<rank>` in the folder; nothing is told through the pipe that ranks share.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from leaving import leave
from states import bits, random_tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import safepoint


def make(seed: int) -> dict[str, Any]:
    """FSDP2's model and AdamW after one step, and DTensors of odd sizes in several dtypes and placements."""
    torch.manual_seed(seed)
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = torch.nn.Sequential(torch.nn.Linear(33, 7), torch.nn.Linear(7, 5))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    model(torch.randn(3, 33)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    sharded = {
        f"{dtype} {placement}": distribute_tensor(random_tensor((50, 33), dtype, seed), mesh, [placement])
        for dtype in (torch.bfloat16, torch.int64, torch.float32)
        for placement in (Shard(0), Shard(1), Replicate())
    }
    return {"model": weights, "optim": moments, "sharded": sharded, "step": seed, "text": "plain"}


def whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value.full_tensor() if isinstance(value, DTensor) else value


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, dict):
        return [d for key in a for d in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list):
        return [d for x, y in zip(a, b, strict=True) for d in differences(x, y, name)]
    equal = bits(a) == bits(b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [name]


def main() -> None:
    mode, folder, namespace = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if mode == "save":
        state = make(1)
        with safepoint.Checkpointer(namespace) as checkpointer:
            own = {"rng": safepoint.PerRank(torch.full((4,), rank)), "place": safepoint.PerRank({"at": rank})}
            checkpointer.save(5, {**state, **own}).wait("memory", timeout=60)
        dcp.save(state, checkpoint_id=folder / "dcp")
        tensors = {**state["model"], **state["sharded"]}
        writer = HuggingFaceStorageWriter(str(folder / "torch-hf"), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        expected = whole(state)
        if rank == 0:
            torch.save(expected, folder / "expected.pt")
        problems: list[str] = []
    else:
        state = make(2)
        with safepoint.Checkpointer(namespace) as checkpointer:
            assert checkpointer.restore(state) is not None
        problems = differences(torch.load(folder / "expected.pt", weights_only=False), whole(state))
    partial = folder / f".result-{rank}"
    partial.write_text("\n".join(problems))
    os.rename(partial, folder / f"result-{mode}-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
