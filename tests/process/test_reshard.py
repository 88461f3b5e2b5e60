"""Saved with 2 and 4 ranks in every layout, loaded with 1, 2, 3 and 4 in every other one: bit-equal. Real processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Daemon

PROGRAM = Path(__file__).parent / "reshard_rank.py"
SECONDS = 300


class Launch:
    """The ranks of one world size."""

    def __init__(self, folder: Path, world_size: int, *arguments: str, socket: str, program: Path = PROGRAM) -> None:
        self.folder, self.world_size = folder, world_size
        environment = os.environ | {
            "SAFEPOINT_SOCKET": socket,
            "SAFEPOINT_START": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(program), str(folder), str(rank), str(world_size), *arguments],
                env=environment,
                stdout=(folder / f"out-{world_size}-{rank}").open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(world_size)
        ]

    def results(self, phase: str) -> list[dict[str, dict[str, list[str]]]]:
        """What every rank wrote. Fails when one failed or ended without a word."""
        deadline = time.monotonic() + SECONDS
        found = []
        for rank, process in enumerate(self.processes):
            path = self.folder / f"{phase}-{self.world_size}-{rank}.json"
            while not path.exists():
                told = [json.loads(p.read_text()) for p in self.folder.glob(f"{phase}-{self.world_size}-*.json")]
                errors = "\n".join(t["error"] for t in told if "error" in t)
                ended = process.poll() is not None and not path.exists()
                if errors or ended or time.monotonic() > deadline:
                    out = (self.folder / f"out-{self.world_size}-{rank}").read_text()[-2000:]
                    raise AssertionError(f"rank {rank} of {self.world_size}, {phase}: {errors or out}")
                time.sleep(0.02)  # Between two looks for a file that a rank writes.
            found.append(json.loads(path.read_text()))
            assert "error" not in found[-1], found[-1]["error"]
        return found

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.mark.parametrize("loader", ["native", "dcp", "dcp-planned"])
def test_every_layout_into_every_other(start_daemon: Callable[..., Daemon], tmp_path: Path, loader: str) -> None:
    """I-8, I-12: DDP, FSDP2, HSDP, tensor parallel, FSDP2 over tensor parallel (_StridedShard), grids made by hand and
    pipeline stages; uneven shards, empty pieces, replicas, optimizer state."""
    daemon = start_daemon("--pool=768MiB", "--extent=1MiB")
    with contextlib.ExitStack() as stack:

        def launch(world_size: int, phases: str) -> Launch:
            made = Launch(tmp_path, world_size, loader, phases, socket=daemon.socket)
            stack.callback(made.end)
            return made

        savers = [launch(2, "save,load"), launch(4, "save,load")]
        (tmp_path / "save").touch()
        for each in savers:
            for result in each.results("save"):
                assert not [wrong for wrong in result["saved"].values() if wrong], "the truth itself is in doubt"
        (tmp_path / "load").touch()
        for each in [*savers, launch(1, "load"), launch(3, "load")]:
            for rank, result in enumerate(each.results("load")):
                wrong = {case: names for case, names in result["loaded"].items() if names}
                assert not wrong, (each.world_size, rank, wrong)
                assert len(result["loaded"]) >= (7 * 7 * 2 if loader == "native" else 20)
