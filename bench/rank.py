"""One rank of one run: `python -m bench.rank CONFIG`. Tells its result in a file of its own and waits to be killed."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from bench import planning_rank, training_rank
from bench.scenarios import build, change, clear, digest, size_of
from bench.summary import WARM_FROM
from bench.system import Place, System, find
from bench.yardstick import Yardstick


class Rank:
    """What a phase gets: its configuration, its system, and ways to speak to the launcher."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.place = Place(**config["place"])
        kind = find(config["system"])
        for module in kind.modules:
            importlib.import_module(module)
        self.system: System = kind(self.place)

    def barrier(self) -> None:
        torch.distributed.barrier()

    def tell(self, what: str, result: dict[str, Any]) -> None:
        """Written whole or not at all: the launcher acts on the file's existence."""
        path = Path(self.config["out"]) / f"{what}-{self.place.rank}.json"
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result))
        temporary.rename(path)

    def anonymous_bytes(self) -> int:
        pages = Path("/proc/self/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def save_phase(rank: Rank) -> None:
    config, system = rank.config, rank.system
    state = build(config["scenario"], rank.place.rank, config["scale"])
    size, tensors = size_of(state)
    yardstick = Yardstick(size)
    rank.tell("built", {"anonymous": rank.anonymous_bytes()})
    began = time.perf_counter()
    system.prepare(state)
    prepared = time.perf_counter() - began
    samples: dict[str, list[float]] = {"yardstick": [], "T_block": [], "T_safe": [], "T_mem": [], "copy": []}
    for step in range(1, config["warm"] + WARM_FROM + 1):
        change(state, step)
        rank.barrier()
        samples["yardstick"].append(yardstick())
        rank.barrier()
        began = time.perf_counter()
        handle = system.save(step, state)
        samples["T_block"].append(time.perf_counter() - began)
        system.wait_safe(handle)
        samples["T_safe"].append(time.perf_counter() - began)
        system.wait_memory(handle)
        samples["T_mem"].append(time.perf_counter() - began)
        samples["copy"].append(system.copy_seconds(handle))
        rank.barrier()
        system.drop(step)
    last = config["warm"] + WARM_FROM + 1
    change(state, last)
    expected = digest(state)
    rank.barrier()
    system.wait_memory(system.save(last, state))
    rank.tell("saved", {"bytes": size, "tensors": tensors, "prepare": prepared, "digest": expected, "samples": samples})
    signal.pause()


def load_phase(rank: Rank) -> None:
    """In a process that has saved nothing: into zeroed, touched tensors; once more with what is warm by then."""
    rank.tell("waiting", {})
    sys.stdin.readline()
    config = rank.config
    state = build(config["scenario"], rank.place.rank, config["scale"], empty=True)
    yardstick = Yardstick(size_of(state)[0])
    samples: dict[str, list[float]] = {"yardstick": [], "T_rec": []}
    digests = []
    for _ in range(2):
        clear(state)
        rank.barrier()
        samples["yardstick"].append(yardstick())
        rank.barrier()
        began = time.perf_counter()
        rank.system.load(state)
        samples["T_rec"].append(time.perf_counter() - began)
        digests.append(digest(state))
    rank.tell("loaded", {"samples": samples, "digests": digests})
    signal.pause()


PHASES: dict[str, Callable[[Rank], None]] = {
    "save": save_phase,
    "load": load_phase,
    "training": training_rank.run,
    "planning": planning_rank.run,
}


def main() -> None:
    config = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(config["threads"])
    place = config["place"]
    torch.distributed.init_process_group("gloo", rank=place["rank"], world_size=place["ranks"])
    PHASES[config["phase"]](Rank(config))


if __name__ == "__main__":
    main()
    # As in examples/demo/train.py: a thread of gloo's would abort the process now and then.
    atexit._run_exitfuncs()
    os._exit(0)
