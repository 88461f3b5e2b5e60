"""What the benchmark asks of a system that saves: the contract of `bench/ours.py` and `bench/peers/`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.scenarios import State

ROOT = Path(__file__).resolve().parent.parent

# Name -> where the class is. Imported only where it is used: a rank of a peer needs nothing of ours, and the reverse.
OURS = {
    "safepoint": "bench.ours:Blocking",
    "safepoint-guarded": "bench.ours:Guarded",
    "safepoint.dcp": "bench.ours:OwnDcp",
    "safepoint-torch": "bench.ours:TorchDcp",
}
PEERS = {
    "dcp-sync": "bench.peers.torch_dcp:Sync",
    "dcp-thread": "bench.peers.torch_dcp:Thread",
    "dcp-process": "bench.peers.torch_dcp:Process",
    "torch-checkpointing": "bench.peers.torch_checkpointing:TorchCheckpointing",
    "dlrover": "bench.peers.dlrover:Dlrover",
    "aws": "bench.peers.aws:Aws",
}


@dataclass(frozen=True)
class Place:
    """One rank of one run. Folders are the run's own and are removed after it."""

    rank: int
    ranks: int
    run: str  # Unique name: namespace, job id.
    folder: str  # On disk: files of the run and of services.
    memory: str  # In /dev/shm.
    bytes: int  # Of one rank's state, about.


class Service:
    """A process that outlives the trainers, of this run alone."""

    pid: int

    def memory(self) -> int | None:
        """Bytes that it holds for checkpoints, by its own account; None: it has none."""
        return None

    def stop(self) -> None:
        raise NotImplementedError


class System:
    """One way of saving. The launcher calls the class methods, a trainer everything else.

    Timed are `save` alone (T_block), and from its call until `wait_safe` and `wait_memory` have returned; in a fresh
    process `load`, which includes connecting. Every rank calls everything, at the same time.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    checksums: ClassVar[bool] = False  # Whether the bytes are checked when they are read back.
    retain: ClassVar[int] = 2  # Complete steps that stay readable.
    ranks: ClassVar[tuple[int, ...]] = (1, 2)
    modules: ClassVar[tuple[str, ...]] = ()  # Imported before anything is timed.
    site: ClassVar[str | None] = None  # Folder under build/peers with the packages that it needs.

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot run here; None: it can."""
        return None

    @classmethod
    def services(cls, place: Place) -> list[Service]:
        """Starts them; ready on return."""
        return []

    @classmethod
    def environment(cls, place: Place) -> dict[str, str]:
        """Added to the environment of the rank at `place`."""
        return {}

    def prepare(self, state: State) -> None:
        """Once, before the first save."""

    def save(self, step: int, state: State) -> Any:
        """Starts the save and returns what the waits take."""
        raise NotImplementedError

    def wait_safe(self, handle: Any) -> None:
        """Until the trainer may change its tensors. Unless overridden, it may when `save` has returned."""

    def wait_memory(self, handle: Any) -> None:
        """Until the step is complete and can be read in memory. Unless overridden, it is when `save` has returned."""

    def copy_seconds(self, handle: Any) -> float:
        """Of a save that has ended: how long its bytes were copied; 0: unknown."""
        return 0.0

    def drop(self, step: int) -> None:
        """Called after each save on all ranks; removes steps older than the `retain` newest, if nobody else does."""

    def load(self, state: State) -> None:
        """The newest complete step into `state`, in place."""
        raise NotImplementedError


def find(name: str) -> type[System]:
    module, _, attribute = {**OURS, **PEERS}[name].partition(":")
    found: type[System] = getattr(importlib.import_module(module), attribute)
    return found


def site_folder(name: str) -> Path:
    """Packages of a peer that `bench/peers/setup.sh` installs there, beside the environment's own."""
    return ROOT / "build" / "peers" / name
