"""safepoint: the native API in both modes, `safepoint.dcp`, and torch's own `async_save` and `load` with our writer
and reader. A daemon of the run's own holds the steps.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

import safepoint
from bench.scenarios import State
from bench.system import Place, Service, System
from safepoint import _core

EXTENT = 16 << 20
_SLOT_SLACK = 16 << 20  # Header, checksums and rounding, per slot.


def anonymous_bytes(pid: int) -> int:
    """Private memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Daemon(Service):
    """`safepointd`: keeper and worker."""

    def __init__(self, folder: Path, pool: int, more: dict[str, str] | None = None) -> None:
        folder.mkdir(mode=0o700)
        self.socket = str(folder / "d.sock")
        errors = folder / "stderr"
        binary = Path(safepoint.__file__).parent / "bin" / "safepointd"
        flags = {
            "socket": self.socket,
            "state-dir": str(folder / "state"),
            "pool": str(pool),
            "pool-prefault": "0",
            "extent": str(EXTENT),
            "http": "off",
            "lock-memory": "off",
            "log-file": str(folder / "log"),
            **(more or {}),
        }
        self._process = subprocess.Popen(
            [str(binary), *(f"--{name}={value}" for name, value in flags.items())],
            stdin=subprocess.DEVNULL,
            stderr=errors.open("w"),
        )
        self.pid = self._process.pid
        deadline = time.monotonic() + 60
        while True:
            try:
                self._client = _core.Client(self.socket, client_name="bench")
                return
            except safepoint.Unavailable:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(errors.read_text()) from None
                time.sleep(0.02)

    def memory(self) -> int:
        """Extents that exist, and private memory of keeper and worker."""
        total = int(json.loads(self._client.status())["pool"]["bytes"])
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for pid in [str(self.pid), *children]:
            total += anonymous_bytes(int(pid))
        return total

    def stop(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(timeout=60)


class _Safepoint(System):
    checksums = True

    @classmethod
    def services(cls, place: Place) -> list[Service]:
        slot = -(-(place.bytes + _SLOT_SLACK) // EXTENT) * EXTENT
        return [Daemon(Path(place.folder) / "daemon", (cls.retain + 1) * place.ranks * slot)]

    @classmethod
    def environment(cls, place: Place) -> dict[str, str]:
        return {"SAFEPOINT_SOCKET": str(Path(place.folder) / "daemon" / "d.sock")}


class Blocking(_Safepoint):
    name = "safepoint"
    title = "safepoint"
    mode: Literal["blocking", "guarded"] = "blocking"

    def prepare(self, state: State) -> None:
        optimizers = state.optimizers if self.mode == "guarded" else ()
        self._checkpointer = safepoint.Checkpointer(
            self.place.run, mode=self.mode, optimizers=optimizers, size_hint=self.place.bytes
        )

    def save(self, step: int, state: State) -> safepoint.Save:
        return self._checkpointer.save(step, state.tree)

    def wait_safe(self, handle: safepoint.Save) -> None:
        handle.wait_safe()

    def wait_memory(self, handle: safepoint.Save) -> None:
        handle.wait("memory", timeout=60)

    def copy_seconds(self, handle: safepoint.Save) -> float:
        return handle.copy_seconds

    def load(self, state: State) -> None:
        if not hasattr(self, "_checkpointer"):
            self._checkpointer = safepoint.Checkpointer(self.place.run)
        if self._checkpointer.restore(state.tree) is None:
            raise RuntimeError("nothing to restore")


class Guarded(Blocking):
    name = "safepoint-guarded"
    title = "safepoint, guarded"
    mode = "guarded"


class OwnDcp(_Safepoint):
    """`safepoint.dcp.async_save` and `safepoint.dcp.load`."""

    name = "safepoint.dcp"
    title = "safepoint.dcp"
    modules = ("safepoint.dcp",)

    def prepare(self, state: State) -> None:
        from safepoint import dcp

        self._writer = dcp.Writer(self.place.run, size_hint=self.place.bytes)

    def save(self, step: int, state: State) -> Any:
        from safepoint import dcp

        self._writer.step = step
        return self._writer, dcp.async_save(state.tree, storage_writer=self._writer)

    def wait_memory(self, handle: Any) -> None:
        writer, future = handle
        writer.save.wait("memory", timeout=60)
        future.result(timeout=60)

    def copy_seconds(self, handle: Any) -> float:
        seconds: float = handle[0].save.copy_seconds
        return seconds

    def load(self, state: State) -> None:
        from safepoint import dcp

        dcp.load(state.tree, storage_reader=dcp.Reader(self.place.run))


class TorchDcp(OwnDcp):
    """`torch.distributed.checkpoint.async_save` and `load`, given our writer and reader."""

    name = "safepoint-torch"
    title = "torch async_save, our writer"
    modules = ("safepoint.dcp", "torch.distributed.checkpoint")

    def save(self, step: int, state: State) -> Any:
        import torch.distributed.checkpoint as torch_dcp

        self._writer.step = step
        return self._writer, torch_dcp.async_save(state.tree, storage_writer=self._writer)

    def load(self, state: State) -> None:
        import torch.distributed.checkpoint as torch_dcp

        from safepoint import dcp

        torch_dcp.load(state.tree, storage_reader=dcp.Reader(self.place.run))
