"""Measures the durable tier on a directory: drain, saves beside it, restore. Prints a table.

    python -m bench.durable [--scale 1.0] [--rounds 3] [--out DIR] [--json FILE] [--write]

The yardsticks of the drain are `dd conv=fsync` of the same bytes, from memory to the same directory, in the same round:
through the page cache, and past it.
`--write` puts the table into docs/operating/durable.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import safepoint
from bench.ours import EXTENT, Daemon, anonymous_bytes
from bench.report import Sheet, replace_between_markers
from bench.scenarios import build, change, digest, size_of
from bench.system import ROOT
from safepoint import _core

_PAGE = ROOT / "docs" / "operating" / "durable.md"
_TICKS = os.sysconf("SC_CLK_TCK")
_WAIT_SECONDS = 300.0


@dataclass
class Samples:
    """Seconds, by what was measured; `cpu` is the worker's for one drain, `memory` its growth in bytes."""

    dd: list[float] = field(default_factory=list)
    dd_direct: list[float] = field(default_factory=list)
    drain: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    safe: list[float] = field(default_factory=list)
    safe_beside: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    gap_beside: list[float] = field(default_factory=list)
    cat: list[float] = field(default_factory=list)
    restore: list[float] = field(default_factory=list)


class _Worker:
    """The daemon's worker, seen from outside."""

    def __init__(self, keeper: int) -> None:
        self._pid = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def anonymous_bytes(self) -> int:
        return anonymous_bytes(self._pid)


def measure(scale: float, rounds: int, out: Path) -> tuple[Samples, int]:
    """`out`: on the disk that is measured; what this makes in it is removed."""
    samples = Samples()
    state = build("large", 0, scale)
    size = size_of(state)[0]
    folder = out / "durable-bench"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "store").mkdir(parents=True)
    try:
        pool = (5 * size // EXTENT + 8) * EXTENT
        daemon = Daemon(folder / "daemon", pool, {"store": f"file://{folder / 'store'}", "retain": "1"})
        os.environ["SAFEPOINT_SOCKET"] = daemon.socket
        try:
            with safepoint.Checkpointer("bench", rank=0, world_size=1) as checkpointer:
                for step in range(4):  # Memory is made, and the plan.
                    checkpointer.save(step, state.tree).wait(timeout=_WAIT_SECONDS)
                worker = _Worker(daemon.pid)
                for number in range(rounds):
                    newest = _round(samples, checkpointer, worker, state, 10 * (number + 1), folder, size)
            _restore(samples, state, folder, rounds, newest)
        finally:
            daemon.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return samples, size


def _round(
    samples: Samples,
    checkpointer: safepoint.Checkpointer,
    worker: _Worker,
    state: Any,
    step: int,
    folder: Path,
    size: int,
) -> str:
    """Returns the digest of the newest step that is durable."""
    _save(samples.safe, samples.gap, checkpointer, state, step)
    samples.dd.append(_dd(folder, size))
    samples.dd_direct.append(_dd(folder, size, "oflag=direct"))
    cpu, memory = worker.cpu_seconds(), worker.anonymous_bytes()
    change(state, step + 1)
    save = checkpointer.save(step + 1, state.tree, durable=True)
    save.wait(timeout=_WAIT_SECONDS)
    began = time.perf_counter()
    save.wait("durable", timeout=_WAIT_SECONDS)
    samples.drain.append(time.perf_counter() - began)
    samples.cpu.append(worker.cpu_seconds() - cpu)
    samples.memory.append(max(0, worker.anonymous_bytes() - memory))
    change(state, step + 2)
    newest = digest(state)
    save = checkpointer.save(step + 2, state.tree, durable=True)
    save.wait(timeout=_WAIT_SECONDS)
    _save(samples.safe_beside, samples.gap_beside, checkpointer, state, step + 3)
    if save.level == "durable":  # Before the save beside it had ended: it proves nothing.
        samples.safe_beside.pop()
        samples.gap_beside.pop()
    save.wait("durable", timeout=_WAIT_SECONDS)
    return newest


def _save(
    safe: list[float], gap: list[float], checkpointer: safepoint.Checkpointer, state: Any, step: int
) -> safepoint.Save:
    change(state, step)
    began = time.perf_counter()
    save = checkpointer.save(step, state.tree)
    save.wait_safe(_WAIT_SECONDS)
    copied = time.perf_counter()
    save.wait(timeout=_WAIT_SECONDS)
    safe.append(copied - began)
    gap.append(time.perf_counter() - copied)
    return save


def _dd(folder: Path, size: int, *more: str) -> float:
    """As many bytes from memory to the same directory, on disk at the end."""
    source, target = Path("/dev/shm") / f"safepoint-bench-{os.getpid()}", folder / "dd"
    with source.open("wb") as file:
        for _ in range(size // (1 << 20) + 1):
            file.write(os.urandom(1 << 10) * 1024)
    try:
        began = time.perf_counter()
        command = ["dd", f"if={source}", f"of={target}", "bs=8M", "conv=fsync", *more]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


def _restore(samples: Samples, state: Any, folder: Path, rounds: int, expected: str) -> None:
    url = f"file://{folder / 'store'}"
    files = sorted((folder / "store").glob("bench/step-*/*/rank-0.safetensors"))
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(["dd", f"if={files[-1]}", "of=/dev/null", "bs=8M"], check=True, capture_output=True)
        samples.cat.append(time.perf_counter() - began)
        began = time.perf_counter()
        safepoint.load_into(url, state.tree, rank=0, world_size=1)
        samples.restore.append(time.perf_counter() - began)
        if digest(state) != expected:
            raise SystemExit("what was restored is not what was saved")


def _figure(values: list[float]) -> str:
    if not values:
        return "not measured"
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _ratio(values: list[float], yardstick: list[float]) -> str:
    return f"{statistics.median(values) / statistics.median(yardstick):.2f}x" if values and yardstick else "-"


def sheet(samples: Samples, size: int) -> Sheet:
    drain, cpu = _figure(samples.drain), statistics.median(samples.cpu) / (size / (1 << 30))
    rows = [
        ["drain, `memory` to `durable`: written, fsynced, read back", drain, _ratio(samples.drain, samples.dd)],
        ["`dd conv=fsync` of the same bytes", _figure(samples.dd), "1"],
        ["`dd conv=fsync oflag=direct` of them", _figure(samples.dd_direct), _ratio(samples.dd_direct, samples.dd)],
        ["worker's processor time per drain", f"{_figure(samples.cpu)}, {cpu:.2f} s/GiB", "-"],
        ["worker's memory, more at the end of a drain", f"{max(samples.memory) / (1 << 20):.0f} MiB", "-"],
        ["save, T_safe, nothing else going on", _figure(samples.safe), "1"],
        ["save, T_safe, beside a drain", _figure(samples.safe_beside), _ratio(samples.safe_beside, samples.safe)],
        ["T_mem - T_safe, nothing else going on", _figure(samples.gap), "1"],
        ["T_mem - T_safe, beside a drain", _figure(samples.gap_beside), _ratio(samples.gap_beside, samples.gap)],
        ["`load_into`, every byte verified", _figure(samples.restore), _ratio(samples.restore, samples.cat)],
        ["`dd` of the shard to nowhere", _figure(samples.cat), "1"],
    ]
    return Sheet(f"{size / 1e9:.2f} GB in 10 tensors, one rank; seconds, median (least-most)", ["", "s", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="part of 10 x 100 MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--json", type=Path, help="write the samples there, too")
    parser.add_argument("--write", action="store_true", help="put the table into docs/operating/durable.md")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    samples, size = measure(arguments.scale, arguments.rounds, arguments.out)
    table = sheet(samples, size)
    Console().print(table.rich())
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "kernel": _core.kernel_name(), **vars(samples)}, indent=1))
    if arguments.write:
        replace_between_markers(_PAGE, table.markdown())


if __name__ == "__main__":
    main()
