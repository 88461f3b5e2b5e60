"""The demo's GPT, small, as ``ckpt-chaos`` wants a job: it saves every few steps to folders under ``--out``, starts
from the newest folder it finds there, and prints from which step. Run by ``campaign.py``; one process, or one per rank.

``--writer`` chooses who writes the folders:

safepoint   the step is saved into the memory tier and, once complete there, exported with ``safepoint export``. The
            resume reads the exported files only: the memory tier, which would have the step at once, is not asked,
            because the files are what is graded here.
in-place    the same bytes, written straight into the folder, without fsync and rename: the planted bug.
dcp         ``dcp.save`` with torch's FileSystemWriter.
dcp-async   ``dcp.async_save`` with it; the next save waits for the one before.

``--resume`` says which folder is the newest: ``any`` takes the highest step, as many scripts do; ``metadata`` the
highest that has DCP's ``.metadata`` file, which DCP writes last.
"""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import hashlib
import json
import os
import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
from train import CONTEXT, GPT, digest

BATCH = 2


class DcpWriter:
    """Names as most scripts have them: state dicts of model and optimizer, and what this rank alone has."""

    def __init__(self, asynchronous: bool) -> None:
        import torch.distributed.checkpoint as dcp  # A second of imports that the other writers do not need.

        self.dcp = dcp
        self.asynchronous = asynchronous
        self.saving: Any = None

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            f"random-{rank}": torch.get_rng_state(),
        }

    def save(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
        state = self.state(model, optimizer, rank)
        if self.asynchronous:
            self.finish()
            self.saving = self.dcp.async_save(state, checkpoint_id=folder)
        else:
            self.dcp.save(state, checkpoint_id=folder)

    def load(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
        state = self.state(model, optimizer, rank)
        self.dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state[f"random-{rank}"])

    def finish(self) -> None:
        if self.saving is not None:
            self.saving.result()


class SafepointWriter:
    def __init__(self, out: Path, in_place: bool) -> None:
        import safepoint

        self.in_place = in_place
        self.per_rank = safepoint.PerRank
        # A namespace for every folder, so that the runs of a campaign do not meet in the memory of one daemon.
        self.namespace = "chaos-" + hashlib.sha256(os.fsencode(out)).hexdigest()[:12]
        self.checkpointer = safepoint.Checkpointer(self.namespace)
        self.checkpointer.restore({}, fresh=True)

    def save(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
        step = int(folder.name.removeprefix("step-"))
        random = self.per_rank({"random": torch.get_rng_state()})
        self.checkpointer.save(step, {"model": model, "optimizer": optimizer, "own": random}).wait("memory", timeout=60)
        if rank != 0:
            return
        if self.in_place:
            self.export_in_place(folder, step)
            return
        from safepoint.cli.main import app

        app(
            ["export", str(folder), "--step", str(step), "--namespace", self.namespace, "--json"],
            standalone_mode=False,
        )

    def export_in_place(self, folder: Path, step: int) -> None:
        from safepoint import _connect, _core

        client = _core.Client(_connect.socket_path(None), client_name="in place")
        with client.open_read(self.namespace, step=step) as pin:
            folder.mkdir(exist_ok=True)
            for source in range(pin.info.world_size):
                with (folder / f"rank-{source}.safetensors").open("wb") as file:
                    pin.shard(source).copy_to_file(file.fileno())
        client.close()

    def load(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
        import safetensors.torch

        from safepoint import _files

        if not self.in_place:
            _files.check(folder)
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            tensors.update(safetensors.torch.load_file(path))
        # One of several names of a tied weight is stored.
        weights = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
        names = {name: tensor for name, tensor in model.state_dict().items() if f"model.{name}" in tensors}
        if len(names) != len(weights):
            raise SystemExit(f"{folder} has {len(names)} of {len(weights)} weights")
        for name, tensor in names.items():
            tensor.copy_(tensors[f"model.{name}"])
        for index, parameter in enumerate(model.parameters()):
            for name, tensor in optimizer.state[parameter].items():
                tensor.copy_(tensors[f"optimizer.state.{index}.{name}"])
        torch.set_rng_state(tensors[f"own.random@{rank}"])

    def finish(self) -> None:
        self.checkpointer.close()


def newest(out: Path, rule: str) -> Path | None:
    found = [p for p in out.glob("step-*") if rule == "any" or (p / ".metadata").exists()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--writer", choices=["safepoint", "in-place", "dcp", "dcp-async"], required=True)
    parser.add_argument("--resume", choices=["any", "metadata"], default="any")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--save-every", type=int, default=3)
    args = parser.parse_args()

    faulthandler.enable()  # A run that aborts says where each thread was.
    torch.set_num_threads(1)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)

    text = "\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    torch.manual_seed(0)  # Equal weights on all ranks ...
    model = GPT(width=64, layers=2)
    torch.manual_seed(1000 + rank)  # ... then each rank draws its own dropout masks and data.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():  # What AdamW itself makes at its first step: a place to load into.
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    trainer = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model

    writer: Any
    if args.writer in ("dcp", "dcp-async"):
        writer = DcpWriter(args.writer == "dcp-async")
    else:
        writer = SafepointWriter(out, args.writer == "in-place")

    # Every rank starts from the folder that rank 0 saw.
    choice = [newest(out, args.resume)]
    dist.broadcast_object_list(choice, src=0)
    step = 0
    if choice[0] is not None:
        writer.load(choice[0], model, optimizer, rank)
        step = int(choice[0].name.removeprefix("step-"))
    print(f"resumed from step {step}", flush=True)

    while step < args.steps:
        at = torch.randint(len(data) - CONTEXT - 1, (BATCH,)).tolist()
        tokens = torch.stack([data[i : i + CONTEXT] for i in at]).long()
        targets = torch.stack([data[i + 1 : i + CONTEXT + 1] for i in at]).long()
        loss = trainer(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % args.save_every == 0:
            writer.save(out / f"step-{step:04d}", model, optimizer, rank)
    writer.finish()

    digests: list[Any] = [None] * world_size
    dist.all_gather_object(digests, digest(model, optimizer))
    if rank == 0:
        (out / "final.json").write_text(json.dumps({"step": step, "digests": digests}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # As in examples/demo/train.py: a thread of gloo's would abort the process now and then.
    atexit._run_exitfuncs()
    os._exit(0)
