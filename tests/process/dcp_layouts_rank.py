"""One rank of tests/process/test_dcp_layouts.py: `dcp_layouts_rank.py FOLDER RANK WORLD PHASES`.

Layouts, true values and comparison are those of reshard_rank.py. A phase waits for the file `<phase>` in the folder;
its result is written to `<phase>-<world size>-<rank>.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from reshard_rank import LAYOUTS, SAVED_BY, State, differences, leaves
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import safepoint
from safepoint import dcp

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import recording
from leaving import leave

SAVED = ("fsdp", "by_hand", "fsdp_over_tp")  # The latter two: a 2-D mesh, and _StridedShard.
DOORS = ("ours", "torch", "planned")
# For torch's Hugging Face reader: every layout, every door.
EXPORTED = {"fsdp": "ours", "by_hand": "torch", "fsdp_over_tp": "planned"}
FORMATS = ("safetensors", "hf")


def save_through(door: str, namespace: str, state: State, group: Any) -> None:
    writer = dcp.Writer(namespace, step=3, planning="dcp" if door == "planned" else "own")
    if door == "ours":
        dcp.async_save(state, storage_writer=writer).result(60)
    else:
        torch_dcp.async_save(state, storage_writer=writer, process_group=group).result(60)


def save(folder: Path, rank: int, world_size: int) -> State:
    group = dist.new_group(backend="gloo")
    told = {}
    for layout in SAVED:
        state = LAYOUTS[layout](rank, world_size)
        told[layout] = differences(state)
        for door in DOORS:
            save_through(door, f"{layout}-{door}-{world_size}", {**state, "epoch": 7}, group)
    return {"saved": told}


def ours(namespace: str, target: State) -> None:
    dcp.load(target, storage_reader=dcp.Reader(namespace))


def stock(namespace: str, target: State) -> None:
    torch_dcp.load(target, storage_reader=dcp.Reader(namespace))


def native(namespace: str, target: State) -> None:
    with safepoint.Checkpointer(namespace) as checkpointer:
        assert checkpointer.restore(target) is not None


LOADERS: dict[str, Callable[[str, State], None]] = {"ours": ours, "torch": stock, "native": native}


def load(folder: Path, rank: int, world_size: int) -> State:
    """Every checkpoint with every loader, each into one other layout, all of which take their turn."""
    made = {name: make(rank, world_size) for name, make in LAYOUTS.items()}
    told: dict[str, list[str]] = {}

    def check(what: str, saved_as: str, read: Callable[[State], None], epoch: bool = True) -> None:
        others = [name for name in LAYOUTS if name != saved_as]
        name = others[zlib.crc32(f"{what} {world_size}".encode()) % len(others)]
        state = made[name]
        for _, value in leaves(state):
            value.zero_()
        target = {**state, "epoch": 0} if epoch else dict(state)
        read(target)
        wrong = differences(state)
        if epoch and target["epoch"] != 7:
            wrong.append("epoch")
        told[f"{what} as {name}"] = wrong

    for saved_by in SAVED_BY:
        for saved_as in SAVED:
            for door in DOORS:
                namespace = f"{saved_as}-{door}-{saved_by}"
                for loader, function in LOADERS.items():
                    check(f"{namespace} by {loader}", saved_as, lambda target: function(namespace, target))  # noqa: B023
        for saved_as, door in EXPORTED.items():
            for form in FORMATS:
                path = folder / f"{saved_as}-{door}-{saved_by}-{form}"

                def with_torch(target: State) -> None:
                    torch_dcp.load(target, storage_reader=HuggingFaceStorageReader(str(path)))  # noqa: B023

                check(f"{path.name} by HuggingFaceStorageReader", saved_as, with_torch, epoch=False)
    return {"loaded": told}


# --- what torch calls, and what it unpickles


@contextlib.contextmanager
def unpickled() -> Iterator[set[str]]:
    """The names that any unpickler of this process looks up, the one written in C included."""
    found: set[str] = set()
    noting = [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and noting[0]:
            found.add(".".join(map(str, args)))

    sys.addaudithook(hook)  # It cannot be taken away again.
    try:
        yield found
    finally:
        noting[0] = False


def contract(folder: Path, rank: int, world_size: int) -> State:
    """Calls of two ranks in a thread, or of one in torch's child process, with results of `stage` of either kind."""
    kind = AsyncCheckpointerType.PROCESS if world_size == 1 else AsyncCheckpointerType.THREAD
    group = dist.new_group(backend="gloo")
    told: State = {}
    for cls in (recording.Writer, recording.Synchronising, recording.WithFuture):
        step = len(told) + 1
        namespace = f"contract-{world_size}"
        with recording.recording(folder / f"calls-{world_size}-{rank}") as calls:
            future = torch_dcp.async_save(
                {"w": torch.full((3,), float(step))},
                checkpoint_id=f"step-{step}",
                storage_writer=cls(namespace, step=step),
                process_group=group if world_size > 1 else None,
                async_checkpointer_type=kind,
            )
            getattr(future, "upload_completion", future).result(120)
        target = {"w": torch.zeros(3)}
        dist.barrier()
        with recording.recording(folder / f"loads-{world_size}-{rank}") as loads:
            torch_dcp.load(target, storage_reader=recording.Reader(namespace))
        assert target["w"].tolist() == [step] * 3
        told[cls.__name__] = {"save": calls(), "load": loads()}
    result: State = {"calls": told}
    if world_size > 1:
        value = {"w": torch.ones(3), "groups": [{"lr": 1}], "pair": (1, 2)}
        for door in ("ours", "torch"):
            with unpickled() as names:
                save_through(door, f"unpickled-{door}", value, group)
                (dcp if door == "ours" else torch_dcp).load(value, storage_reader=dcp.Reader(f"unpickled-{door}"))
            result[f"unpickled by {door}"] = sorted(names)
    return result


PHASES: dict[str, Callable[[Path, int, int], State]] = {"save": save, "contract": contract, "load": load}


def main() -> None:
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for phase in sys.argv[4].split(","):
        while not (folder / phase).exists():
            time.sleep(0.02)  # Between two looks for a file that the test makes.
        try:
            began = time.monotonic()
            result = PHASES[phase](folder, rank, world_size)
            result["seconds"] = time.monotonic() - began
        except BaseException:
            result = {"error": traceback.format_exc()}
        path = folder / f"{phase}-{world_size}-{rank}.json"
        path.with_suffix(".part").write_text(json.dumps(result))
        path.with_suffix(".part").rename(path)
        if "error" in result:
            os._exit(1)  # The others may be waiting in a collective; the test ends them.
    assert threading.main_thread().is_alive()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave()
