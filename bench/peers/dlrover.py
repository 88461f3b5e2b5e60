"""DLRover's flash checkpoint, memory only: one shared segment per rank, metadata and locks in its agent process.

The agent here is the saver that `dlrover-run` starts, without the rest of `dlrover-run`. One step is kept, unprotected
while the next one overwrites it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers import copy_into, missing
from bench.scenarios import State
from bench.system import Place, Service, System, site_folder

_AGENT = "from dlrover.trainer.torch.flash_checkpoint.engine import start_async_save as start; start()"


class _Agent(Service):
    def __init__(self, place: Place, environment: dict[str, str]) -> None:
        with (Path(place.folder) / "agent.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _AGENT],
                env={**os.environ, "PYTHONPATH": str(site_folder("dlrover")), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid
        time.sleep(5)  # It says nowhere that it is ready.

    def stop(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Dlrover(System):
    name = "dlrover"
    title = "DLRover flash checkpoint"
    site = "dlrover"
    retain = 1
    modules = ("dlrover.trainer.torch.flash_checkpoint.ddp",)

    @classmethod
    def unavailable(cls) -> str | None:
        return missing(cls)

    @classmethod
    def services(cls, place: Place) -> list[Service]:
        return [_Agent(place, cls.environment(place))]

    @classmethod
    def environment(cls, place: Place) -> dict[str, str]:
        return {
            "TORCHELASTIC_RUN_ID": place.run,
            "NODE_RANK": "0",
            "NODE_NUM": "1",
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "dlrover-trainer",
        }

    def prepare(self, state: State) -> None:
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        ranks = self.place.ranks
        self._checkpointer = DdpCheckpointer(self.place.folder, local_shard_num=ranks, global_shard_num=ranks)

    def save(self, step: int, state: State) -> None:
        from dlrover.trainer.torch.flash_checkpoint.ddp import StorageType

        before = self._checkpointer._engine._cached_step
        self._checkpointer.save_checkpoint(step, state.tree, storage_type=StorageType.MEMORY)
        if self._checkpointer._engine._cached_step == before:
            raise RuntimeError("DLRover has skipped the save and said nothing")

    def load(self, state: State) -> None:
        if not hasattr(self, "_checkpointer"):
            self.prepare(state)
        _, loaded = self._checkpointer._engine.get_state_dict_from_memory()
        copy_into(state.tree, _inner(loaded, set(state.tree)))


def _inner(tree: Any, keys: set[str]) -> Any:
    """It wraps what was saved into dicts of its own."""
    while not keys <= set(tree):
        tree = next(value for value in tree.values() if isinstance(value, dict) and value)
    return tree
