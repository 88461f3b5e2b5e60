"""meta-pytorch/torch_checkpointing: asynchronous, a reused staging buffer, files written by a child process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench.peers import missing
from bench.scenarios import State
from bench.system import System


class TorchCheckpointing(System):
    name = "torch-checkpointing"
    title = "torch_checkpointing"
    site = "torch-checkpointing"
    modules = ("torch_checkpointing", "torch_checkpointing.staging")

    @classmethod
    def unavailable(cls) -> str | None:
        return missing(cls)

    def prepare(self, state: State) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig

        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        config = CheckpointManager.Config(save=AsyncCheckpointSaverConfig(staging_config=staging))
        self._manager = CheckpointManager(config)

    def _path(self, step: int) -> Path:
        return Path(self.place.memory) / f"step{step}"

    def save(self, step: int, state: State) -> Any:
        return self._manager.save(str(self._path(step)), state.tree)

    def wait_safe(self, handle: Any) -> None:
        with self._manager.lock():  # Its own way to wait until staging has ended.
            return

    def wait_memory(self, handle: Any) -> None:
        handle.result()

    def drop(self, step: int) -> None:
        if self.place.rank == 0:
            shutil.rmtree(self._path(step - self.retain), ignore_errors=True)

    def load(self, state: State) -> None:
        if not hasattr(self, "_manager"):
            self.prepare(state)
        newest = max(int(path.name.removeprefix("step")) for path in Path(self.place.memory).glob("step*"))
        loaded = self._manager.load(str(self._path(newest)), into=state.tree)
        state.tree["step"] = loaded["step"]  # It fills tensors in place and returns what is none.
