"""One cell of the tables: one system saves one scenario on one or two ranks, is killed, and is read back."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from bench.launch import Failed, Group, Run, available_bytes, state_bytes
from bench.summary import summarize

_SECONDS = 240.0  # Limit of each phase.
_MULTIPLE = 6.5  # Memory of the hungriest system and its trainer, as a multiple of the state; plus:
_BASE_BYTES = 3_500_000_000  # Interpreters and yardstick buffers.


@dataclass(frozen=True)
class Cell:
    """`one_core`: its only rank has one core, so that safepoint copies with one thread. `loaders`: fresh processes that
    read it back, one after the other.
    """

    system: str
    scenario: str
    ranks: int = 1
    one_core: bool = False
    warm: int = 5
    loaders: int = 1
    scale: float = 1.0


def measure(cell: Cell) -> dict[str, Any]:
    """Everything about the cell; with "error" instead of figures where it failed."""
    result: dict[str, Any] = asdict(cell)
    began = time.monotonic()
    size = state_bytes(cell.scenario, cell.ranks, cell.scale)
    needed = _MULTIPLE * size * cell.ranks + _BASE_BYTES
    if available_bytes() < needed:
        result["error"] = f"needs {needed / 1e9:.1f} GB of free memory, {available_bytes() / 1e9:.1f} GB are available"
        return result
    try:
        with Run(cell.system, cell.ranks, size, one_core=cell.one_core) as run:
            result["title"] = run.system.title
            result["checksums"] = run.system.checksums
            result["retain"] = run.system.retain
            _measure(cell, run, result)
        result.update(summarize(result))
    except Failed as error:
        result["error"] = str(error)
    result["seconds"] = time.monotonic() - began
    return result


def _measure(cell: Cell, run: Run, result: dict[str, Any]) -> None:
    extra = {"scenario": cell.scenario, "scale": cell.scale / cell.ranks}
    group = run.start("save", warm=cell.warm, **extra)
    trainers = sum(told["anonymous"] for told in group.wait("built", _SECONDS))
    peak = held = 0

    def sample() -> None:
        nonlocal peak, held
        peak = max(peak, run.beyond(trainers))
        held = max(held, run.held() or 0)

    result["saves"] = group.wait("saved", _SECONDS, sample)
    group.kill()
    result["memory_beyond"] = peak
    result["memory_held"] = held or None
    result["loads"] = _load(cell, run, extra, result["saves"])


def _load(cell: Cell, run: Run, extra: dict[str, Any], saves: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One list per loader, one entry per rank. The loaders' imports run side by side, what is timed never does."""
    groups: list[Group] = [run.start("load", **extra) for _ in range(cell.loaders)]
    for group in groups:
        group.wait("waiting", _SECONDS)
    loads = []
    for group in groups:
        group.go()
        loaded = group.wait("loaded", _SECONDS)
        group.kill()
        for rank, (saved, told) in enumerate(zip(saves, loaded, strict=True)):
            if set(told["digests"]) != {saved["digest"]}:
                raise Failed(f"rank {rank} read back other bytes than were saved")
        loads.append(loaded)
    return loads
