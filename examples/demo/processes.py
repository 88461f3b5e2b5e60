"""The daemon and the torchrun job of a demo, as processes to watch and to kill; what both demos share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

import safepoint
from safepoint import _core

HERE = Path(__file__).resolve().parent
NAMESPACE = "demo"
RANKS = 2
JOB_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # A store of its own for every launch: in the one that torchrun's agent shares by default, torch 2.13 finds the
    # addresses of the killed
    # trainers and then fails to connect its process group at about every second restart.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
console = Console(width=max(110, Console().width))


class DemoFailed(Exception):
    """What the demo promises did not hold."""


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("{") and line.endswith("}"):  # A SIGKILL may cut the last line.
                lines.append(json.loads(line))
    return lines


def log_time(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(str(event["ts"])).timestamp()


class Daemon:
    """A daemon of the demo's own: ``safepointd`` is the keeper, its child the worker.

    A second one in the same folder has the socket, the state directory and the log of the first.
    """

    def __init__(self, folder: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket = folder / "safepointd.sock"
        self.log = folder / "daemon.jsonl"
        command = [
            str(Path(safepoint.__file__).parent / "bin" / "safepointd"),
            f"--socket={self.socket}",
            f"--state-dir={folder / 'state'}",
            "--extent=16MiB",
            "--http=off",
            f"--log-file={self.log}",
            *flags,
        ]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stderr=(folder / "daemon.err").open("a"),
        )
        self.client = self.connect()

    def connect(self) -> _core.Client:
        deadline = time.monotonic() + 60
        while True:
            try:
                return _core.Client(str(self.socket), client_name="demo")
            except safepoint.Unavailable:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def worker_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        if len(children) != 1:
            raise DemoFailed(f"the keeper has {len(children)} children, expected its worker")
        return int(children[0])

    def status(self) -> dict[str, Any]:
        try:
            status: dict[str, Any] = json.loads(self.client.status())
        except safepoint.Unavailable:  # Its worker was killed: ask the next one.
            self.client.close()
            self.client = self.connect()
            status = json.loads(self.client.status())
        return status

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.log) if e.get("event") == name]

    def stop(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=60)


class Job:
    """``train.py`` with ``options`` on two ranks, under a torchrun of its own.

    A second one in the same folder goes on with the event logs of the first.
    """

    def __init__(self, out: Path, options: list[str], environment: dict[str, str]) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={RANKS}",
            "--max-restarts=5",
            "--monitor-interval=0.1",
            str(HERE / "train.py"),
            f"--out={out}",
            f"--namespace={NAMESPACE}",
            *options,
        ]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **JOB_ENVIRONMENT, **environment},
            stdin=subprocess.DEVNULL,
            stdout=(out / "torchrun.out").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def events(self, rank: int) -> list[dict[str, Any]]:
        return read_jsonl(self.out / f"events-rank{rank}.jsonl")

    def starts(self, rank: int) -> list[dict[str, Any]]:
        return [e for e in self.events(rank) if e["event"] == "start"]

    def pids(self) -> list[int]:
        """Trainers of the current launch, by rank."""
        return [starts[-1]["pid"] for starts in map(self.starts, range(RANKS)) if starts]

    def launches(self) -> int:
        return min(len(self.starts(rank)) for rank in range(RANKS))

    def wait_for_launch(self, number: int) -> None:
        """Until every rank of launch ``number`` (from 1) has done an optimizer step."""
        while self.launches() < number:
            self.check_alive()
            time.sleep(0.02)
        self.wait_for_step(0)

    def wait_for_step(self, step: int) -> None:
        """Until every rank of the current launch has done optimizer step ``step``."""
        while True:
            reached = []
            for rank in range(RANKS):
                events = self.events(rank)
                last_start = max((i for i, e in enumerate(events) if e["event"] == "start"), default=len(events))
                reached.append(max((e["step"] for e in events[last_start:] if e["event"] == "step"), default=-1))
            if min(reached) >= step:
                return
            self.check_alive()
            time.sleep(0.02)

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise DemoFailed(f"torchrun ended with {self.process.returncode} before its time:\n{self.tail()}")

    def tail(self) -> str:
        return (self.out / "torchrun.out").read_text()[-3000:]

    def finish(self, seconds: float) -> str:
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"torchrun has not ended within {seconds:.0f} s:\n{self.tail()}") from None
        if code != 0:
            raise DemoFailed(f"torchrun ended with {code}:\n{self.tail()}")
        digests = {e["digest"] for rank in range(RANKS) for e in self.events(rank) if e["event"] == "done"}
        if len(digests) != 1:
            raise DemoFailed(f"the ranks ended with different weights: {digests}")
        return str(digests.pop())

    def stop(self) -> list[int]:
        """SIGKILL of torchrun and, as it gives every trainer a session of its own, of these. Returns who was killed."""
        if self.process.poll() is not None:
            return []
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        killed = [self.process.pid]
        for pid in self.pids():
            if Path(f"/proc/{pid}/cmdline").exists() and b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        return killed
