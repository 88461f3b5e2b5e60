"""The durable tier on a directory: drain, saves beside it, restore; beside torch's distributed checkpoint to the same
disk. The yardsticks are `dd` of the same bytes, from memory to the same directory: through the page cache with
`conv=fsync`, and past it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TypeVar

import safepoint
from bench import contender
from bench.contender import Watch
from bench.ours import EXTENT, Daemon
from bench.scenarios import State, build, change, clear, digest, size_of

WAIT_SECONDS = 300.0

Samples = dict[str, list[float]]
_T = TypeVar("_T")


def worker(keeper: int) -> int:
    """The process of the daemon that drains."""
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])


def rotated(things: list[_T], by: int) -> list[_T]:
    at = by % len(things)
    return things[at:] + things[:at]


class _Run:
    def __init__(self, folder: Path, scale: float) -> None:
        self.folder = folder
        self.samples: Samples = {}
        self.state: State = build("large", 0, scale)
        self.size = size_of(self.state)[0]
        self.step = 0
        pool = (5 * self.size // EXTENT + 8) * EXTENT
        self.url = f"file://{folder / 'store'}"
        self._daemon = Daemon(folder / "daemon", pool, {"store": self.url, "retain": "1"})
        os.environ["SAFEPOINT_SOCKET"] = self._daemon.socket
        self._worker = worker(self._daemon.pid)
        arguments = ["dcp", str(folder / "dcp"), str(scale)]
        self.dcp = contender.python("bench.peers.stores", arguments, None, folder / "dcp-log")
        self.checkpointer = safepoint.Checkpointer("bench", rank=0, world_size=1)

    def close(self) -> None:
        self.checkpointer.close()
        self.dcp.stop()
        self._daemon.stop()

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    def change(self) -> int:
        self.step += 1
        change(self.state, self.step)
        return self.step

    def save(self, what: str) -> None:
        """Into memory, while nothing else goes on, or while something does."""
        step = self.change()
        began = time.perf_counter()
        save = self.checkpointer.save(step, self.state.tree)
        save.wait_safe(WAIT_SECONDS)
        copied = time.perf_counter()
        save.wait(timeout=WAIT_SECONDS)
        self.add(f"{what} safe", copied - began)
        self.add(f"{what} gap", time.perf_counter() - copied)

    def save_beside_a_drain(self) -> None:
        draining = self.checkpointer.save(self.change(), self.state.tree, durable=True)
        draining.wait(timeout=WAIT_SECONDS)
        self.save("beside")
        if draining.level == "durable":  # Before the save beside it had ended: it proves nothing.
            for name in ("beside safe", "beside gap"):
                self.samples[name].pop()
        draining.wait("durable", timeout=WAIT_SECONDS)

    def drain(self) -> None:
        step = self.change()
        called = time.perf_counter()
        with Watch(self._worker) as watch:
            save = self.checkpointer.save(step, self.state.tree, durable=True)
            save.wait(timeout=WAIT_SECONDS)
            began = time.perf_counter()
            save.wait("durable", timeout=WAIT_SECONDS)
            over = time.perf_counter()
        self.add("drain", over - began)
        self.add("save", over - called)
        self.add("cpu", watch.cpu)
        self.add("memory", watch.memory)

    def save_dcp(self) -> None:
        self.add("dcp save", self.dcp.ask("save").seconds)

    def load_dcp(self) -> None:
        self.add("dcp load", self.dcp.ask("load").seconds)

    def dd(self, name: str, *more: str) -> None:
        """As many bytes from memory to the same directory, on disk at the end."""
        source, target = Path("/dev/shm") / f"safepoint-bench-{os.getpid()}", self.folder / "dd"
        with source.open("wb") as file:
            for _ in range(self.size // (1 << 20) + 1):
                file.write(os.urandom(1 << 10) * 1024)
        try:
            began = time.perf_counter()
            command = ["dd", f"if={source}", f"of={target}", "bs=8M", "conv=fsync", *more]
            subprocess.run(command, check=True, capture_output=True)
            self.add(name, time.perf_counter() - began)
        finally:
            source.unlink(missing_ok=True)
            target.unlink(missing_ok=True)

    def read(self) -> None:
        files = sorted((self.folder / "store").glob("bench/step-*/*/rank-0.safetensors"))
        began = time.perf_counter()
        subprocess.run(["dd", f"if={files[-1]}", "of=/dev/null", "bs=8M"], check=True, capture_output=True)
        self.add("read", time.perf_counter() - began)

    def restore(self, expected: str) -> None:
        clear(self.state)
        began = time.perf_counter()
        safepoint.load_into(self.url, self.state.tree, rank=0, world_size=1)
        self.add("restore", time.perf_counter() - began)
        if digest(self.state) != expected:
            raise SystemExit("what was restored is not what was saved")


def measure(scale: float, rounds: int, out: Path) -> Samples:
    """`out`: on the disk that is measured; what this makes in it is removed. Orders rotate from round to round."""
    folder = out / "durable-bench"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "store").mkdir(parents=True)
    try:
        run = _Run(folder, scale)
        try:
            for _ in range(4):  # Memory is made, and the plan.
                run.checkpointer.save(run.change(), run.state.tree).wait(timeout=WAIT_SECONDS)
            run.dcp.wait_until_ready()
            ways = [
                lambda: run.dd("dd"),
                lambda: run.dd("dd direct", "oflag=direct"),
                run.drain,
                run.save_dcp,
            ]
            for number in range(rounds):
                run.save("alone")
                for way in rotated(ways, number):
                    way()
                run.save_beside_a_drain()
            # The newest durable step is the one before the last save.
            state = run.checkpointer.restore(run.state.tree, step=run.step - 1)
            assert state is not None
            expected = digest(run.state)
            back = [run.read, lambda: run.restore(expected), run.load_dcp]
            for number in range(rounds):
                for way in rotated(back, number):
                    way()
            return run.samples
        finally:
            run.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
